"""The hosts of a run, gathered once at the start: CPU, memory, GPUs and ranks of each; library versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import __version__

if TYPE_CHECKING:
    import torch

GIB = 1024**3
PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of this package."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python, hybridtrain, torch and transformers. Imports nothing."""
    result = {"python": platform.python_version(), "hybridtrain": __version__}
    for name in ("torch", "transformers"):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # put on the path without being installed
            result[name] = "unknown"
    return result


def gather(device: torch.device) -> list[dict[str, Any]]:
    """One dict per host, with `ranks`, ordered by first rank; empty on ranks other than 0 (collective)."""
    import torch.distributed as dist

    world: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(host(device), world, dst=0)
    return merge(world or [])


def merge(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict per host, with its `ranks`, from one per rank."""
    hosts: dict[str, dict[str, Any]] = {}
    for rank, entry in enumerate(entries):
        hosts.setdefault(entry["host"], {**entry, "ranks": []})["ranks"].append(rank)
    return list(hosts.values())


def host(device: torch.device) -> dict[str, Any]:
    """This process's host: names, core and GPU counts, memory in GiB. `gpu` is None without a GPU."""
    import torch

    cuda = device.type == "cuda"
    return {
        "host": platform.node(),
        "os": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(device).total_memory / GIB, 1)
        if cuda
        else None,
    }


def _cpu_name() -> str:
    """The CPU model from /proc/cpuinfo, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
