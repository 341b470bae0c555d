"""Metrics of a logged step: speed, MFU, memory; the line of metrics.jsonl and the progress line.

Reads device scalars (`record`) and reduces host values over ranks (`max_over_ranks`) only at log steps;
between them the host never waits for the device.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hybridtrain.plan import hardware
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.run.record import METRICS
from hybridtrain.runtime.files import finite
from hybridtrain.types import StepResult

if TYPE_CHECKING:
    from hybridtrain.training.callbacks import StepInfo

GIB = 1024**3
KEYS = (*METRICS, "step_loss", "steps_without_targets", "reserved_memory_gib", "alloc_retries")
"""Keys of a line of metrics.jsonl, besides those of the task."""


def peak_flops(device: torch.device, *, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s of `device` for matrix products in `dtype`; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return hardware.peak_of(
        torch.cuda.get_device_name(device), dtype=str(dtype).removeprefix("torch."), tf32=tf32
    )


def max_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated by torch on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # getrusage would include the parent's memory before exec
            return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def allocator_stats(device: torch.device) -> dict[str, float]:
    """Peak memory reserved by torch's allocator in GiB, and how often it had to free its cache;
    empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    return {
        "reserved_memory_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "alloc_retries": torch.cuda.memory_stats(device)["num_alloc_retries"],
    }


def max_over_ranks(value: float) -> float:
    """The largest `value` of all ranks (collective, on the CPU)."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


@dataclass(frozen=True)
class Rates:
    """Speed over the steps since the last measurement. `mfu` is a fraction; None if the peak is unknown."""

    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float | None


class Meter:
    """Measures speed between log steps, without the time spent inside `paused()` (evaluation, saving).

    `flops_per_token` takes the length of a row; `peak` is FLOP/s of one device.
    """

    ETA_MARKS = 20  # measurements that the ETA averages over, so that it is stable with log_every=1

    def __init__(
        self,
        *,
        first_step: int,
        total_steps: int,
        plan: BatchPlan,
        devices: int,
        flops_per_token: Callable[[int], float],
        peak: float | None,
    ) -> None:
        self._total_steps = total_steps
        self._plan = plan
        self._devices = devices
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._paused = 0.0
        self._marks = deque([(first_step, self._clock())], maxlen=self.ETA_MARKS + 1)

    def _clock(self) -> float:
        return time.perf_counter() - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the `with` block, after waiting for the GPU to finish the steps before it."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def restart(self, step: int) -> None:
        """Measure from `step` on, which may have been measured before."""
        self._marks.clear()
        self._marks.append((step, self._clock()))

    def measure(self, step: int) -> Rates:
        """Rates over the steps since the last call (or the start), up to and including `step`.

        The device must have finished it.
        """
        last_step, last_time = self._marks[-1]
        assert step > last_step, f"step {step} was measured before ({last_step})"
        now = self._clock()
        self._marks.append((step, now))
        seconds = max(now - last_time, 1e-9)
        tokens_per_s = (
            (self._plan.rows_before(step) - self._plan.rows_before(last_step)) * self._plan.seq_len / seconds
        )
        per_device = tokens_per_s / self._devices
        flops = self._flops_per_token(self._plan.seq_len // self._plan.pieces_at(step - 1))
        return Rates(
            step_time_s=seconds / (step - last_step),
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_device=per_device,
            mfu=per_device * flops / self._peak if self._peak else None,
        )

    @property
    def eta_s(self) -> float:
        """Seconds to the last step, from the last ETA_MARKS measurements. Call `measure` first."""
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        assert last_step > first_step, "nothing was measured yet"
        return max(0, self._total_steps - last_step) * (last_time - first_time) / (last_step - first_step)


def totals(result: StepResult) -> torch.Tensor:
    """The quantities of a step that a line sums over its steps, fp64, (4 + 2 K,), on the device.

    (loss x targets, targets, skipped updates, steps without targets, sums (K), counts (K)).
    """
    targets = result.counts[0].double()
    loss = torch.where(targets > 0, result.loss * targets, 0.0)  # the loss is NaN without targets
    return torch.cat(
        [
            torch.stack([loss, targets, result.skipped.double(), result.empty.double()]),
            result.sums.double(),
            result.counts.double(),
        ]
    )


def record(
    info: StepInfo,
    *,
    totals: torch.Tensor,
    weights: Mapping[str, float],
    meter: Meter,
    memory_gib: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl; non-finite and unknown values are None.

    `totals`: of `totals()`, summed over the steps since the last line. `loss` is the mean over their
    targets, `step_loss` that of the last step. `weights`: of the task's sums; if there are several, `loss` is
    the weighted sum of their means, and the mean of each is added as `train_<name>`. Reads all scalars in one
    transfer, which waits for the device, before it takes the time.
    """
    result = info.result
    scalars = (result.loss, result.grad_norm, result.loss_scale)
    numbers = torch.cat([torch.stack([scalar.detach().double() for scalar in scalars]), totals]).tolist()
    step_loss, grad_norm, loss_scale, loss_sum, targets, skipped, empty, *each = numbers
    loss = loss_sum / targets if targets else math.nan
    counted = zip(weights, each, each[len(weights) :], strict=False)
    means = {name: value / count for name, value, count in counted if count}
    if len(weights) > 1:
        loss = sum(weights[name] * mean for name, mean in means.items()) if means else math.nan
    rates = meter.measure(info.step)
    return {
        "step": info.step,
        "tokens_seen": info.tokens_seen,
        "loss": finite(loss),
        "step_loss": finite(step_loss),
        "grad_norm": finite(grad_norm),
        "lr": finite(info.lr),
        "loss_scale": finite(loss_scale),
        "skipped": int(skipped),
        "tokens_per_s": rates.tokens_per_s,
        "tokens_per_s_per_device": rates.tokens_per_s_per_device,
        "step_time_s": rates.step_time_s,
        "mfu": rates.mfu,
        "max_memory_gib": finite(memory_gib),
        "time": time.time(),
        **({"steps_without_targets": int(empty)} if empty else {}),
        **({f"train_{name}": finite(means.get(name, math.nan)) for name in weights if len(weights) > 1}),
    }


def progress_line(row: Mapping[str, Any], *, total_steps: int, eta_s: float) -> str:
    """The line that rank 0 prints for a record; unknown values are left out.

    step   120/2000 | loss 3.4217 | norm 0.871 | lr 3.0e-04 | 41.2k tok/s | MFU 38.1% | 12.30 GiB | ETA 3m12s
    """
    parts = [
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}",
        "loss "
        + (
            f"{row['loss']:.4f}"
            if row["loss"] is not None
            else "none"
            if row.get("steps_without_targets")
            else "not finite"
        ),
        *([f"eval {row['eval_loss']:.4f}"] if row.get("eval_loss") is not None else []),
        *([f"accuracy {row['eval_accuracy']:.1%}"] if row.get("eval_accuracy") is not None else []),
        "norm " + ("not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"),
        f"lr {row['lr']:.1e}",
    ]
    if row["skipped"]:
        parts.append(f"skipped, loss scale {row['loss_scale']:g}")
    if empty := row.get("steps_without_targets"):
        parts.append(f"{empty} step{'' if empty == 1 else 's'} without a target, no update made")
    parts.append(f"{quantity(row['tokens_per_s'])} tok/s")
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts += [f"{row['max_memory_gib']:.2f} GiB", f"ETA {duration(eta_s)}"]
    return " | ".join(parts)


def quantity(value: float) -> str:
    """A count with three significant digits: 873, 41.2k, 1.05M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A duration in its two largest units: 42s, 3m12s, 5h07m, 2d04h. Negative values are 0s."""
    minutes, secs = divmod(round(max(0.0, seconds)), 60)
    hours, mins = divmod(minutes, 60)
    days, hrs = divmod(hours, 24)
    if days:
        return f"{days}d{hrs:02d}h"
    if hours:
        return f"{hours}h{mins:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
