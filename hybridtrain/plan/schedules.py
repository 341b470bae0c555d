"""Pipeline schedules by name: stages per pipeline rank, and the numbers of micro-batches that they allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridtrain.config.schema import ParallelConfig

SINGLE = ("gpipe", "1f1b")
"""One stage per rank."""
LOOPED = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
"""Several stages per rank, in repeated rank order."""
V = ("zbv_zero_bubble", "dualpipev")
"""Two stages per rank, in rank order and in reverse."""
SCHEDULES = SINGLE + LOOPED + V
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")
"""Schedules that compute the gradients of activations and of weights separately."""


def stages_per_rank(parallel: ParallelConfig) -> int:
    """Number of stages of each pipeline rank."""
    if parallel.schedule in SINGLE or parallel.pp == 1:
        return 1
    return parallel.virtual_stages or 2


def stage_ids(rank: int, *, pp: int, per_rank: int, schedule: str) -> list[int]:
    """Numbers of the stages of pipeline rank `rank`, ascending."""
    if schedule in V and pp > 1:
        return sorted((rank, 2 * pp - 1 - rank))
    return [rank + loop * pp for loop in range(per_rank)]


def micro_batches(schedule: str, *, pp: int, stages: int) -> tuple[Callable[[int], bool], str]:
    """(whether a schedule allows a number of micro-batches, the allowed numbers as text), from
    torch 2.13's source code.
    """
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
