"""The table of `hybridtrain compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridtrain.quantize.measure import Mean, Measured
from hybridtrain.quantize.walk import Quantised


def reference(name: str, measured: Measured, *, stored: int) -> dict[str, Any]:
    """The row of the reference."""
    loss = measured.mean("loss").value
    return {
        "name": name,
        "bytes": stored,
        "tokens": measured.tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
    }


def row(name: str, measured: Measured, *, stored: int, layers: Sequence[Quantised]) -> dict[str, Any]:
    """The row of a model that is compared."""
    loss = measured.mean("other_loss").value
    return {
        "name": name,
        "bytes": stored,
        "bits": _bits(layers),
        "loss": loss,
        "perplexity": math.exp(loss),
        "loss_change": _mean(measured.change),
        "kl": _mean(measured.mean("kl")),
        "same_top1": measured.mean("same").value,
        "logit_snr_db": measured.snr if math.isfinite(measured.snr) else None,
        "output_errors": {each.linear.path: each.error for each in layers if each.error is not None},
    }


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
        ]
    )


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
