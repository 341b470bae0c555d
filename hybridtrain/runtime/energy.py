"""Energy counters of the machine, in joules. No torch.

    NVML    a whole GPU             nvmlDeviceGetTotalEnergyConsumption, with the package pynvml
    RAPL    whole CPU packages      <powercap>/intel-rapl:N/energy_uj, Linux; often for root alone

Both count all that a GPU or a package does, idle or for other processes, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_NEVER = 1 << 64


@dataclass(frozen=True)
class Counter:
    """One or several counters that are read together."""

    name: str
    read: Callable[[], Sequence[int]]
    ranges: Sequence[int]
    """At which each begins at 0 again."""
    unit: float
    """Joules of a count."""

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Between two readings, less apart than a counter's range."""
        pairs = zip(before, after, self.ranges, strict=True)
        return self.unit * sum((end - start) % size for start, end, size in pairs)


def counter(powercap: Path, *, gpus: Sequence[str]) -> Counter | None:
    """That of the GPUs with these UUIDs, or without any of the CPU; None: it cannot be read here.

    `powercap`: the kernel's folder, POWERCAP.
    """
    return _nvml(gpus) if gpus else _rapl(powercap)


def _rapl(powercap: Path) -> Counter | None:
    """Packages alone: the zones in them, and the whole platform, would count twice."""
    zones, ranges = [], []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                size = int((folder / "max_energy_range_uj").read_text()) + 1
                int((folder / "energy_uj").read_text())
                zones.append(folder / "energy_uj")
                ranges.append(size)
    if not zones:
        return None
    name = f"RAPL, {len(zones)} CPU package{'s' if len(zones) > 1 else ''}"
    return Counter(name, lambda: [int(zone.read_text()) for zone in zones], ranges, 1e-6)


def _nvml(gpus: Sequence[str]) -> Counter | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{each.removeprefix('GPU-')}") for each in gpus]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    name = f"NVML, {len(handles)} GPU{'s' if len(handles) > 1 else ''}"
    read = pynvml.nvmlDeviceGetTotalEnergyConsumption
    return Counter(name, lambda: [read(handle) for handle in handles], [_NEVER] * len(handles), 1e-3)
