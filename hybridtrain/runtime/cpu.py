"""How this process computes: CPU threads, freed memory, the kernels of fp32 matrix products. Made once, before any tensor.

docs/speed.md tells what each setting gave.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from hybridtrain.config.schema import EngineConfig
from hybridtrain.runtime import host

_EXACT_ENOUGH = 8  # times the error of torch's own fp32 product; oneDNN's fp32 kernels have 1 to 3, tf32 1e3, bf16 1e4


def apply(engine: EngineConfig, *, device: torch.device) -> None:
    """Give this process the settings of `engine`."""
    # Said in every case: a script or a library may have set it before, by either of torch's two ways.
    torch.set_float32_matmul_precision("highest" if engine.fp32_matmul == "auto" else engine.fp32_matmul)
    if device.type != "cpu":
        return
    threads = engine.threads or _threads(os.environ)
    if threads:
        torch.set_num_threads(threads)
    if engine.keep_freed_memory:
        _keep_freed_memory()
    if engine.fp32_matmul == "auto":
        _use_onednn_if_exact()


def describe(engine: EngineConfig, *, device: torch.device) -> str:
    """What holds in this process, in words."""
    precision = torch.get_float32_matmul_precision()
    kernels = "oneDNN" if precision == "medium" and engine.fp32_matmul == "auto" else precision
    if device.type != "cpu":
        return f"fp32 products {kernels}"
    return f"{torch.get_num_threads()} CPU threads a process, fp32 products {kernels}, freed memory {'kept' if engine.keep_freed_memory else 'returned'}"


def _threads(environment: os._Environ[str]) -> int:
    """This machine's cores, shared evenly by its processes; 0 leaves torch's choice.

    torchrun sets OMP_NUM_THREADS=1 when it starts several processes, which leaves all other cores idle.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1 or environment.get("OMP_NUM_THREADS", "1") != "1":
        return 0
    import psutil

    free = host.cores()
    return max(1, min(free, psutil.cpu_count(logical=False) or free) // processes)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back to the system: each step needs the same large blocks again.

    By default each of them is mapped, zeroed and unmapped anew. Other allocators and systems are left alone.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def _use_onednn_if_exact() -> None:
    """Let oneDNN compute fp32 products if that costs no precision.

    `medium` allows it to compute in bf16, which it does where the CPU has AMX; elsewhere its fp32 kernels are as exact as
    MKL's and, on AMD, twice as fast. The error decides, not the name of the CPU.
    """
    before = torch.get_float32_matmul_precision()
    exact = _product_error()
    torch.set_float32_matmul_precision("medium")
    if _product_error() > _EXACT_ENOUGH * exact:
        torch.set_float32_matmul_precision(before)


def _product_error() -> float:
    """Largest relative error of products as a layer has them: plain, and with either side transposed."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in ((256, 512, 384), (64, 4096, 128)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        expected = left.double() @ right.double()
        for product in (left @ right, left @ right.t().contiguous().t(), left.t().contiguous().t() @ right):
            worst = max(worst, float((product.double() - expected).norm() / expected.norm()))
    return worst
