"""The table of `hybridtrain compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridtrain.quantize.measure import Mean, Measured
from hybridtrain.quantize.walk import Quantised

_MOST = 700.0
"""Nats, whose exponential is still a number."""


def reference(name: str, measured: Measured, *, stored: int) -> dict[str, Any]:
    """The row of the reference."""
    loss = measured.mean("loss").value
    return {
        "name": name,
        "bytes": stored,
        "tokens": measured.tokens,
        "loss": loss,
        "perplexity": _exp(loss),
    }


def row(name: str, measured: Measured, *, stored: int, layers: Sequence[Quantised]) -> dict[str, Any]:
    """The row of a model that is compared."""
    loss = measured.mean("other_loss").value
    return {
        "name": name,
        "bytes": stored,
        "bits": _bits(layers),
        "loss": loss,
        "perplexity": _exp(loss),
        "loss_change": _mean(measured.change),
        "kl": _mean(measured.mean("kl")),
        "same_top1": measured.mean("same").value,
        "logit_snr_db": measured.snr if math.isfinite(measured.snr) else None,
        "output_errors": {each.linear.path: each.error for each in layers if each.error is not None},
    }


def _exp(loss: float) -> float:
    """The perplexity; infinite beyond the largest number."""
    return math.exp(loss) if loss < _MOST else math.inf


def stored_bytes(model: Any, layers: Sequence[Quantised]) -> int:
    """Bytes of a model with quantised layers, the rest in bf16."""
    weights = sum(each.linear.outputs * each.linear.inputs for each in layers)
    bits = sum(each.scheme.stored_bits(each.linear.outputs, each.linear.inputs) for each in layers)
    rest = sum(parameter.numel() for parameter in model.parameters()) - weights
    return bits // 8 + 2 * rest


def _bits(layers: Sequence[Quantised]) -> float | None:
    """Of a weight in the quantised layers, with its share of scales."""
    if not layers:
        return None
    count = sum(each.linear.outputs * each.linear.inputs for each in layers)
    return sum(each.scheme.stored_bits(each.linear.outputs, each.linear.inputs) for each in layers) / count


def _mean(mean: Mean) -> dict[str, float | None]:
    return {"mean": mean.value, "error": mean.error if math.isfinite(mean.error) else None}


def text(result: Mapping[str, Any]) -> str:
    """The table as text, with its reference and what it was measured on."""
    first = result["reference"]
    rows = [first, *result["candidates"]]
    return "\n".join(
        [
            f"{result['rows']} held-out rows x {result['seq_len']} of {result['data']}, "
            f"{first['tokens']:,} tokens; +- standard errors over rows",
            "",
            *lines(rows),
            "",
            *_timed(result.get("timed")),
            *costs(rows),
            *_scores(rows),
        ]
    )


def _timed(how: Mapping[str, Any] | None) -> list[str]:
    """How speed was measured; nothing without."""
    if how is None:
        return []
    tokens = ", ".join(f"{count} tokens of {name}" for name, count in how["tokens"].items())
    words = (
        f"speed: {tokens}, batch 1, median of {how['rounds']} rounds (slowest to fastest) in turn with the "
        f"reference; {how['device']}, {how['threads']} thread{'s' if how['threads'] > 1 else ''}"
    )
    found = how["energy"]
    joules = (
        f"energy: {found}, with all else that it does" if found else "energy: no counter is readable here"
    )
    return [words, f"memory: loaded, and at most added by a pass; {joules}"]


def costs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row: memory, speed and energy, as far as they were measured, and what multiplies."""
    table = [["", *costs_head(rows)], *([str(each["name"]), *costs_of(each, rows)] for each in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]) - 1)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]]).rstrip()
        for row in table
    ]


def _passes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in rows for name in each.get("speed", {})))


def _counts(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether energy was measured."""
    figures = (figure for each in rows for figure in each.get("speed", {}).values())
    return any(figure["joules_per_token"] is not None for figure in figures)


def costs_head(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the columns of `costs_of`."""
    joules = ["J/token"] if _counts(rows) else []
    of_passes = [word for name in _passes(rows) for word in (f"{name} tokens/s", "x reference", *joules)]
    return ["loaded MB", *(["peak MB"] if of_passes else []), *of_passes, "product"]


def costs_of(each: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of one of the rows."""
    cells = [f"{each['resident_bytes'] / 1e6:.2f}"]
    names, counts = _passes(rows), _counts(rows)
    if names:
        cells.append("" if "peak_bytes" not in each else f"{each['peak_bytes'] / 1e6:.2f}")
    for name in names:
        figure = each.get("speed", {}).get(name)
        cells += [_rate(figure), _ratio(figure)]
        if counts:
            joules = figure and figure["joules_per_token"]
            cells.append("" if joules is None else f"{joules:.3g}")
    return [*cells, each["product"]]


def _rate(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return ""
    spread = f"{figure['tokens_per_s_least']:,.0f} to {figure['tokens_per_s_most']:,.0f}"
    return f"{figure['tokens_per_s']:,.0f} ({spread})"


def _ratio(figure: Mapping[str, float] | None) -> str:
    if figure is None or "ratio" not in figure:
        return ""
    return f"{figure['ratio']:.2f} ({figure['ratio_least']:.2f} to {figure['ratio_most']:.2f})"


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the lm-evaluation-harness found, a line for each score and row; nothing without."""
    found = scores(rows)
    width = max((len(name) for name, *_ in found), default=0)
    lines = [f"{name:{width}}  {task:<24}{metric:<24}{value:.4f}" for name, task, metric, value in found]
    return ["", *lines] if found else []


def scores(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, float]]:
    """(name of a row, task, metric, value), the same metric of all rows below one another."""
    found = [
        (str(each["name"]), task, metric, value)
        for each in rows
        for task, metrics in each.get("lm_eval", {}).items()
        for metric, value in metrics.items()
    ]
    order = list(dict.fromkeys((task, metric) for _, task, metric, _ in found))
    return sorted(found, key=lambda each: order.index((each[1], each[2])))


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row, below their names."""
    width = max([len(str(each["name"])) for each in rows] + [9])
    head = (
        f"{'':{width}}  {'MB':>8}  {'bits':>5}  {'perplexity':>10}  {'change %':>15}  {'KL':>19}  "
        f"{'top-1 %':>7}  {'SNR dB':>6}"
    )
    return [head, *(_line(each, width) for each in rows)]


def _line(each: Mapping[str, Any], width: int) -> str:
    start = f"{each['name']:{width}}  {each['bytes'] / 1e6:8.2f}  "
    if "kl" not in each:
        return f"{start}{'':5}  {each['perplexity']:10.4f}  reference"
    bits = "" if each["bits"] is None else f"{each['bits']:.2f}"
    snr = "" if each["logit_snr_db"] is None else f"{each['logit_snr_db']:.1f}"
    return (
        f"{start}{bits:>5}  {each['perplexity']:10.4f}  "
        f"{_with_error(each['loss_change'], 100, '+.3f'):>15}  {_with_error(each['kl'], 1, '.1e'):>19}  "
        f"{100 * each['same_top1']:7.2f}  {snr:>6}"
    )


def _with_error(mean: Mapping[str, float | None], factor: float, form: str) -> str:
    value, error = mean["mean"], mean["error"]
    assert value is not None
    small = form.removeprefix("+")
    return f"{value * factor:{form}}" + ("" if error is None else f" +-{error * factor:{small}}")
