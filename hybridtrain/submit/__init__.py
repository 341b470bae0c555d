"""`hybridtrain submit`: check on the login node, create the run directory, write the job script, queue it in Slurm.

hybridtrain submit experiment=... cluster=gpu8 cluster.nodes=4 key=value ...     [--dry-run] [--multirun optim.lr=1e-3,3e-4]
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
from hybridtrain.submit import free, mint, script, slurm

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
    absent = [config.data.path for config in configs if embedded.missing(config.data)]
    if cluster.dry_run and absent:
        problem = "the corpus is not there yet, and a dry run writes nothing"
        raise refusal("data.path", absent[0], problem, allowed="a prepared corpus", instead="hybridtrain prepare with the same experiment= and data.path=")
    for training in trainings:
        _check_processes(training.parallel, cluster)
    names = [compose.plain(training)["run"]["name"] for training in trainings]  # they stand in the queue, which everybody sees
    told: dict[str, Any] = {"name": names[0], "work_dir": Path.cwd(), "python": cluster.python or sys.executable}
    told |= {"stop_signal": first.run.stop_signal, "plugins": first.run.plugins}
    if absent:  # before a corpus is prepared for a job that Slurm would not take
        folders = [Path(config.run.dir).resolve() for config in configs]
        _tried(script.render(cluster, folder=_folder(folders, name=names[0]), runs=folders, **told))
    jobs = [mint.checked(training, world_size=world) for training in trainings]
    choices = [free.check(resolved) for resolved in jobs]
    described = [
        f"{name}: {notation.write(training.parallel, job.layout)} on {rules.processes(world)}"
        for name, training, job in zip(names, trainings, jobs, strict=True)
    ]
    planned = [choice.path.resolve() for choice in choices]
    text = script.render(cluster, folder=_folder(planned, name=names[0]), runs=planned, **told)
    if cluster.dry_run:
        return _show(text, [*map(_where, configs, choices), *described])
    for line in described:
        _log.info("%s", line)
    _tried(text)
    runs = [mint.mint(job.config).path.resolve() for job in jobs]
    folder = _folder(runs, name=names[0])
    if runs != planned:  # another run has been begun there meanwhile: this one got the next number
        text = script.render(cluster, folder=folder, runs=runs, **told)
    job = _queued(text, folder=folder, runs=runs)
    _log.info("submitted job %s%s", job, f", an array of {len(runs)}" if len(runs) > 1 else "")
    for path in runs:
        _log.info("run       %s", path)
    _log.info("next      hybridtrain runs; hybridtrain logs %s; scancel %s", runs[0], job)
    return 0


def _check_plugins(configs: list[SubmitRoot]) -> None:
    plugins = configs[0].run.plugins
    if other := next((config.run.plugins for config in configs if config.run.plugins != plugins), None):
        problem = f"another run of the array has {plugins}"
        raise refusal("run.plugins", other, problem, allowed="the same modules in all runs of an array", instead="run.plugins with the modules of all")


def _where(config: SubmitRoot, choice: identity.Choice) -> str:
    """The directory that a run would have, and why it is another than run.dir."""
    return f"run       {choice.path.resolve()}" + (f"; {config.run.dir} holds another run ({choice.others})" if choice.others else "")


def _folder(runs: list[Path], *, name: str) -> Path:
    """Where the script goes: into the run; for several into a folder of these runs alone, which a queued array of others may still read."""
    if len(runs) == 1:
        return runs[0] / "submit"
    base = runs[0].parent / "arrays" / re.sub(r"[^\w.-]", "_", name)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not folder.exists() or _listed(folder) == script.listed(runs):
            return folder
    raise AssertionError


def _listed(folder: Path) -> bytes:
    try:
        return (folder / script.RUNS).read_bytes()
    except OSError:
        return b""


def _queued(text: str, *, folder: Path, runs: list[Path]) -> str:
    """Write the script and hand it to Slurm; the job's id, which is noted in each run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(runs) > 1:
            write_atomically(folder / script.RUNS, script.listed(runs))
        write_atomically(folder / "job.sbatch", script.encoded(text))
    except OSError as error:
        raise unwritable("run.dir", folder, error) from error
    job = slurm.sbatch(folder / "job.sbatch", test_only=False)
    try:
        for number, path in enumerate(runs):
            write_atomically(path / "submit" / "job_id", (job if len(runs) == 1 else f"{job}_{number}") + "\n")
    except OSError as error:  # the job is queued all the same, and notes itself when it starts
        _log.warning("job %s is queued, but that cannot be noted in the run (%s)", job, error.strerror or error)
    return job


def _check_processes(parallel: schema.ParallelConfig, cluster: schema.ClusterConfig) -> None:
    """Refuse parallel degrees whose product is not the number of processes; the message names options of `cluster` (raises UserError)."""
    each, degrees = script.ranks_per_node(cluster), [getattr(parallel, axis) for axis in layouts.AXES]
    if any(degree < 1 and degree != -1 for degree in degrees) or degrees.count(-1) > 1:
        return  # `layout.resolve` says what is wrong with those
    fixed, world = math.prod(degree for degree in degrees if degree != -1), cluster.nodes * each
    if world % fixed == 0 and (fixed == world or -1 in degrees):
        return
    named = " x ".join(f"{axis}={degree}" for axis, degree in zip(layouts.AXES, degrees, strict=True) if degree != 1)
    problem = f"these degrees take {'a multiple of ' if -1 in degrees else ''}{rules.processes(fixed)}, and {cluster.nodes} x {each} (cluster.nodes x ranks on each) are {world}"
    nodes, rest = divmod(fixed, each)
    fitting = [f"cluster.nodes={nodes}"] if nodes and not rest else [f"cluster.ranks_per_node={fixed // cluster.nodes}"] if fixed % cluster.nodes == 0 else []
    fitting += ["other degrees"] if -1 in degrees else ["parallel.dp_shard=-1", "parallel.dp_replicate=-1"]
    raise refusal("parallel", named or "single", problem, allowed=f"degrees whose product is {world}", instead=", or ".join(fitting))


def _training(config: SubmitRoot) -> schema.Config:
    return schema.Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(schema.Config)})


def _show(text: str, described: list[str]) -> int:
    """Print the script, and after it what matters: what it trains, and when Slurm would run it."""
    print(text, flush=True)
    answer = _tried(text)
    for line in described:
        _log.info("%s", line)
    _log.info("%s (nothing was queued)", answer or "Slurm would take it")
    return 0


def _tried(text: str) -> str:
    """When Slurm would run this script (raises UserError if it would not). Nothing is queued, and nothing is left behind."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.sbatch"
        file.write_bytes(script.encoded(text))
        return slurm.sbatch(file, test_only=True)
