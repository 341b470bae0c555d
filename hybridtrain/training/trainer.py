"""The door of training: checked config -> layout -> run directory -> engine -> loop.

    hybridtrain train --nproc N experiment=... key=value ...
    torchrun --standalone --nproc-per-node N -m hybridtrain.train experiment=... key=value ...

Everything that can be refused without torch and without the other processes is refused in `resolve`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import engine as engines
from hybridtrain.config import checks, compose
from hybridtrain.config.schema import Config
from hybridtrain.data import blend as blends
from hybridtrain.data import vocabulary
from hybridtrain.data.blend import Blend
from hybridtrain.errors import UserError, refusal
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import memory
from hybridtrain.plan.layout import BatchPlan, ParallelLayout
from hybridtrain.run import directory, identity
from hybridtrain.runtime import failure, host, launch, log
from hybridtrain.runtime.files import read_object, unwritable, write_json
from hybridtrain.training import resume
from hybridtrain.types import Batch, ModelFacts, Progress

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from hybridtrain.run.directory import RunDir
    from hybridtrain.run.trackers import Trackers
    from hybridtrain.runtime.stop import Stop
    from hybridtrain.runtime.watchdog import Watchdog
    from hybridtrain.tasks.task import Task
    from hybridtrain.training.loop import Done

_log = log.get("train")
_ENDS = ("steps", "tokens", "epochs")
_STACKS_S = 3.0
"""How long a rank that ran out of time waits for the stacks of the others."""
_OTHERS_S = 1.0
"""How long rank 0 waits for the reports of others: what it sees may follow from their failure."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, resolved against the world it runs in."""

    config: Config
    layout: ParallelLayout
    plan: BatchPlan
    facts: ModelFacts
    data: Blend
    total_steps: int

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint must have been made with. Reads a little of foreign token files: for rank 0, which tells the others."""
        model = identity.model_fingerprint(self.facts)
        order = blends.order_fingerprint(self.data, plan=self.plan, seed=self.config.run.seed)
        sample = self.data.sample
        return {"model": model, "data": self.data.fingerprint, "order": order} | ({} if sample is None else {"tokens": sample})


def resolve(config: Config, *, world_size: int, here: bool) -> Job:
    """Layout, batch plan, model facts and data of a config in a world of `world_size` processes; raises UserError for what does not fit. Imports no torch.

    `here`: it will run on this machine, whose memory is looked at, too.
    """
    settled = engines.settle(resume.source_at_hand(config), world_size=world_size)
    layout, plan, model = settled.layout, settled.plan, settled.facts
    if here:
        memory.check_host(config, layout=layout, plan=plan, facts=model)
    data = blends.open_data(config.data, timeout_s=config.engine.timeout_s)
    fitted = blends.with_vocabulary(config, data, vocab=model.vocab)
    if fitted is not config:
        config, settled = fitted, engines.settle(fitted, world_size=world_size)
        layout, plan, model = settled.layout, settled.plan, settled.facts
    blends.check_vocab(data, vocab=model.vocab)
    blends.check_train_rows(data, seq_len=plan.seq_len)
    if config.train.eval_every:
        blends.check_eval_rows(data, seq_len=plan.seq_len, field="train.eval_every", value=config.train.eval_every)
    total_steps = _total_steps(config, plan, rows=data.count("train", seq_len=plan.seq_len))
    checks.phases(config.schedule, steps=total_steps)
    return Job(config, layout, plan, model, data, total_steps)


def _total_steps(config: Config, plan: BatchPlan, *, rows: int) -> int:
    train = config.train
    if train.tokens:
        return max(1, math.ceil(train.tokens / plan.tokens))
    if train.epochs:
        return max(1, math.ceil(train.epochs * rows / plan.global_batch_size))
    return train.steps


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
        watchdog = Watchdog(stacks, limit_s=config.train.max_step_s, hung=lambda: _record_hang(opened, world_size=job.layout.world_size, step=done.step))
        log.setup(run_dir.logs)
        torch.manual_seed(config.run.seed)
        with Stop([config.run.stop_signal, "TERM", "INT"], before_s=config.run.stop_before_s) as stop:
            build = engines.build_for_load if run_dir.checkpoint else engines.build
            engine = build(resume.source_at_hand(config), layout=job.layout, plan=job.plan, device=device)
            world: dict[str, Any] = {"engine": engine, "device": device, "stop": stop, "watchdog": watchdog, "done": done, "trackers": trackers}
            _train(job, run_dir=run_dir, fingerprints=job.fingerprints, began=began, **world)
    except BaseException as error:
        if run_dir is not None:
            _record_failure(error, run_dir=run_dir, world_size=job.layout.world_size, began=began, step=done.step)
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


def _record_hang(run_dir: RunDir, *, world_size: int, step: int) -> None:
    """Of the ranks that have run out of time, the first that is able to writes down which rank the others waited for."""
    time.sleep(_STACKS_S)  # all run out of time at nearly the same moment
    if log.rank() != next(iter(failure.waited(run_dir.failures)), None):
        time.sleep(_STACKS_S)
        return
    first = failure.conclude(run_dir.failures, world_size=world_size)
    _log.error("first failure: %s", first)
    with contextlib.suppress(UserError, OSError):
        directory.record_failed(run_dir.path, reason=str(first), step=step)


def _record_failure(error: BaseException, *, run_dir: RunDir, world_size: int, began: float, step: int) -> None:
    """This rank's report; on rank 0 the run's, which names the rank that failed first. A new run that did nothing but refuse leaves nothing."""
    refused = isinstance(error, UserError)
    nothing_done = refused and run_dir.created and step == run_dir.step
    if nothing_done and log.rank() != 0:
        time.sleep(_OTHERS_S)  # rank 0 refuses the same, as a rule, and has removed the directory by then
        if not (run_dir.path / "config.yaml").exists():
            return
    if nothing_done and log.rank() == 0:
        run_dir.undo()
        return
    failure.record(run_dir.failures, rank=log.rank(), step=step, error=error)
    if not refused:
        _log.error("ended by %s: %s", type(error).__name__, error)
    if log.rank() != 0:
        return
    interrupted = isinstance(error, KeyboardInterrupt)
    time.sleep(0.0 if refused or interrupted else _OTHERS_S)
    first = None if interrupted else failure.conclude(run_dir.failures, world_size=world_size)
    reason = str(first) if first and first.rank else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if first and first.rank:
        _log.error("first failure: %s", first)
    status, reason = ("interrupted", "stopped by Ctrl-C while it started") if interrupted else ("failed", reason)
    with contextlib.suppress(UserError):  # on a full disk the reason for the end must not be lost over the summary
        run_dir.update_summary(status=status, exit_reason=reason, wall_s=time.monotonic() - began)
        run_dir.append_event(status, step=step, detail=reason)


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
        _introduce(job, run_dir=run_dir, engine=engine, start=start)
    share = {"plan": plan, "dp_rank": mesh.dp_rank, "dp_size": job.layout.dp, "vocab": job.facts.vocab, "collate": engine.task.collate}
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
        chosen.append(hooks.Evaluate(engine, every=config.train.eval_every, steps=_with_targets(steps, job=job, task=engine.task, group=group), meter=meter))
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
        _record_end(end, status=status, why=why, run_dir=run_dir, seconds=time.monotonic() - began)


def _record_end(end: Progress, *, status: str, why: str, run_dir: RunDir, seconds: float) -> None:
    """The run's last word, on rank 0."""
    from hybridtrain.training import metrics

    run_dir.update_summary(status=status, steps=end.step, tokens=end.tokens_seen, exit_reason=why, wall_s=seconds)
    run_dir.append_event(status, step=end.step, detail=why)
    again = "" if status == "finished" else f" ({why}); the same command goes on from there"
    words = "finished" if not again else "stopped after"
    _log.info("%s %d step%s in %s; run directory %s%s", words, end.step, "" if end.step == 1 else "s", metrics.duration(seconds), run_dir.path, again)


def _with_targets(steps: list[list[Batch]], *, job: Job, task: Task, group: dist.ProcessGroup) -> list[list[Batch]]:
    """The batches of an evaluation, refused without a token to measure: its loss would be a mean over nothing (collective)."""
    from hybridtrain.parallel.mesh import any_rank

    mine = any(bool(count) for batches in steps for batch in batches for count in task.counts(batch).values())
    (there,) = any_rank([mine], group=group)
    if not there:
        problem = f"none of the held-out rows of {job.data.name} has a token that carries loss"
        instead = "train.eval_every=0, more train.eval_rows, or a longer data.seq_len in prepare"
        raise refusal("train.eval_rows", job.config.train.eval_rows, problem, allowed="held-out rows with answers", instead=instead)
    return steps


def _introduce(job: Job, *, run_dir: RunDir, engine: Any, start: Progress) -> None:
    """What runs, in which precision, and what a resumed run goes on from: rank 0's first lines."""
    from hybridtrain.runtime import cpu

    config, layout, plan, precision = job.config, job.layout, job.plan, engine.precision
    public = compose.plain(config)
    name, source = public["model"]["name"] or job.facts.model_type, public["model"]["from_pretrained"] or "new weights"
    _log.info("model     %s, %s parameters (%s)", name, f"{job.facts.parameters:,}", source)
    world, device = layout.world_size, engine.device.type
    _log.info("layout    %s on %d %s process%s, %s", layouts.write(config.parallel, layout), world, device, "es" if world > 1 else "", config.engine.kind)
    _log.info(
        "batch     %d rows of %d = %d x %d data ranks x %d micro-batches; %d steps",
        plan.global_batch_size,
        plan.seq_len,
        plan.micro_batch_size,
        layout.dp,
        plan.grad_accum,
        job.total_steps,
    )
    short = {key: str(getattr(precision, key)).removeprefix("torch.") for key in ("param", "compute", "reduce")}
    _log.info(
        "precision %s: master weights and Adam moments %s, compute %s, gradients %s", config.precision.kind, short["param"], short["compute"], short["reduce"]
    )
    _log.info("backend   %s", cpu.describe(config.engine, device=engine.device))
    _log.info("run       %s", run_dir.path)
    for line in _of_tokenizer(job, model=run_dir.model):
        _log.info("tokenizer %s", line)
    if config.schedule.warmup_steps >= job.total_steps:
        _log.warning("schedule.warmup_steps=%d: the run ends before its warm-up does", config.schedule.warmup_steps)
    if run_dir.checkpoint and run_dir.checkpoint.parent != run_dir.checkpoints:
        _log.info("branched  from %s at step %d, %d tokens", run_dir.checkpoint, start.step, start.tokens_seen)
    elif run_dir.checkpoint:
        same = "model, data, optimizer, schedule, seed and batch are as they were"
        _log.info("resumed   %s at step %d, %d tokens; %s", run_dir.checkpoint.name, start.step, start.tokens_seen, same)
    elif run_dir.continued:
        _log.info("resumed   no complete checkpoint was there: from the beginning")
    for field, (before, now) in run_dir.changed.items():
        _log.info("changed   %s: %s -> %s", field, before, now)
    if start.step and config.schedule.kind != "constant" and any(field.startswith("train.") and field[6:] in _ENDS for field in run_dir.changed):
        _log.warning(
            "the %s schedule now ends at step %d: learning rates from here on are not those of the run that was interrupted",
            config.schedule.kind,
            job.total_steps,
        )


def _of_tokenizer(job: Job, *, model: Path) -> list[str]:
    """Where model, tokenizer and chat template disagree: on the tokens there are, and those that end a text. `model`: the run's folder of that name."""
    from hybridtrain.models import tokens

    facts = next((corpus.facts for corpus in job.data.corpora if corpus.facts is not None), None)
    if facts is None:
        return []
    text, turn = vocabulary.end_tokens(facts)
    config, generation = (read_object(model / name, field="run.dir") for name in ("config.json", tokens.GENERATION))
    ends = tokens.Ends(begin=None, end=text, pad=None, turn=turn)
    lines = tokens.fitted(config, generation, of_tokenizer=ends, new=not job.config.model.from_pretrained)[2]
    if facts["vocab_size"] > job.facts.vocab:
        lines.append(f"it has {facts['vocab_size']} tokens, the model {job.facts.vocab} rows: a text with one of the others cannot be given to the model")
    return lines
