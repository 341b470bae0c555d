"""Calibration rows: those of training, or texts of a file, as layers see them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from hybridtrain.data.loader import Loader
from hybridtrain.errors import refusal
from hybridtrain.evaluate.held_out import HeldOut
from hybridtrain.models.tokens import check_ids, read_texts
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.types import Batch

FIELD = "quantize.prompts_file"


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


def of_texts(file: Path, *, tokenizer: Any, vocab: int, rows: int, size: int, seq_len: int) -> list[Batch]:
    """Micro-batches of `size` rows (the last may have fewer) of the texts in a file, one after the other: at
    most `rows`, of `seq_len` tokens. Raises UserError for a file without a whole row.
    """
    lines = read_texts(file, field=FIELD)
    ids = [token for line in lines for token in tokenizer(line)["input_ids"]]
    check_ids(ids, rows=vocab, field=FIELD)
    rows = min(rows, len(ids) // seq_len)
    if not rows:
        problem = f"its texts have {len(ids)} tokens, fewer than a row of {seq_len}"
        raise refusal(
            FIELD, file, problem, allowed="texts of a row or more", instead="data.seq_len=N, or more texts"
        )
    ids_BT = torch.tensor(ids[: rows * seq_len]).view(rows, seq_len)
    positions_BT = torch.arange(seq_len).expand(rows, -1).contiguous()
    whole = Batch(ids_BT, ids_BT, positions_BT)
    return [whole.rows(start, min(rows, start + size)) for start in range(0, rows, size)]
