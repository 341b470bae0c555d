"""samples.jsonl of a run, and its place in the page: the newest texts, and earlier ones to open."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hybridtrain.report import page
from hybridtrain.runtime.files import number

MOST_SAMPLES = 100
"""Evaluations whose texts are in the page: the newest."""


@dataclass(frozen=True)
class Sample:
    """What the model made of each prompt after `step` steps."""

    step: int
    texts: tuple[tuple[str, str], ...]
    """(prompt, continuation)."""


def of_lines(lines: Iterable[str]) -> tuple[list[Sample], int]:
    """(samples in the order of their steps, number of damaged lines)."""
    samples, bad = [], 0
    for line in lines:
        try:
            values = json.loads(line)
            if (step := number(values["step"])) is None:
                raise ValueError("no step")
            texts = tuple((str(each["prompt"]), str(each["text"])) for each in values["samples"])
            samples.append(Sample(int(step), texts))
        except (ValueError, KeyError, TypeError, RecursionError):
            bad += line.endswith("\n")  # a line without its end is still being written
    return sorted(samples, key=lambda sample: sample.step), bad


def section(samples: Sequence[Sample]) -> str:
    """The newest first; empty without any."""
    if not samples:
        return ""
    newest, *earlier = list(reversed(samples))[:MOST_SAMPLES]
    older = "".join(
        f"<details><summary>step {sample.step:,}</summary>{_table(sample)}</details>" for sample in earlier
    )
    beyond = len(samples) - MOST_SAMPLES
    note = f'<p class="note">{beyond:,} more are in samples.jsonl.</p>' if beyond > 0 else ""
    return f'<p class="note">After step {newest.step:,}</p>{_table(newest)}{older}{note}'


def _table(sample: Sample) -> str:
    rows = [tuple(page.Markup(f"<pre>{page.escape(text)}</pre>") for text in texts) for texts in sample.texts]
    return page.table(("prompt", "continuation"), rows, numbers=())
