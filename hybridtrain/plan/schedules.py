"""Pipeline schedules by name: how many stages each pipeline rank holds, and how many micro-batches they work with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridtrain.config.schema import ParallelConfig

SINGLE = ("gpipe", "1f1b")
"""One stage per rank."""
LOOPED = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
"""Several stages per rank, in the order of the ranks."""
V = ("zbv_zero_bubble", "dualpipev")
"""Two stages per rank: there and back."""
SCHEDULES = SINGLE + LOOPED + V
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")
"""Gradients of activations and of weights are computed apart."""


def stages_per_rank(parallel: ParallelConfig) -> int:
    """Pipeline stages that each pipeline rank holds."""
    if parallel.schedule in SINGLE or parallel.pp == 1:
        return 1
    return parallel.virtual_stages or 2


def micro_batches(schedule: str, *, pp: int, stages: int) -> tuple[Callable[[int], bool], str]:
    """Whether a schedule works with a number of micro-batches, and with which in words (read off torch.distributed.pipelining 2.13)."""
    numbers: dict[str, tuple[Callable[[int], bool], str]] = {
        "1f1b": (lambda n: n >= pp, f"at least {pp}, one for each stage"),
        "gpipe": (lambda n: n >= pp, f"at least {pp}, one for each stage"),
        "looped_bfs": (lambda n: n >= pp, f"at least {pp}, one for each pipeline rank"),
        "interleaved_1f1b": (lambda n: n % pp == 0, f"a multiple of pp={pp}"),
        "interleaved_zero_bubble": (lambda n: n % pp == 0, f"a multiple of pp={pp}"),
        "zbv_zero_bubble": (lambda n: n >= pp, f"at least pp={pp}"),
        "dualpipev": (lambda n: n >= stages, f"at least {stages}, one for each stage"),
    }
    return numbers[schedule]
