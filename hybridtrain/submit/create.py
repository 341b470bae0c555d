"""Creates the run directory of a job, with the resolved configuration in it.

runs/<name>/submit/conf/experiment/submitted.yaml   read by
                                                    `--config-dir <run>/submit/conf experiment=submitted`
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config import checks, schema
from hybridtrain.config.compose import to_yaml, train_config
from hybridtrain.errors import refusal
from hybridtrain.run import identity, start
from hybridtrain.run.directory import RunDir
from hybridtrain.run.record import record_lost
from hybridtrain.runtime import host
from hybridtrain.runtime.files import unwritable, write_atomically
from hybridtrain.training import job as jobs

_HEADER = "# @package _global_\n# What this run was submitted with.\n"


def create_run_from_overrides(argv: list[str]) -> tuple[Path, list[str]]:
    """Check the overrides `argv` for HYBRIDTRAIN_WORLD processes, then create or reuse the run directory.

    Returns the directory and the modules of run.plugins. Raises UserError.
    """
    config = train_config(argv)
    checks.check(config)
    job = resolve_job(config, world_size=int(os.environ["HYBRIDTRAIN_WORLD"]))
    return create_run(job.config).path, config.run.plugins


def create_run(config: schema.Config) -> RunDir:
    """The run directory of a checked config, created or, for an existing run, reused. Raises UserError."""
    locked = start.lock_run(config)
    try:
        checkpoint = (
            Manager(locked.path / "checkpoints", settings=config.checkpoint).latest()
            if locked.before
            else None
        )
        if config.run.resume == "required" and checkpoint is None:
            raise identity.not_resumable(locked.path, words="")
        run = start.begin(
            locked, config, yaml_text=to_yaml(config), versions=host.versions(), checkpoint=checkpoint, step=0
        )
        if run.lost:
            record_lost(run.path, lost=run.lost, step=0)
        run.update_summary(status="queued")
        write_config(config, run.path)
    finally:
        locked.leave()
    return run


def resolve_job(config: schema.Config, *, world_size: int) -> jobs.Job:
    """Check all that can be checked before processes start: layout, model, data, schedule, and
    that run.dir is writable.

    Raises UserError.
    """
    job = jobs.resolve(config, world_size=world_size, here=False, data=None, task=None)
    folder = Path(config.run.dir).resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise refusal(
            "run.dir",
            config.run.dir,
            f"{folder} cannot be written",
            allowed="a folder that you can write",
            instead="run.dir=FOLDER",
        )
    return job


def write_config(config: schema.Config, run: Path) -> None:
    """Write the configuration that the job's processes will compose, so that later changes in
    conf/ do not matter.

    Without run.plugins: the job script passes it on the command line, since a file of a run
    must not import code.
    """
    submitted = dataclasses.replace(
        config, run=dataclasses.replace(config.run, dir=str(run.resolve()), plugins=[])
    )
    folder = run / "submit" / "conf" / "experiment"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "submitted.yaml", _HEADER + to_yaml(submitted))
    except OSError as error:
        raise unwritable("run.dir", folder, error) from error
