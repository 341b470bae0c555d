"""What `hybridtrain compare` found (compare.json) as a table: in its own page, and in that of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybridtrain.report import page

HEAD = ("", "MB", "bits", "perplexity", "change, %", "KL, nats", "top-1, %", "SNR, dB")
Cells = Sequence[tuple[str, ...]]


def cells(result: Mapping[str, Any]) -> Cells:
    """A line for the reference, and for each that was compared with it."""
    first = result["reference"]
    size, perplexity = f"{first['bytes'] / 1e6:.2f}", _perplexity(first)
    return [
        (str(first["name"]), size, "", perplexity, "reference", "", "", ""),
        *(_cells_of(each) for each in result["candidates"]),
    ]


def _cells_of(each: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(each["name"]),
        f"{each['bytes'] / 1e6:.2f}",
        "" if each["bits"] is None else f"{each['bits']:.2f}",
        _perplexity(each),
        _mean(each["loss_change"], 100, "+.3f"),
        _mean(each["kl"], 1, ".1e"),
        f"{100 * each['same_top1']:.2f}",
        "" if each["logit_snr_db"] is None else f"{each['logit_snr_db']:.1f}",
    )


def _perplexity(each: Mapping[str, Any]) -> str:
    value = each["perplexity"]
    return "infinite" if value is None or math.isinf(value) else f"{value:.4f}"


def _mean(mean: Mapping[str, float | None], factor: float, form: str) -> str:
    value, error = mean["mean"], mean["error"]
    if value is None:
        return ""
    return f"{value * factor:{form}}" + ("" if error is None else f" ± {error * factor:{form.lstrip('+')}}")


def of_lines(lines: Iterable[str]) -> tuple[Cells, int]:
    """(cells of the table of a compare.json, empty without one; 1 for a file that cannot be read)."""
    text = "".join(lines)
    try:
        return (cells(json.loads(text)) if text else []), 0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return [], 1


def section(rows: Cells) -> str:
    """The table; empty without rows."""
    return page.table(HEAD, rows, numbers=range(1, len(HEAD)))
