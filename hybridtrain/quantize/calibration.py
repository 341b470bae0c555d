"""Calibration rows: those of training, as layers see them."""

from __future__ import annotations

import math

from hybridtrain.data.loader import Loader
from hybridtrain.evaluate.held_out import HeldOut
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.types import Batch


def batches(of_model: HeldOut, *, rows: int, seed: int) -> list[Batch]:
    """About as many training rows (whole micro-batches), in the order of `seed`."""
    size = of_model.plan.micro_batch_size
    steps = math.ceil(rows / size)
    plan = BatchPlan(
        micro_batch_size=size,
        seq_len=of_model.plan.seq_len,
        grad_accum=steps,
        global_batch_size=size * steps,
    )
    loader = Loader(
        of_model.data,
        plan=plan,
        dp_rank=0,
        dp_size=1,
        seed=seed,
        vocab=of_model.vocab,
        collate=of_model.task.collate,
    )
    return loader.micro_batches(0)
