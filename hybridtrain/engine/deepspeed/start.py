"""Imports and initializes DeepSpeed without its output, which is shown only after an error."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress output, logs and warnings of Python code; show the output after an exception."""
    output = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    except BaseException:
        sys.stderr.write(output.getvalue())
        raise


def start(device: torch.device) -> Any:
    """Import DeepSpeed and initialize it with this process group (collective); returns the module."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    for name, value in {
        "RANK": dist.get_rank(),
        "WORLD_SIZE": dist.get_world_size(),
        "LOCAL_RANK": device.index or 0,
    }.items():
        os.environ.setdefault(name, str(value))
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed calls them in every step
        warnings.filterwarnings(
            "ignore", message=f".torch.distributed.{name}. is deprecated", category=FutureWarning
        )
    with quiet():
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # An op that would be compiled at start-up, for a collective that only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed
