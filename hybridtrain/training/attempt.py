"""One attempt of a run, on all ranks: loads the checkpoint, runs the training loop, and records the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch

from hybridtrain.checkpoint import tokenizer
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config import compose
from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.errors import refusal
from hybridtrain.models.saved_config import save_config
from hybridtrain.parallel.mesh import any_rank
from hybridtrain.parallel.monitor import Monitor
from hybridtrain.plan import flops
from hybridtrain.precision.rules import has_loss_scale
from hybridtrain.run.directory import RunDir
from hybridtrain.run.record import write_machine
from hybridtrain.run.trackers import Trackers
from hybridtrain.runtime import host, log
from hybridtrain.runtime.files import unwritable, write_json
from hybridtrain.runtime.stop import Stop
from hybridtrain.runtime.watchdog import Watchdog
from hybridtrain.tasks.task import Task
from hybridtrain.training import builtin, callbacks, loop, metrics, outcome, startup_log
from hybridtrain.training.adapting import Adapt
from hybridtrain.training.callbacks import Callback
from hybridtrain.training.job import Job
from hybridtrain.training.numerics import Numerics, monitor_of
from hybridtrain.training.recovery import Recovery
from hybridtrain.training.replicas import Guard
from hybridtrain.training.samples import Samples
from hybridtrain.training.scale_events import ScaleEvents
from hybridtrain.types import Batch, Progress


def train(
    job: Job,
    *,
    engine: Any,
    run_dir: RunDir,
    device: torch.device,
    start_s: float,
    stop: Stop,
    watchdog: Watchdog,
    counter: loop.StepCounter,
    trackers: Trackers,
    of_user: Sequence[Callback],
) -> tuple[Progress, str]:
    """Train to the end of the run or until `stop` is requested (collective).

    Returns the progress and the status. `start_s`: time.monotonic() at the start of the command.
    `of_user`: the user's callbacks.
    """
    config = job.config
    start = engine.load(run_dir.checkpoint) if run_dir.checkpoint else Progress(0, 0, {})
    hosts = host.gather(device)
    if log.rank() == 0:
        _record_start(job, run_dir=run_dir, engine=engine, start=start, hosts=hosts, trackers=trackers)
    loader = Loader(job.data, **_batch_options(job, engine=engine), seed=config.run.seed)
    meter = _meter(job, engine=engine, device=device, first_step=start.step)
    run = callbacks.Run(config, run_dir.path, engine, job.total_steps, start.step, start.tokens_seen, stop)
    run.loaded, run.beat = start.states, watchdog.beat
    calls = callbacks.Callbacks(run, beat=watchdog.beat)
    monitor = _add_monitor(calls, config.precision, engine=engine, run_dir=run_dir, trackers=trackers)
    saver = _add_callbacks(
        calls, job, engine=engine, run_dir=run_dir, meter=meter, trackers=trackers, of_user=of_user
    )
    recovery = Recovery(
        job, engine=engine, start=start, loader=loader, folder=run_dir, saver=saver, callbacks=calls
    )
    with calls:
        end = loop.train(
            engine,
            config=config,
            loader=loader,
            plan=job.plan,
            start=start,
            total_steps=job.total_steps,
            callbacks=calls,
            sampling=monitor.sampling if monitor else _nothing,
            recovery=recovery,
            stop=stop,
            watchdog=watchdog,
            counter=counter,
        )
    trackers.finish(failed=False)
    finished = end.step >= job.total_steps
    status, reason = ("finished", "reached the end") if finished else (stop.status, stop.reason)
    if log.rank() == 0:
        outcome.record_end(
            end, status=status, reason=reason, run_dir=run_dir, seconds=time.monotonic() - start_s
        )
    return end, status


def _add_monitor(
    calls: callbacks.Callbacks, settings: PrecisionConfig, *, engine: Any, run_dir: RunDir, trackers: Trackers
) -> Monitor | None:
    """The numerics monitor, if the config asks for it, with the callbacks that read it (collective)."""
    monitor = monitor_of(engine, settings)
    if monitor is not None:
        calls.add(Numerics(monitor, folder=run_dir, trackers=trackers), of_user=False)
        if (controller := engine.adaptive) is not None:
            calls.add(Adapt(controller, engine=engine, monitor=monitor, folder=run_dir), of_user=False)
    return monitor


def _formats(job: Job, engine: Any) -> dict[str, Any]:
    """The formats of linear layers, as a small state of a checkpoint; empty without any."""
    rows = [dataclasses.asdict(row) for row in startup_log.formats(job, engine=engine)]
    rounded = startup_log.rounded(job, engine=engine)
    state = {"version": 1, "formats": rows, **({"rounded": rounded} if rounded else {})}
    return state if rows else {}


def _base(job: Job) -> dict[str, Any]:
    """The model that adapters belong to, as a small state of a checkpoint; empty without adapters."""
    model = job.config.model
    if job.config.adapters.kind == "none":
        return {}
    name = compose.public_value(model.from_pretrained)
    return {"version": 1, "model": name, "revision": model.revision, "hash": job.fingerprints["base"]}


def _nothing(step: int) -> contextlib.AbstractContextManager[None]:  # noqa: ARG001
    """No step is sampled."""
    return contextlib.nullcontext()


def _record_start(
    job: Job,
    *,
    run_dir: RunDir,
    engine: Any,
    start: Progress,
    hosts: list[dict[str, Any]],
    trackers: Trackers,
) -> None:
    """Write the files of the run directory, start the trackers, and log the start; on rank 0
    before the first step.
    """
    config = job.config
    try:
        save_config(engine.model_config, run_dir.model, model=config.model)
        tokenizer.keep(config, run=run_dir.path, fingerprint=job.fingerprints["data"])
        if config.engine.kind == "deepspeed":
            write_json(run_dir.path / "deepspeed.json", compose.public_value(engine.settings))
    except OSError as error:
        raise unwritable("run.dir", run_dir.path, error) from error
    write_machine(run_dir.path, hosts)
    run_dir.update_summary(tokens=start.tokens_seen)
    trackers.start(
        config.tracker.kinds,
        config=compose.public(config),
        folder=run_dir.path / "trackers",
        first_step=start.step,
    )
    startup_log.write(job, run_dir=run_dir, engine=engine, start=start)


def _batch_options(job: Job, *, engine: Any) -> dict[str, Any]:
    """Arguments common to the loaders of training and evaluation: which rows this rank reads, and
    how they are batched.
    """
    return {
        "plan": job.plan,
        "dp_rank": engine.mesh.dp_rank,
        "dp_size": job.layout.dp,
        "vocab": job.facts.vocab,
        "collate": engine.task.collate,
    }


def _meter(job: Job, *, engine: Any, device: torch.device, first_step: int) -> metrics.Meter:
    return metrics.Meter(
        first_step=first_step,
        total_steps=job.total_steps,
        plan=job.plan,
        devices=job.layout.world_size,
        flops_per_token=lambda length: flops.flops_per_token(job.facts, seq_len=length),
        peak=metrics.peak_flops(device, dtype=engine.precision.compute),
    )


def _add_callbacks(
    calls: callbacks.Callbacks,
    job: Job,
    *,
    engine: Any,
    run_dir: RunDir,
    meter: metrics.Meter,
    trackers: Trackers,
    of_user: Sequence[Callback],
) -> builtin.Checkpoint:
    """Add the callbacks of every run and those of the user, in the order of builtin.py; returns the one that
    saves.
    """
    config, device = job.config, engine.device
    if every := config.train.guard_every:
        calls.add(Guard(engine, every=every, mesh=engine.mesh), of_user=False)
    if every := config.train.eval_every:
        rows, micro_batches = config.train.eval_rows, job.plan.grad_accum
        steps = eval_batches(
            job.data, **_batch_options(job, engine=engine), rows=rows, micro_batches_per_step=micro_batches
        )
        _check_targets(steps, job=job, task=engine.task)
        calls.add(builtin.Evaluate(engine, every=every, steps=steps, meter=meter), of_user=False)
    every = config.train.log_every
    calls.add(
        builtin.Log(run_dir, every=every, task=engine.task, meter=meter, trackers=trackers, device=device),
        of_user=False,
    )
    if config.train.samples:
        calls.add(Samples(job, engine=engine, folder=run_dir, meter=meter), of_user=False)
    if has_loss_scale(config.precision):
        calls.add(ScaleEvents(run_dir), of_user=False)
    calls.add(*of_user, of_user=True)
    if of_user and job.layout.world_size > 1:
        calls.add(builtin.Barrier(engine.mesh.all_ranks(name="callbacks")), of_user=False)
    calls.run.states["formats"] = functools.cache(functools.partial(_formats, job, engine))
    calls.run.states["base"] = functools.partial(_base, job)
    manager, fingerprints = Manager(run_dir.checkpoints, settings=config.checkpoint), job.fingerprints
    saver = builtin.Checkpoint(
        engine,
        folder=run_dir,
        manager=manager,
        fingerprints=fingerprints,
        meter=meter,
        on_saved=calls.after_checkpoint,
    )
    calls.add(saver, of_user=False)
    if config.run.profile and log.rank() in config.run.profile_ranks:
        calls.add(builtin.Profile(run_dir.path / "profile", device=device), of_user=False)
    return saver


def _check_targets(steps: list[list[Batch]], *, job: Job, task: Task) -> None:
    """Raise UserError if no token of an evaluation is a target, since its mean loss
    would be undefined (collective).
    """
    mine = any(bool(count) for batches in steps for batch in batches for count in task.counts(batch).values())
    (exist,) = any_rank([mine])
    if not exist:
        problem = f"none of the held-out rows of {job.data.name} has a token that carries loss"
        instead = "train.eval_every=0, more train.eval_rows, or a longer data.seq_len in prepare"
        raise refusal(
            "train.eval_rows",
            job.config.train.eval_rows,
            problem,
            allowed="held-out rows with answers",
            instead=instead,
        )
