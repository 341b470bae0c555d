"""The batch of an optimizer step: its rows, their length, and how many micro-batches each data rank takes.

All of it follows from the config and the step. In the first steps the global batch may be smaller (a ramp)
and rows may be cut into shorter pieces (sequence-length warm-up):

    rows     8 8 8 16 16 16 24 24 24 32 32 ...        batch.ramp_start=8 ramp_increment=8 ramp_steps=9
                                                      global_batch_size=32
    length   64 64 64 128 128 128 256 256 ...         batch.seq_len_start=64 seq_len_steps=6 data.seq_len=256

A row that is cut keeps all its tokens: with pieces of S / 4 tokens, micro-batches have
four times as many rows.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridtrain.plan import batch_rules, rules

if TYPE_CHECKING:
    from hybridtrain.config import schema
    from hybridtrain.plan.layout import ParallelLayout


@dataclass(frozen=True)
class Stairs:
    """A whole number as a function of the step: `values` in order, each for an equal share of the first
    `steps` steps; the last one from then on."""

    values: tuple[int, ...]
    steps: int

    def at(self, step: int) -> int:
        """The value in optimizer step `step`, counted from 0."""
        rises = len(self.values) - 1
        return self.values[rises if step >= self.steps else step * rises // self.steps]

    def before(self, step: int) -> int:
        """The sum of the values in all steps before `step`."""
        rises = len(self.values) - 1
        starts = [-(-number * self.steps // rises) for number in range(rises)] if rises else []
        ends = [*starts[1:], self.steps] if rises else []
        grown = sum(
            value * (min(step, end) - min(step, start))
            for value, start, end in zip(self.values, starts, ends, strict=False)
        )
        return grown + self.values[-1] * max(0, step - (self.steps if rises else 0))


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = micro_batch_size x dp x grad_accum.

    Under pp, grad_accum is the number of micro-batches.
    """

    micro_batch_size: int
    seq_len: int
    grad_accum: int
    global_batch_size: int
    ramp: Stairs | None = None
    """Rows of the global batch by step; None: always global_batch_size."""
    cuts: Stairs | None = None
    """Pieces that each row is cut into, by step; None: rows stay whole."""

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step at its full size."""
        return self.global_batch_size * self.seq_len

    @property
    def growing(self) -> dict[str, int]:
        """The options by which this batch grows -> their values; empty for a batch of one size."""
        ramp = {"batch.ramp_start": self.first_rows} if self.ramp else {}
        return ramp | ({"batch.seq_len_start": self.first_length} if self.cuts else {})

    @property
    def first_rows(self) -> int:
        """Rows of the first step's global batch."""
        return self.rows_at(0)

    @property
    def first_length(self) -> int:
        """Tokens of a piece of a row in the first step; seq_len if rows stay whole."""
        return self.seq_len // self.pieces_at(0)

    def rows_at(self, step: int) -> int:
        """Rows of the global batch of `step`, counted from 0."""
        return self.ramp.at(step) if self.ramp else self.global_batch_size

    def rows_before(self, step: int) -> int:
        """Rows of all steps before `step`: the index of its first sample."""
        return self.ramp.before(step) if self.ramp else step * self.global_batch_size

    def pieces_at(self, step: int) -> int:
        """Pieces that a row is cut into in `step`, each of seq_len / pieces tokens."""
        return self.cuts.at(step) if self.cuts else 1

    def steps_of(self, rows: int) -> int:
        """The least number of steps that see `rows` rows."""
        if self.ramp is None:
            return -(-rows // self.global_batch_size)
        missing = rows - self.rows_before(self.ramp.steps)
        if missing > 0:
            return self.ramp.steps + -(-missing // self.global_batch_size)
        return bisect.bisect_left(range(self.ramp.steps), rows, key=self.rows_before)


def plan_batch(batch: schema.BatchConfig, *, layout: ParallelLayout, seq_len: int) -> BatchPlan:
    """Derive grad_accum, the ramp and the cuts; raises UserError for numbers that do not go together."""
    rules.require(batch_rules.of_batch(batch, dp=layout.dp, seq_len=seq_len))
    size, micro = batch.global_batch_size, batch.micro_batch_size
    ramp = (
        Stairs(tuple(range(batch.ramp_start, size + 1, batch.ramp_increment)), batch.ramp_steps)
        if batch.ramp_start
        else None
    )
    cuts = (
        Stairs(tuple(_halvings(seq_len // batch.seq_len_start)), batch.seq_len_steps)
        if batch.seq_len_start
        else None
    )
    return BatchPlan(micro, seq_len, size // (micro * layout.dp), size, ramp, cuts)


def _halvings(pieces: int) -> list[int]:
    """8, 4, 2, 1 for 8."""
    return [pieces >> number for number in range(pieces.bit_length())]
