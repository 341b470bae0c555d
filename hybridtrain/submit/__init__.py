"""`hybridtrain submit`: check on the login node, create the run directory, write the job
script, queue it in Slurm.

hybridtrain submit experiment=... cluster=gpu8 cluster.nodes=4 key=value ...
    [--dry-run] [--multirun optim.lr=1e-3,3e-4]
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from hybridtrain.config import compose, schema
from hybridtrain.config.schema import SubmitRoot
from hybridtrain.data.prepare import embedded
from hybridtrain.errors import refusal
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import notation, rules
from hybridtrain.run import identity
from hybridtrain.runtime import log
from hybridtrain.runtime.files import unwritable, write_atomically
from hybridtrain.submit import conflicts, create, script, slurm

_log = log.get("submit")


def run(config: SubmitRoot) -> int:
    """Submit one run."""
    return run_several([config])


def run_several(configs: list[SubmitRoot]) -> int:
    """Submit a run, or several as one job array (raises UserError)."""
    cluster, first = configs[0].cluster, configs[0]
    world = cluster.nodes * script.ranks_per_node(cluster)
    _check_plugins(configs)
    slurm.check_nodes(cluster.nodes, partition=cluster.partition)
    trainings = [_training(config) for config in configs]
    missing = [config.data.path for config in configs if embedded.missing(config.data)]
    if cluster.dry_run and missing:
        problem = "the corpus is not there yet, and a dry run does not prepare it"
        raise refusal(
            "data.path",
            missing[0],
            problem,
            allowed="a prepared corpus",
            instead="hybridtrain prepare with the same experiment= and data.path=",
        )
    for training in trainings:
        _check_processes(training.parallel, cluster)
    # Without secrets: squeue shows names to all users.
    names = [compose.public(training)["run"]["name"] for training in trainings]
    settings: dict[str, Any] = {
        "name": names[0],
        "work_dir": Path.cwd(),
        "python": cluster.python or sys.executable,
    }
    settings |= {"stop_signal": first.run.stop_signal, "plugins": first.run.plugins}
    if missing:  # do not prepare a corpus for a job that Slurm would refuse
        folders = [Path(config.run.dir).resolve() for config in configs]
        _test_only(script.render(cluster, folder=_folder(folders, name=names[0]), runs=folders, **settings))
    jobs = [create.resolve_job(training, world_size=world) for training in trainings]
    choices = [conflicts.check(resolved) for resolved in jobs]
    summary = [
        f"{name}: {notation.write(training.parallel, job.layout)} on {rules.processes(world)}"
        for name, training, job in zip(names, trainings, jobs, strict=True)
    ]
    planned = [choice.path.resolve() for choice in choices]
    text = script.render(cluster, folder=_folder(planned, name=names[0]), runs=planned, **settings)
    if cluster.dry_run:
        return _dry_run(text, [*map(_run_line, configs, choices), *summary])
    for line in summary:
        _log.info("%s", line)
    _test_only(text)
    runs = [create.create_run(job.config).path.resolve() for job in jobs]
    folder = _folder(runs, name=names[0])
    if runs != planned:  # another command took this directory meanwhile, so the run has the next number
        text = script.render(cluster, folder=folder, runs=runs, **settings)
    job = _queue(text, folder=folder, runs=runs)
    _log.info("submitted job %s%s", job, f", an array of {len(runs)}" if len(runs) > 1 else "")
    for path in runs:
        _log.info("run       %s", path)
    _log.info("next      hybridtrain runs; hybridtrain logs %s; scancel %s", runs[0], job)
    return 0


def _check_plugins(configs: list[SubmitRoot]) -> None:
    plugins = configs[0].run.plugins
    if other := next((config.run.plugins for config in configs if config.run.plugins != plugins), None):
        problem = f"another run of the array has {plugins}"
        raise refusal(
            "run.plugins",
            other,
            problem,
            allowed="the same modules in all runs of an array",
            instead="run.plugins with the modules of all",
        )


def _run_line(config: SubmitRoot, choice: identity.Choice) -> str:
    """The directory of a run, and why it is not run.dir where it is not."""
    return f"run       {choice.path.resolve()}" + (
        f"; {config.run.dir} holds another run ({choice.differing})" if choice.differing else ""
    )


def _folder(runs: list[Path], *, name: str) -> Path:
    """Folder of the job script: in the run; for an array a folder of its own, since a queued array may
    still read its folder.
    """
    if len(runs) == 1:
        return runs[0] / "submit"
    base = runs[0].parent / "arrays" / re.sub(r"[^\w.-]", "_", name)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not folder.exists() or _array_runs(folder) == script.run_list(runs):
            return folder
    raise AssertionError


def _array_runs(folder: Path) -> bytes:
    try:
        return (folder / script.RUNS).read_bytes()
    except OSError:
        return b""


def _queue(text: str, *, folder: Path, runs: list[Path]) -> str:
    """Write the script, queue it, and write the job's id into each run; returns the id."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(runs) > 1:
            write_atomically(folder / script.RUNS, script.run_list(runs))
        write_atomically(folder / "job.sbatch", script.encode(text))
    except OSError as error:
        raise unwritable("run.dir", folder, error) from error
    job = slurm.sbatch(folder / "job.sbatch", test_only=False)
    try:
        for number, path in enumerate(runs):
            write_atomically(
                path / "submit" / "job_id", (job if len(runs) == 1 else f"{job}_{number}") + "\n"
            )
    except OSError as error:  # the job is queued nevertheless; it records itself when it starts
        _log.warning(
            "job %s is queued, but its id cannot be written into the run (%s)", job, error.strerror or error
        )
    return job


def _check_processes(parallel: schema.ParallelConfig, cluster: schema.ClusterConfig) -> None:
    """Refuse parallel degrees whose product is not the number of processes (raises UserError
    that names cluster options).
    """
    per_node, degrees = script.ranks_per_node(cluster), [getattr(parallel, axis) for axis in layouts.AXES]
    if any(degree < 1 and degree != -1 for degree in degrees) or degrees.count(-1) > 1:
        return  # `layout.resolve` refuses those
    fixed, world = math.prod(degree for degree in degrees if degree != -1), cluster.nodes * per_node
    if world % fixed == 0 and (fixed == world or -1 in degrees):
        return
    product = " x ".join(
        f"{axis}={degree}" for axis, degree in zip(layouts.AXES, degrees, strict=True) if degree != 1
    )
    needs = f"{'a multiple of ' if -1 in degrees else ''}{rules.processes(fixed)}"
    problem = (
        f"these degrees take {needs}, "
        f"and {cluster.nodes} x {per_node} (cluster.nodes x ranks on each) are {world}"
    )
    nodes, rest = divmod(fixed, per_node)
    options = (
        [f"cluster.nodes={nodes}"]
        if nodes and not rest
        else [f"cluster.ranks_per_node={fixed // cluster.nodes}"]
        if fixed % cluster.nodes == 0
        else []
    )
    options += ["other degrees"] if -1 in degrees else ["parallel.dp_shard=-1", "parallel.dp_replicate=-1"]
    raise refusal(
        "parallel",
        product or "single",
        problem,
        allowed=f"degrees whose product is {world}",
        instead=", or ".join(options),
    )


def _training(config: SubmitRoot) -> schema.Config:
    return schema.Config(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(schema.Config)}
    )


def _dry_run(text: str, summary: list[str]) -> int:
    """Print the script, then what it trains and when Slurm would run it."""
    print(text, flush=True)
    answer = _test_only(text)
    for line in summary:
        _log.info("%s", line)
    _log.info("%s (nothing was queued)", answer or "Slurm would accept it")
    return 0


def _test_only(text: str) -> str:
    """Ask Slurm when it would run this script; queues nothing, leaves no file.

    Raises UserError if Slurm would refuse it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.sbatch"
        file.write_bytes(script.encode(text))
        return slurm.sbatch(file, test_only=True)
