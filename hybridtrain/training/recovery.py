"""What a run does about a step whose loss or gradients are not finite, or whose loss is a spike.

    step -> finite? -> a spike? -> callbacks
              |no        |yes
              replay: where it began, an event; then the policy: skip, stop, or rollback

    rollback: load the last checkpoint, of step c; leave out the data from there to the bad step k, inclusive
        step      c  c+1  ...  k   k+1            c      c+1    ...
        data      c  c+1  ...  k   k+1      ->    k+1    k+2    ...

All ranks decide alike: from the reduced loss and gradient norm of the step, which are the same everywhere. On
a GPU they are read one step later, or at a log line or checkpoint, so that the step does not wait for the
device; then one update may lie between the step and its replay, and the words say so.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from hybridtrain.data.loader import Loader
from hybridtrain.errors import UserError, refusal
from hybridtrain.parallel.mesh import from_rank0, gather_on_rank0
from hybridtrain.plan.layout import AXES
from hybridtrain.precision.provenance import Found, Origin, Recorder, Row, origin
from hybridtrain.precision.rules import has_dynamic_scale
from hybridtrain.run.directory import RunDir
from hybridtrain.runtime import log
from hybridtrain.training.builtin import Checkpoint
from hybridtrain.training.callbacks import Callbacks, StepInfo, stored_state
from hybridtrain.training.job import Job
from hybridtrain.training.spikes import Spikes
from hybridtrain.types import Progress, StepResult

_log = log.get("train")
LEFT_OUT, SPIKES = "data_left_out", "loss_window"
"""Names of small states in a checkpoint."""


class Recovery:
    """Called after each step, before its callbacks."""

    def __init__(
        self,
        job: Job,
        *,
        engine: Any,
        start: Progress,
        loader: Loader,
        folder: RunDir,
        saver: Checkpoint,
        callbacks: Callbacks,
    ):
        """`start`: from which the run goes on; what it left out counts if the order of the data is the
        same."""
        self.config, self.plan, self.engine, self.loader = job.config, job.plan, engine, loader
        self.folder, self.saver, self.callbacks = folder, saver, callbacks
        same_data = start.fingerprints.get("order") == job.fingerprints["order"]
        states = start.states if same_data else {}
        self.windows: list[dict[str, int]] = list(stored_state(states, LEFT_OUT).get("windows", ()))
        """Samples that rollbacks have left out: {step: at which, first, stop}."""
        loader.leave_out(sum(window["stop"] - window["first"] for window in self.windows))
        train = job.config.train
        self.spikes = Spikes(
            threshold=train.spike_threshold,
            grad_threshold=train.spike_grad_threshold,
            state=stored_state(states, SPIKES),
        )
        self.found: Origin | None = None
        """Of the current run of non-finite steps."""
        self.spikes_in_a_row = 0
        callbacks.run.states[LEFT_OUT] = self._left_out
        if train.on_spike != "off":
            callbacks.run.states[SPIKES] = self.spikes.state
        self._unread: deque[tuple[StepInfo, torch.Tensor, torch.cuda.Event | None]] = deque()

    def _left_out(self) -> dict[str, Any]:
        return {"version": 1, "windows": self.windows} if self.windows else {}

    def before_step(self) -> None:
        """Tell the engine above which loss it makes no update."""
        if self.config.train.on_spike == "skip":
            self.engine.spike_limits = self.spikes.limits

    def after_step(self, info: StepInfo, *, wait: bool) -> Progress | None:
        """Look at the steps whose numbers are on the host; `wait`: also at this one. After a rollback, the
        progress from which to go on (collective). Raises UserError where a policy stops the run.
        """
        self._unread.append((info, *_to_host(info.result)))
        while self._unread and (wait or len(self._unread) > 1 or self._unread[0][2] is None):
            step, numbers, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            back = self._look(step, *numbers.tolist())
            if back is not None:
                self._unread.clear()
                return back
        return None

    @contextlib.contextmanager
    def explained(self, info: StepInfo) -> Iterator[None]:
        """Add to a UserError that ends the run after this step where its non-finite numbers began."""
        try:
            yield
        except UserError as error:
            found = self.found or self._trace(info)
            first, *others, advice = str(error).splitlines()
            kept = advice.partition(":")[2].strip()
            more = "" if found.advice in kept else f"{found.advice}; or "
            lines = [f"{first}; {found.text}", *others, f"  try:     {more}{kept}"]
            raise UserError("\n".join(lines)) from None

    def _look(
        self,
        info: StepInfo,
        loss: float,
        norm: float,
        skipped: float,
        empty: float,
        scale: float,
        spike: float,
    ) -> Progress | None:
        if empty:
            return None
        if skipped or not math.isfinite(loss):
            return self._nonfinite(info, loss=loss, scale=scale)
        self.found = None
        if self.config.train.on_spike == "off":
            return None
        if spike or (self.config.train.on_spike != "skip" and self.spikes.is_spike(loss, norm)):
            return self._spike(info, loss=loss, norm=norm)
        self.spikes_in_a_row = 0
        self.spikes.add(loss, norm, step=info.step)
        return None

    def _nonfinite(self, info: StepInfo, *, loss: float, scale: float) -> Progress | None:
        precision, policy = self.config.precision, self.config.train.on_nonfinite
        if has_dynamic_scale(precision) and math.isfinite(loss) and scale > precision.min_scale:
            return None  # how a loss scale finds its range; a smaller one follows
        if self.found is not None and policy == "skip":
            return None
        self.found = self._trace(info)
        what = "the gradients are" if math.isfinite(loss) else "the loss is"
        problem = f"{what} not finite in step {info.step}: {self.found.text}"
        self._event("nonfinite", info.step, problem)
        if policy == "skip":
            return None
        if policy == "rollback":
            return self._roll_back(info, why=problem, advice=self.found.advice)
        raise refusal(
            "train.on_nonfinite",
            policy,
            problem,
            allowed="finite losses and gradients",
            instead=self.found.advice,
        )

    def _spike(self, info: StepInfo, *, loss: float, norm: float) -> Progress | None:
        train, self.spikes_in_a_row = self.config.train, self.spikes_in_a_row + 1
        problem = f"a loss spike in step {info.step}: {self.spikes.describe(loss, norm)}"
        self._event("spike", info.step, problem)
        if train.on_spike == "rollback":
            return self._roll_back(info, why=problem, advice="a lower optim.lr, optim.clip=1.0")
        allowed, instead = "losses without spikes", "a lower optim.lr, optim.clip=1.0"
        if train.on_spike == "stop":
            raise refusal("train.on_spike", "stop", problem, allowed=allowed, instead=instead)
        if self.spikes_in_a_row >= train.max_spikes:
            problem = f"{self.spikes_in_a_row} steps in a row were skipped as spikes; {problem}"
            raise refusal("train.max_spikes", train.max_spikes, problem, allowed=allowed, instead=instead)
        return None

    def _trace(self, info: StepInfo) -> Origin:
        """Repeat a step and find where its non-finite numbers began (collective)."""
        self.callbacks.beat()
        engine, step, rank = self.engine, info.step - 1, dist.get_rank()
        batches = self.loader.micro_batches(step)
        recorder = Recorder([(len(batch.input_ids_BT), batch.input_ids_BT.shape[1]) for batch in batches])
        result = engine.replay(batches, loss_scale=info.result.loss_scale, watcher=recorder)
        again = bool(result.skipped) or not math.isfinite(float(result.loss))
        unchanged = all(bool(each.result.skipped) for each in (info, *(later for later, *_ in self._unread)))
        found, sign = None, recorder.sign()
        if sign is not None:
            mesh = engine.mesh
            coordinates = {axis: mesh.coordinates[axis] for axis in AXES if mesh.layout.degree(axis) > 1}
            sources = self.loader.sources(step, micro_batch=sign.micro_batch, rows=sign.rows)
            rows = tuple(Row(corpus, row, tuple(documents)) for corpus, row, documents in sources)
            found = Found(sign, rank, coordinates, rows)
        signs = [one for one in gather_on_rank0(found) if one is not None]
        return from_rank0(origin(signs, again=again, exact=unchanged))

    def _roll_back(self, info: StepInfo, *, why: str, advice: str) -> Progress:
        """Load the last checkpoint and leave out the data from its step to this one (collective)."""
        train = self.config.train
        if len(self.windows) >= train.max_rollbacks:
            raise refusal(
                "train.max_rollbacks",
                train.max_rollbacks,
                f"the run has gone back {len(self.windows)} times, and now {why}",
                allowed=f"up to {train.max_rollbacks} rollbacks",
                instead=advice,
            )
        path = self.saver.last_complete() or self.folder.checkpoint
        if path is None:
            problem = f"there is no checkpoint yet to go back to, and {why}"
            instead = f"a smaller checkpoint.every; {advice}"
            raise refusal(
                "checkpoint.every",
                self.config.checkpoint.every,
                problem,
                allowed="a checkpoint before the first such step",
                instead=instead,
            )
        self.callbacks.beat()
        back = self.engine.load(path)
        before, done = self.plan.rows_before(back.step), self.plan.rows_before(info.step)
        window = {
            "step": back.step,
            "first": before + self.loader.left_out,
            "stop": done + self.loader.left_out,
        }
        self.loader.leave_out(window["stop"] - window["first"])
        self.windows.append(window)
        self.found, self.spikes_in_a_row, self.spikes.frozen_until = None, 0, info.step
        self.callbacks.after_rollback(back)
        detail = (
            f"to {path.name}; rows {window['first']} to {window['stop'] - 1} of the data order are left out"
        )
        self._event("rollback", back.step, f"{detail}: {why}")
        return back

    def _event(self, kind: str, step: int, detail: str) -> None:
        _log.warning("%s: %s", kind, detail)
        if dist.get_rank() == 0:
            self.folder.append_event(kind, step=step, detail=detail)


def _to_host(result: StepResult) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """(loss, gradient norm, skipped, empty, loss scale, spike), fp64, on the host after the event."""
    spike = torch.zeros_like(result.empty) if result.spike is None else result.spike
    values = (result.loss, result.grad_norm, result.skipped, result.empty, result.loss_scale, spike)
    numbers = torch.stack([value.detach().double() for value in values])
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
