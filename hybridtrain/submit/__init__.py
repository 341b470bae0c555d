"""`hybridtrain submit`: check on the login node, mint the run's directory, render the job, hand it to Slurm.

hybridtrain submit experiment=... cluster=gpu8 cluster.nodes=4 key=value ...     [--dry-run] [--multirun optim.lr=1e-3,3e-4]
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from hybridtrain import layout as layouts
from hybridtrain import log
from hybridtrain.config import schema
from hybridtrain.config.schema import SubmitRoot
from hybridtrain.data import embedded
from hybridtrain.files import write_atomically
from hybridtrain.submit import mint, script, slurm
from hybridtrain.types import refusal

_log = log.get("submit")


def run(config: SubmitRoot) -> int:
    """Submit one run."""
    return run_several([config])


def run_several(configs: list[SubmitRoot]) -> int:
    """Submit a run, or several as one job array (raises UserError)."""
    cluster, first = configs[0].cluster, configs[0]
    world = cluster.nodes * script.ranks_per_node(cluster)
    slurm.check_nodes(cluster.nodes, partition=cluster.partition)
    trainings = [_training(config) for config in configs]
    absent = [config.data.path for config in configs if embedded.missing(config.data)]
    if cluster.dry_run and absent:
        problem = "the corpus is not there yet, and a dry run writes nothing"
        raise refusal("data.path", absent[0], problem, allowed="a prepared corpus", instead="hybridtrain prepare with the same experiment= and data.path=")
    jobs = [mint.checked(training, world_size=world) for training in trainings]
    described = [f"{config.run.name}: {layouts.write(config.parallel, job.layout)} on {world} processes" for config, job in zip(configs, jobs, strict=True)]
    for line in described:
        _log.info("%s", line)
    planned = [Path(config.run.dir).resolve() for config in configs]
    folder = planned[0] / "submit" if len(configs) == 1 else planned[0].with_name(f"{first.run.name}-array") / "submit"
    told: dict[str, Any] = {"name": first.run.name, "work_dir": Path.cwd(), "python": cluster.python or sys.executable, "stop_signal": first.run.stop_signal}
    text = script.render(cluster, folder=folder, runs=planned, **told)
    if cluster.dry_run:
        return _show(text)
    _tried(text)
    runs = [mint.mint(job.config).path.resolve() for job in jobs]
    if runs != planned:  # a directory of another run: this one got the next number
        folder = runs[0] / "submit" if len(configs) == 1 else folder
        text = script.render(cluster, folder=folder, runs=runs, **told)
    folder.mkdir(parents=True, exist_ok=True)
    if len(runs) > 1:
        write_atomically(folder / "runs.txt", "".join(f"{path}\n" for path in runs))
    write_atomically(folder / "job.sbatch", text)
    job = slurm.sbatch(folder / "job.sbatch", test_only=False)
    for number, path in enumerate(runs):
        (path / "submit").mkdir(exist_ok=True)
        write_atomically(path / "submit" / "job_id", (job if len(runs) == 1 else f"{job}_{number}") + "\n")
    _log.info("submitted job %s%s", job, f", an array of {len(runs)}" if len(runs) > 1 else "")
    for path in runs:
        _log.info("run       %s", path)
    _log.info("next      hybridtrain runs; hybridtrain logs %s; scancel %s", runs[0], job)
    return 0


def _training(config: SubmitRoot) -> schema.Config:
    return schema.Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(schema.Config)})


def _show(text: str) -> int:
    """Print the script, and when Slurm would run it."""
    print(text)
    _log.info("%s", _tried(text))
    return 0


def _tried(text: str) -> str:
    """When Slurm would run this script (raises UserError if it would not). Nothing is queued, and nothing is left behind."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.sbatch"
        file.write_text(text)
        return slurm.sbatch(file, test_only=True)
