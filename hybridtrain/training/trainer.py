"""The door of training: checked config -> layout -> run directory -> engine -> loop.

    hybridtrain train --nproc N experiment=... key=value ...
    torchrun --standalone --nproc-per-node N -m hybridtrain.train experiment=... key=value ...

Everything that can be refused without torch and without the other processes is refused in `resolve`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import engine as engines
from hybridtrain.config import compose
from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.runtime import host, launch, log
from hybridtrain.runtime.files import unwritable, write_json
from hybridtrain.training import introduction, outcome, resume
from hybridtrain.training.job import Job, resolve
from hybridtrain.types import IGNORE_INDEX, Batch, Progress

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from hybridtrain.run.directory import RunDir
    from hybridtrain.run.trackers import Trackers
    from hybridtrain.runtime.stop import Stop
    from hybridtrain.runtime.watchdog import Watchdog
    from hybridtrain.training.loop import Done


def run(config: Config) -> int:
    """`hybridtrain train`."""
    began = time.monotonic()
    launch.use_expandable_segments()
    job = resolve(config, world_size=launch.world_size(), here=True)
    run_dir = None
    if not launch.several():  # a process alone: refused before torch is imported
        run_dir = _opened(job)
        if run_dir is None:
            return 0
    return _on_all_ranks(job, run_dir=run_dir, began=began)


def _opened(job: Job) -> RunDir | None:
    """Rank 0: what only it looks at, and then the run directory; None: nothing is left to do."""
    config = job.config
    if config.run.resume != "required" and not (Path(config.run.dir) / "config.yaml").is_file():
        from hybridtrain.models.build import check as check_model

        check_model(config)  # a new run: what transformers refuses leaves no folder behind
    return resume.open_run(job)


def _on_all_ranks(job: Job, *, run_dir: RunDir | None, began: float) -> int:
    """Meet, agree, train, and note how it ended. `run_dir`: of a process alone; else rank 0 opens it once all are there."""
    import torch

    from hybridtrain.parallel import mesh
    from hybridtrain.run.trackers import Trackers
    from hybridtrain.runtime.stop import Stop
    from hybridtrain.runtime.watchdog import Watchdog
    from hybridtrain.training import agreement
    from hybridtrain.training.loop import Done

    config, device, done, trackers, watchdog = job.config, mesh.device(), Done(0), Trackers(), None
    try:
        mesh.connect(device, timeout_s=config.engine.timeout_s)
        agreement.agree(config, fingerprints=job.fingerprints)
        if run_dir is None:
            run_dir = mesh.on_rank0(lambda: _opened(job), group=None)  # a start that does not come about leaves no trace
        if run_dir is None:
            mesh.disconnect()
            return 0
        done.step = run_dir.step
        opened = run_dir
        stacks = run_dir.failures / f"rank-{log.rank()}.stacks"
        watchdog = Watchdog(stacks, limit_s=config.train.max_step_s, hung=lambda: outcome.record_hang(opened, world_size=job.layout.world_size, step=done.step))
        log.setup(run_dir.logs)
        torch.manual_seed(config.run.seed)
        with Stop([config.run.stop_signal, "TERM", "INT"], before_s=config.run.stop_before_s) as stop:
            build = engines.build_for_load if run_dir.checkpoint else engines.build
            engine = build(resume.source_at_hand(config), layout=job.layout, plan=job.plan, device=device)
            world: dict[str, Any] = {"engine": engine, "device": device, "stop": stop, "watchdog": watchdog, "done": done, "trackers": trackers}
            _train(job, run_dir=run_dir, fingerprints=job.fingerprints, began=began, **world)
    except BaseException as error:
        if run_dir is not None:
            outcome.record_failure(error, run_dir=run_dir, world_size=job.layout.world_size, began=began, step=done.step)
            trackers.finish(failed=True)
        raise
    finally:
        if watchdog:
            watchdog.close()
        if run_dir is not None:
            run_dir.close()
    engine.close()
    mesh.disconnect()
    return 0


def _train(
    job: Job,
    *,
    engine: Any,
    run_dir: RunDir,
    fingerprints: dict[str, str],
    device: torch.device,
    began: float,
    stop: Stop,
    watchdog: Watchdog,
    done: Done,
    trackers: Trackers,
) -> None:
    from hybridtrain.checkpoint.manager import Manager
    from hybridtrain.data.loader import Loader, eval_batches
    from hybridtrain.models.build import save_config
    from hybridtrain.run.directory import write_machine
    from hybridtrain.training import hooks, loop, metrics

    config, plan, mesh = job.config, job.plan, engine.mesh
    manager = Manager(run_dir.checkpoints, settings=config.checkpoint)
    start = engine.load(run_dir.checkpoint) if run_dir.checkpoint else Progress(0, 0, {})
    hosts = host.gather(device, group=mesh.control_group)
    if log.rank() == 0:
        try:
            save_config(engine.model_config, run_dir.model, model=config.model)
            if config.engine.kind == "deepspeed":
                write_json(run_dir.path / "deepspeed.json", compose.shown(engine.settings))
        except OSError as error:
            raise unwritable("run.dir", run_dir.path, error) from error
        write_machine(run_dir.path, hosts)
        run_dir.update_summary(tokens=start.tokens_seen)
        trackers.start(config.tracker.kinds, config=compose.plain(config), folder=run_dir.path / "trackers", first_step=start.step)
        introduction.introduce(job, run_dir=run_dir, engine=engine, start=start)
    share = {"plan": plan, "dp_rank": mesh.dp_rank, "dp_size": job.layout.dp, "vocab": job.facts.vocab}
    loader = Loader(job.data, **share, seed=config.run.seed)
    meter = metrics.Meter(
        first_step=start.step,
        total_steps=job.total_steps,
        tokens_per_step=plan.tokens,
        devices=job.layout.world_size,
        flops_per_token=metrics.flops_per_token(job.facts, seq_len=plan.seq_len),
        peak=metrics.peak_flops(device, dtype=engine.precision.compute),
    )
    group = stop.group = mesh.control_group
    chosen: list[hooks.Hook] = []
    if config.train.eval_every:
        steps = eval_batches(job.data, **share, rows=config.train.eval_rows, micro_batches_per_step=plan.grad_accum)
        chosen.append(hooks.Evaluate(engine, every=config.train.eval_every, steps=_with_targets(steps, job=job, group=group), meter=meter))
    chosen.append(hooks.Log(run_dir, every=config.train.log_every, total_steps=job.total_steps, meter=meter, trackers=trackers, device=device, group=group))
    chosen.append(hooks.Checkpoint(engine, run=run_dir, manager=manager, fingerprints=fingerprints, group=group, meter=meter))
    if config.run.profile and log.rank() == 0:
        chosen.append(hooks.Profile(run_dir.path / "profile"))
    end = loop.train(
        engine, config=config, loader=loader, plan=plan, start=start, total_steps=job.total_steps, hooks=chosen, stop=stop, watchdog=watchdog, done=done
    )
    trackers.finish(failed=False)
    if log.rank() == 0:
        status, why = ("finished", "reached the end") if end.step >= job.total_steps else (stop.status, stop.reason)
        outcome.record_end(end, status=status, why=why, run_dir=run_dir, seconds=time.monotonic() - began)


def _with_targets(steps: list[list[Batch]], *, job: Job, group: dist.ProcessGroup) -> list[list[Batch]]:
    """The batches of an evaluation, refused without a token to measure: its loss would be a mean over nothing (collective)."""
    from hybridtrain.parallel.mesh import any_rank

    mine = any(bool((batch.labels_BT != IGNORE_INDEX).any()) for batches in steps for batch in batches)
    (there,) = any_rank([mine], group=group)
    if not there:
        problem = f"none of the held-out rows of {job.data.name} has a token that carries loss"
        instead = "train.eval_every=0, more train.eval_rows, or a longer data.seq_len in prepare"
        raise refusal("train.eval_rows", job.config.train.eval_rows, problem, allowed="held-out rows with answers", instead=instead)
    return steps
