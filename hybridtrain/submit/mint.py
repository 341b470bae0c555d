"""Creates the run directory that a job starts from, with the resolved configuration in it.

runs/<name>/submit/conf/experiment/submitted.yaml    used by `--config-dir <run>/submit/conf experiment=submitted`
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config import checks, schema
from hybridtrain.config.compose import to_yaml, training
from hybridtrain.errors import refusal
from hybridtrain.run import entry as entries
from hybridtrain.run import identity
from hybridtrain.run.directory import RunDir
from hybridtrain.run.record import record_lost
from hybridtrain.runtime import host
from hybridtrain.runtime.files import unwritable, write_atomically
from hybridtrain.training import job as jobs

_FROZEN = "# @package _global_\n# What this run was submitted with.\n"


def mint_from(argv: list[str]) -> tuple[Path, list[str]]:
    """Create or reuse the run directory for these overrides, after checking them against the number of processes; returns it and the modules of run.plugins."""
    config = training(argv)
    checks.check(config)
    job = checked(config, world_size=int(os.environ["HYBRIDTRAIN_WORLD"]))
    return mint(job.config).path, config.run.plugins


def mint(config: schema.Config) -> RunDir:
    """Open the run directory of a checked config (raises UserError). An existing run is continued."""
    entry = entries.enter(config)
    try:
        checkpoint = Manager(entry.path / "checkpoints", settings=config.checkpoint).latest() if entry.before else None
        if config.run.resume == "required" and checkpoint is None:
            raise identity.not_resumable(entry.path, words="")
        run = entries.begin(entry, config, yaml_text=to_yaml(config), versions=host.versions(), checkpoint=checkpoint, step=0)
        if run.lost:
            record_lost(run.path, lost=run.lost, step=0)
        run.update_summary(status="queued")
        freeze(config, run.path)
    finally:
        entry.leave()
    return run


def checked(config: schema.Config, *, world_size: int) -> jobs.Job:
    """Everything that can be refused before processes start: layout, model, data, schedule, and a folder that can be written."""
    job = jobs.resolve(config, world_size=world_size, here=False, data=None, task=None)
    folder = Path(config.run.dir).resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise refusal("run.dir", config.run.dir, f"{folder} cannot be written", allowed="a folder that you can write", instead="run.dir=FOLDER")
    return job


def freeze(config: schema.Config, run: Path) -> None:
    """Write the configuration that the job's processes compose, whatever becomes of conf/ meanwhile. What imports code stands in the job's script."""
    frozen = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run.resolve()), plugins=[]))
    folder = run / "submit" / "conf" / "experiment"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "submitted.yaml", _FROZEN + to_yaml(frozen))
    except OSError as error:
        raise unwritable("run.dir", folder, error) from error
