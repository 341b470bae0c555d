"""The rules of the batch: its rows, a ramp of them, and a warm-up of their length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hybridtrain.plan.rules import Rule

if TYPE_CHECKING:
    from hybridtrain.config import schema


def of_batch(batch: schema.BatchConfig, *, dp: int, seq_len: int) -> Iterator[Rule]:
    """Rows that are shared out evenly to `dp` data ranks."""
    size, micro = batch.global_batch_size, batch.micro_batch_size
    yield Rule(
        "batch.global_batch_size",
        size,
        size >= 1,
        "not a batch size",
        "1 or more",
        "batch.global_batch_size=1",
    )
    yield Rule(
        "batch.micro_batch_size",
        micro,
        micro >= 1,
        "not a batch size",
        "1 or more",
        "batch.micro_batch_size=1",
    )
    yield Rule("data.seq_len", seq_len, seq_len >= 1, "not a length", "1 or more", "data.seq_len=256")
    rows = micro * dp
    problem = f"not a multiple of micro_batch_size {micro} x {dp} data ranks"
    yield Rule(
        "batch.global_batch_size",
        size,
        size % rows == 0,
        problem,
        f"multiples of {rows}",
        f"batch.global_batch_size={max(1, size // rows) * rows}",
    )
    yield from _of_ramp(batch, rows=rows)
    yield from _of_lengths(batch, seq_len=seq_len)


def _of_ramp(batch: schema.BatchConfig, *, rows: int) -> Iterator[Rule]:
    """A global batch that grows, in multiples of `rows`."""
    size, start, increment, steps = (
        batch.global_batch_size,
        batch.ramp_start,
        batch.ramp_increment,
        batch.ramp_steps,
    )
    for name, value in (("ramp_increment", increment), ("ramp_steps", steps)):
        yield Rule(
            f"batch.{name}",
            value,
            start > 0 or value == 0,
            "batch.ramp_start=0: there is no ramp",
            "0",
            f"batch.ramp_start={rows}, or batch.{name}=0",
        )
    if start == 0:
        return
    problem, allowed = (
        f"a ramp grows to batch.global_batch_size={size} in multiples of {rows}",
        f"multiples of {rows} below {size}",
    )
    yield Rule(
        "batch.ramp_start",
        start,
        start < size and start % rows == 0,
        problem,
        allowed,
        f"batch.ramp_start={rows}, or 0 without a ramp",
    )
    fits = increment > 0 and increment % rows == 0 and (size - start) % increment == 0
    problem = (
        f"{size - start} rows between batch.ramp_start={start} and batch.global_batch_size={size} "
        f"are not a multiple of it, or it is not one of {rows}"
    )
    allowed = f"multiples of {rows} that divide {size - start}"
    yield Rule("batch.ramp_increment", increment, fits, problem, allowed, f"batch.ramp_increment={rows}")
    rises = (size - start) // increment
    yield Rule(
        "batch.ramp_steps",
        steps,
        steps >= rises,
        f"the batch grows {rises} times",
        f"{rises} or more",
        f"batch.ramp_steps={100 * rises}",
    )


def _of_lengths(batch: schema.BatchConfig, *, seq_len: int) -> Iterator[Rule]:
    """Rows that are cut into pieces in the first steps."""
    start, steps = batch.seq_len_start, batch.seq_len_steps
    problem, instead = (
        "batch.seq_len_start=0: rows stay whole",
        f"batch.seq_len_start={max(1, seq_len // 4)}, or batch.seq_len_steps=0",
    )
    yield Rule("batch.seq_len_steps", steps, start > 0 or steps == 0, problem, "0", instead)
    if start == 0:
        return
    lengths = [seq_len >> number for number in range(1, seq_len.bit_length()) if seq_len % (1 << number) == 0]
    problem, allowed = (
        f"lengths double from it to data.seq_len={seq_len}",
        ", ".join(map(str, lengths)) or "0: this data.seq_len cannot be halved",
    )
    yield Rule(
        "batch.seq_len_start",
        start,
        start in lengths,
        problem,
        allowed,
        f"batch.seq_len_start={lengths[-1] if lengths else 0}",
    )
    rises = lengths.index(start) + 1
    yield Rule(
        "batch.seq_len_steps",
        steps,
        steps >= rises,
        f"the length doubles {rises} times",
        f"{rises} or more",
        f"batch.seq_len_steps={100 * rises}",
    )
