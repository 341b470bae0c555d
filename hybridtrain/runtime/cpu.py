"""CPU settings of this process: threads, allocator, fp32 matmul kernels.

Apply them before the first tensor is created. docs/speed.md has the gain of each setting.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from hybridtrain.config.schema import EngineConfig
from hybridtrain.runtime import host

_EXACT_ENOUGH = 8
"""Allowed error in units of that of torch's own fp32 matmul. oneDNN: 1 to 3 in fp32, 1e3
in tf32, 1e4 in bf16."""


def apply(engine: EngineConfig, *, device: torch.device, tf32: bool) -> None:
    """Apply the settings of `engine` to this process. `tf32`: products of a GPU round their operands."""
    # Always set it: a script or a library may have changed it, by either of torch's two settings.
    automatic = "high" if tf32 and device.type == "cuda" else "highest"
    torch.set_float32_matmul_precision(automatic if engine.fp32_matmul == "auto" else engine.fp32_matmul)
    if device.type != "cpu" and engine.offload_optimizer == "none":
        return
    threads = engine.threads or _threads(os.environ)
    if threads:
        torch.set_num_threads(threads)
    if device.type != "cpu":
        return
    if engine.keep_freed_memory:
        _keep_freed_memory()
    if engine.fp32_matmul == "auto":
        _use_onednn_if_exact()


def describe(engine: EngineConfig, *, device: torch.device) -> str:
    """The settings in effect, as text for the log."""
    precision = torch.get_float32_matmul_precision()
    kernels = "oneDNN" if precision == "medium" and engine.fp32_matmul == "auto" else precision
    if device.type != "cpu":
        offloads = engine.offload_optimizer == "cpu"
        threads = f", {torch.get_num_threads()} CPU threads for the update" if offloads else ""
        return f"fp32 products {kernels}{threads}"
    return (
        f"{torch.get_num_threads()} CPU threads a process, fp32 products {kernels}, "
        f"freed memory {'kept' if engine.keep_freed_memory else 'returned'}"
    )


def _threads(environment: os._Environ[str]) -> int:
    """Threads for this process: cores of this machine / its processes; 0: keep torch's number.

    torchrun sets OMP_NUM_THREADS=1 for several processes, which leaves all other cores idle.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1 or environment.get("OMP_NUM_THREADS", "1") != "1":
        return 0
    import psutil

    free = host.cores()
    return max(1, min(free, psutil.cpu_count(logical=False) or free) // processes)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of returning it to the system.

    Each step needs the same large blocks again; by default each of them is mapped, zeroed and unmapped every
    time. No effect on other allocators and systems.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def return_freed_memory() -> None:
    """Have glibc return each block of a MiB or more to the system as soon as it is freed, for commands that
    read one large block after the other. By default it keeps those below the largest that was freed, up to
    32 MiB.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 20)


def _use_onednn_if_exact() -> None:
    """Let oneDNN compute fp32 matmuls if that loses no precision.

    `medium` allows bf16, which oneDNN uses on CPUs with AMX; elsewhere its fp32 kernels are as exact as MKL's
    and, on AMD, twice as fast. The measured error decides, not the name of the CPU.
    """
    before = torch.get_float32_matmul_precision()
    exact = _product_error()
    torch.set_float32_matmul_precision("medium")
    if _product_error() > _EXACT_ENOUGH * exact:
        torch.set_float32_matmul_precision(before)


def _product_error() -> float:
    """Largest relative error of matmuls as layers use them: plain, and with either operand transposed."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in ((256, 512, 384), (64, 4096, 128)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        expected = left.double() @ right.double()
        for product in (left @ right, left @ right.t().contiguous().t(), left.t().contiguous().t() @ right):
            worst = max(worst, float((product.double() - expected).norm() / expected.norm()))
    return worst
