"""What happens around a step: evaluate, log, checkpoint, profile. Each hook has an `every` and sees each step's `Moment`.

Order matters: evaluation first, so that its loss stands on the same line; the checkpoint last, so that the line of its step
is on disk before it.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from hybridtrain.checkpoint.manager import Manager
from hybridtrain.run.directory import RunDir
from hybridtrain.run.trackers import Trackers
from hybridtrain.runtime import log
from hybridtrain.training import metrics
from hybridtrain.types import Batch, Engine, Progress, Saving, StepResult

_log = log.get("train")

_MEMORY_EVENTS = 1_000_000
SAVED = "saved"
"""Raised by a rank on which the save under way has ended."""


@dataclass
class Moment:
    """A step that has just ended."""

    step: int
    """Optimizer steps done, this one included."""
    last: bool
    stopping: bool
    """The run ends after this step, though not at its end."""
    tokens_seen: int
    lr: float
    result: StepResult
    flags: Mapping[str, int]
    """How many ranks have raised each flag (runtime/flags.py), the same on every rank."""
    extra: dict[str, float] = field(default_factory=dict)
    """What earlier hooks add to this step's line."""
    row: dict[str, Any] | None = None
    """This step's line, once it is logged; the same on all ranks but for the rates."""


class Hook(Protocol):
    def __call__(self, moment: Moment) -> None: ...

    def close(self) -> None:
        """Finish what is under way. Not called when training failed."""


class Evaluate:
    """Loss on held-out rows, every so many steps and at the end."""

    def __init__(self, engine: Engine, *, every: int, steps: Sequence[Sequence[Batch]], meter: metrics.Meter):
        self.engine, self.every, self.steps, self.meter = engine, every, steps, meter

    def __call__(self, moment: Moment) -> None:
        if self.every and (moment.last or moment.step % self.every == 0):
            with self.meter.paused():
                results = [self.engine.eval_step(batches) for batches in self.steps]
            moment.extra.update(self.engine.task.evaluate(functools.reduce(operator.add, results)))

    def close(self) -> None:
        return


class Log:
    """metrics.jsonl, the trackers and the progress line, on rank 0; the first step and the last one always."""

    def __init__(self, run: RunDir, *, every: int, total_steps: int, meter: metrics.Meter, trackers: Trackers, device: torch.device):
        self.run, self.every, self.total_steps = run, every, total_steps
        self.meter, self.trackers, self.device = meter, trackers, device
        self.since: torch.Tensor | None = None
        """Since the last line, added up on the device in fp64: loss of all valid tokens, these tokens, updates skipped, steps without targets."""

    def __call__(self, moment: Moment) -> None:
        result = moment.result
        loss = torch.where(result.tokens > 0, result.loss * result.tokens.double(), 0.0)  # of no tokens the mean is NaN
        new = torch.stack([loss, *(number.double() for number in (result.tokens, result.skipped, result.empty))])
        self.since = new if self.since is None else self.since + new
        if not (moment.last or moment.stopping or moment.extra or moment.step == 1 or moment.step % self.every == 0):
            return
        memory = metrics.max_over_ranks(metrics.max_memory_gib(self.device))
        allocator = {key: metrics.max_over_ranks(value) for key, value in metrics.allocator(self.device).items()}
        since, self.since = self.since, None
        row: dict[str, Any] = metrics.record(
            result, since=since, step=moment.step, tokens_seen=moment.tokens_seen, lr=moment.lr, meter=self.meter, memory_gib=memory
        )
        row |= moment.extra | allocator
        moment.row = row
        if dist.get_rank() == 0:
            self.run.append_metrics(row)
            if row["skipped"]:
                scale = "" if row["loss_scale"] is None else f"; loss scale {row['loss_scale']:,.15g}"
                updates = "1 update" if row["skipped"] == 1 else f"{row['skipped']} updates"
                self.run.append_event("skipped", step=moment.step, detail=f"{updates} skipped since the last line{scale}")
            if empty := row.get("steps_without_targets"):
                steps = "1 step" if empty == 1 else f"{empty} steps"
                self.run.append_event("empty", step=moment.step, detail=f"{steps} without a single target since the last line; no update was made in them")
            self.trackers.log(row, moment.step)
            known = {} if row["loss"] is None and row.get("steps_without_targets") else {"final_loss": row["loss"]}
            self.run.update_summary(steps=moment.step, tokens=moment.tokens_seen, tokens_per_s=row["tokens_per_s"], **known)
            _log.info(metrics.progress_line(row, total_steps=self.total_steps, eta_s=self.meter.eta_s))

    def close(self) -> None:
        return  # trackers are finished when the last checkpoint is complete, too


class Checkpoint:
    """Saves when due, while training goes on; a failed save ends the run on every rank at the same step."""

    def __init__(
        self,
        engine: Engine,
        *,
        run: RunDir,
        manager: Manager,
        fingerprints: dict[str, str],
        meter: metrics.Meter,
        saved: Callable[[Path], None],
    ):
        """`saved`: called on every rank with a checkpoint that is complete."""
        self.engine, self.run, self.manager, self.fingerprints, self.meter = engine, run, manager, fingerprints, meter
        self.on_saved = saved
        self.saving: Saving | None = None
        self.saved = 0
        """The step of the save under way, or of the last one."""
        self._pruning: threading.Thread | None = None

    def __call__(self, moment: Moment) -> None:
        if self.saving is not None:
            self._poll(moment)
        if self.manager.due(moment.step, last=moment.last or moment.stopping):
            with self.meter.paused():
                self._wait()
                self.run.check()
                progress = Progress(moment.step, moment.tokens_seen, self.fingerprints)
                self.saving, self.saved = self.engine.save(self.manager.path(moment.step), progress), moment.step

    def close(self) -> None:
        self._wait()
        self._pruned()

    def _poll(self, moment: Moment) -> None:
        """See whether the save under way has ended on all ranks; if it failed, they raise its error together."""
        assert self.saving is not None
        if moment.flags.get(SAVED) == dist.get_world_size():
            self._wait()
            return
        with contextlib.suppress(Exception):
            if not self.saving.poll():
                return
        self.engine.flags.raised.add(SAVED)

    def _wait(self) -> None:
        if self.saving is not None:
            saving, self.saving = self.saving, None
            self.engine.flags.forget(SAVED)
            saving.result()
            if dist.get_rank() == 0:
                self.run.append_event("checkpoint", step=self.saved, detail=self.manager.path(self.saved).name)
                self._pruned()
                self._pruning = threading.Thread(target=self.manager.prune, name="prune", daemon=True)  # removing thousands of files takes its time
                self._pruning.start()
            self.on_saved(self.manager.path(self.saved))

    def _pruned(self) -> None:
        """Wait for the removal under way."""
        if self._pruning:
            self._pruning.join()


class Profile:
    """A torch profiler trace of steps 3 to 5 of this command, and on a GPU what the allocator did until then (for pytorch.org/memory_viz), of this rank."""

    def __init__(self, folder: Path, *, device: torch.device):
        self.folder, self.gpu = folder, device.type == "cuda"
        if self.gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self.profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1), on_trace_ready=self._write)
        self.profiler.start()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank-{log.rank()}-steps-3-5.json"))
        if self.gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank-{log.rank()}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def __call__(self, moment: Moment) -> None:  # noqa: ARG002 - a hook sees each step
        self.profiler.step()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # fewer than five steps: there is no trace to write
            self.profiler.stop()
