"""Tensor parallelism, as far as it follows from the config. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridtrain.config.schema import ParallelConfig
    from hybridtrain.plan.batch import BatchPlan


def sequence_parallel(parallel: ParallelConfig, *, plan: BatchPlan, tp: int) -> bool:
    """Whether activations are to be cut along the sequence, if engine and model allow it."""
    even = all(length % tp == 0 for length in (plan.seq_len, plan.first_length))
    return tp > 1 and parallel.sequence_parallel != "false" and even
