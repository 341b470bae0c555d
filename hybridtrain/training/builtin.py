"""The callbacks that every run has: evaluate, log, checkpoint, profile.

Their order matters: evaluation first, so that its loss is on the same line; then the log; then the
user's callbacks; then the checkpoint, so that it contains what they change, and the line of its step is
on disk before it.
"""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridtrain.checkpoint.manager import Manager
from hybridtrain.errors import refusal
from hybridtrain.parallel.mesh import on_rank0
from hybridtrain.precision.numerics import Sample
from hybridtrain.run.directory import RunDir
from hybridtrain.run.trackers import Trackers
from hybridtrain.runtime import log
from hybridtrain.tasks.task import Task
from hybridtrain.training import metrics
from hybridtrain.training.callbacks import Callback, Run, StepInfo
from hybridtrain.types import Batch, Engine, Progress, Saving

_log = log.get("train")

_MEMORY_EVENTS = 1_000_000
SAVED = "saved"
"""Flag that a rank raises when its part of the current save has ended."""


class Evaluate(Callback):
    """Evaluates the loss on held-out rows, every `every` steps and at the end."""

    def __init__(self, engine: Engine, *, every: int, steps: Sequence[Sequence[Batch]], meter: metrics.Meter):
        self.engine, self.every, self.steps, self.meter = engine, every, steps, meter

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        if info.last or info.step % self.every == 0:
            with self.meter.paused():
                results = [self.engine.eval_step(batches) for batches in self.steps]
            info.evaluated.update(
                self._as_numbers(self.engine.task.evaluate(functools.reduce(operator.add, results)))
            )

    def _as_numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        """The task's metrics as floats.

        Raises UserError for a value that is no number, or a reserved name.
        """
        for name, value in values.items():
            number = isinstance(value, int | float) or getattr(value, "ndim", None) == 0
            if not number or name in metrics.KEYS:
                problem = (
                    f"evaluate returned {name}={value!r}: "
                    f"{'a line has this key itself' if number else 'not a number'}"
                )
                allowed, instead = "names of its own with numbers", f'{{"eval_{name}": float(...)}}'
                raise refusal(
                    "task", type(self.engine.task).__name__, problem, allowed=allowed, instead=instead
                )
        if "eval_loss" not in values:
            problem, instead = f"evaluate returned {', '.join(values) or 'nothing'}", '{"eval_loss": ...}'
            name, allowed = type(self.engine.task).__name__, "eval_loss, and other metrics"
            raise refusal("task", name, problem, allowed=allowed, instead=instead)
        return {name: float(value) for name, value in values.items()}


class Log(Callback):
    """Writes metrics.jsonl, trackers and the progress line on rank 0; always for the
    first and the last step."""

    def __init__(
        self,
        folder: RunDir,
        *,
        every: int,
        task: Task,
        meter: metrics.Meter,
        trackers: Trackers,
        device: torch.device,
    ):
        self.folder, self.every, self.weights = folder, every, task.weights
        self.meter, self.trackers, self.device = meter, trackers, device
        self.totals: torch.Tensor | None = None
        """metrics.totals, summed over the steps since the last line, in fp64 on the device."""

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        new = metrics.totals(info.result)
        self.totals = new if self.totals is None else self.totals + new
        if not (
            info.last or info.stopping or info.evaluated or info.step == 1 or info.step % self.every == 0
        ):
            return
        memory = metrics.max_over_ranks(metrics.max_memory_gib(self.device))
        allocator = {
            key: metrics.max_over_ranks(value) for key, value in metrics.allocator_stats(self.device).items()
        }
        totals, self.totals = self.totals, None
        row = metrics.record(info, totals=totals, weights=self.weights, meter=self.meter, memory_gib=memory)
        info.row = row | info.evaluated | allocator
        if dist.get_rank() == 0:
            self._write(info.row, step=info.step, total_steps=run.total_steps)

    def on_rollback(self, run: Run) -> None:
        """No step has two lines: those after the checkpoint are removed, as by a resume."""
        self.totals = None
        self.meter.restart(run.step)
        if dist.get_rank() == 0:
            self.folder.truncate(run.step)

    def _write(self, row: dict[str, Any], *, step: int, total_steps: int) -> None:
        self.folder.append_metrics(row)
        if row["skipped"]:
            scale = "" if row["loss_scale"] is None else f"; loss scale {row['loss_scale']:,.15g}"
            updates = "1 update" if row["skipped"] == 1 else f"{row['skipped']} updates"
            self.folder.append_event(
                "skipped", step=step, detail=f"{updates} skipped since the last line{scale}"
            )
        if empty := row.get("steps_without_targets"):
            steps = "1 step" if empty == 1 else f"{empty} steps"
            self.folder.append_event(
                "empty",
                step=step,
                detail=f"{steps} without a single target since the last line; no update was made in them",
            )
        self.trackers.log(row, step)
        known = (
            {} if row["loss"] is None and row.get("steps_without_targets") else {"final_loss": row["loss"]}
        )
        self.folder.update_summary(
            steps=step, tokens=row["tokens_seen"], tokens_per_s=row["tokens_per_s"], **known
        )
        _log.info(metrics.progress_line(row, total_steps=total_steps, eta_s=self.meter.eta_s))


class Barrier(Callback):
    """A barrier after the user's callbacks.

    A collective that only some ranks call there times out in the callback, instead of mixing
    with those of training.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def on_start(self, run: Run) -> None:
        dist.barrier(group=self.group)

    def on_numerics(self, run: Run, sample: Sample) -> None:
        dist.barrier(group=self.group)

    def on_step(self, run: Run, metrics: Mapping[str, Any]) -> None:
        dist.barrier(group=self.group)

    def on_checkpoint(self, run: Run, path: Path) -> None:
        dist.barrier(group=self.group)


class Checkpoint(Callback):
    """Saves checkpoints while training continues.

    A failed save ends the run on every rank at the same step.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        folder: RunDir,
        manager: Manager,
        fingerprints: dict[str, str],
        meter: metrics.Meter,
        on_saved: Callable[[Path], None],
    ):
        """`on_saved`: called on every rank with the path of a complete checkpoint."""
        self.engine, self.folder, self.manager, self.fingerprints, self.meter = (
            engine,
            folder,
            manager,
            fingerprints,
            meter,
        )
        self.on_saved = on_saved
        self.saving: Saving | None = None
        self.step = 0
        """Step of the current save, or of the last one."""
        self._pruning: threading.Thread | None = None

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        if self.saving is not None:
            self._poll(info)
        if self.manager.due(info.step, last=info.last or info.stopping):
            with self.meter.paused():
                self._wait()
                self.folder.check()
                states = {name: state for name, get in run.states.items() if (state := get())}
                progress = Progress(info.step, info.tokens_seen, self.fingerprints, states)
                self.saving, self.step = self.engine.save(self.manager.path(info.step), progress), info.step

    def on_end(self, run: Run, error: BaseException | None) -> None:
        if error is None:
            self._wait()
            self._wait_for_pruning()

    def last_complete(self) -> Path | None:
        """The run's newest checkpoint, once the current save has ended; None if there is none yet
        (collective).
        """
        self._wait()
        return on_rank0(self.manager.latest)

    def _poll(self, info: StepInfo) -> None:
        """Check whether the current save has ended on all ranks; if it failed, all ranks raise its error."""
        assert self.saving is not None
        if info.flags.get(SAVED) == dist.get_world_size():
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
                self.folder.append_event(
                    "checkpoint", step=self.step, detail=self.manager.path(self.step).name
                )
                self._wait_for_pruning()
                # In a thread, because removing thousands of files takes long.
                self._pruning = threading.Thread(target=self.manager.prune, name="prune", daemon=True)
                self._pruning.start()
            self.on_saved(self.manager.path(self.step))

    def _wait_for_pruning(self) -> None:
        """Wait for the thread that removes old checkpoints."""
        if self._pruning:
            self._pruning.join()


class Profile(Callback):
    """Writes a torch profiler trace of this rank's steps 3 to 5, and on a GPU a
    memory snapshot (for pytorch.org/memory_viz).
    """

    def __init__(self, folder: Path, *, device: torch.device):
        self.folder, self.gpu = folder, device.type == "cuda"
        if self.gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1), on_trace_ready=self._write
        )

    def on_start(self, run: Run) -> None:
        self.profiler.start()

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / f"rank-{log.rank()}-steps-3-5.json"))
        if self.gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"rank-{log.rank()}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def on_every_step(self, run: Run, info: StepInfo) -> None:
        self.profiler.step()

    def on_end(self, run: Run, error: BaseException | None) -> None:
        if error is None:
            with contextlib.suppress(RuntimeError):  # with fewer than five steps there is no trace
                self.profiler.stop()
