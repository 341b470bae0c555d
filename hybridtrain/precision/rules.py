"""Which linear layer multiplies in which format: precision.compute, and exceptions.

In this order: the first of precision.rules that matches a layer's path; high for routers, and for the first
and last layers that precision.high_first and high_last name; else precision.compute.

Everything else is high, in the format of precision.kind: norms, softmax, head, loss, embeddings, experts
whose weights are one tensor.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.errors import refusal
from hybridtrain.plan.formats import BLOCK, CARRIERS, FORMATS, HIGH, SCHEMES

if TYPE_CHECKING:
    from hybridtrain.models.linears import Linear


def format_of(linear: Linear, precision: PrecisionConfig) -> str:
    """The name of a linear layer's format, or HIGH."""
    if (named := _named(linear, precision)) is not None:
        return high_if_same(named, precision)
    ends = linear.layer < precision.high_first or linear.layer >= linear.layers - precision.high_last
    return HIGH if linear.router or ends else high_if_same(_default(precision), precision)


def adapts(linear: Linear, precision: PrecisionConfig) -> bool:
    """Whether adaptive precision changes a layer's format: not if a rule names it, or it is high."""
    named = _named(linear, precision) is not None
    return precision.adaptive and not named and format_of(linear, precision) == precision.compute


def _named(linear: Linear, precision: PrecisionConfig) -> str | None:
    """The format that the first rule which matches gives a layer."""
    matching = (rule for rule in precision.rules if fnmatch.fnmatchcase(linear.path, rule["match"]))
    return next((rule["compute"] for rule in matching), None)


def names_of(precision: PrecisionConfig) -> set[str]:
    """All formats that a config names for linear layers, but HIGH."""
    chosen = [_default(precision), *precision.ladder, *(rule["compute"] for rule in precision.rules)]
    return {high_if_same(name, precision) for name in chosen} - {HIGH}


def described(precision: PrecisionConfig) -> str:
    """A precision in one word or two, e.g. "bf16_mixed fp8_tensorwise"."""
    return " ".join([precision.kind, *sorted(names_of(precision))])


def has_loss_scale(precision: PrecisionConfig) -> bool:
    """Whether gradients may be too small for their format, fp16."""
    return precision.kind == "fp16_mixed" or "fp16" in names_of(precision)


def has_dynamic_scale(precision: PrecisionConfig) -> bool:
    """Whether the loss scale adapts."""
    return has_loss_scale(precision) and precision.static_scale is None


def _default(precision: PrecisionConfig) -> str:
    emulated = precision.kind == "tf32" and precision.emulate
    return precision.compute or ("tf32" if emulated else "")


def schemes(linears: Sequence[Linear], precision: PrecisionConfig) -> dict[str, str]:
    """Path -> scheme of the layers whose weights are rounded in training."""
    names = {linear.path: format_of(linear, precision) for linear in linears}
    return {path: SCHEMES[name] for path, name in names.items() if name in SCHEMES}


def high_if_same(name: str, precision: PrecisionConfig) -> str:
    """HIGH for the format that precision.kind has anyway."""
    return HIGH if name in ("", CARRIERS[precision.kind]) else name


def check(linears: Sequence[Linear], precision: PrecisionConfig) -> None:
    """Refuse rules that match no linear layer of the model, and formats that none takes (UserError)."""
    left = {linear.path for linear in linears}
    for rule in precision.rules:
        pattern = rule["match"]
        found = {linear.path for linear in linears if fnmatch.fnmatchcase(linear.path, pattern)}
        if not found:
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", linear.path) for linear in linears})
            near = difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.3) or kinds[:3]
            raise refusal(
                "precision.rules",
                pattern,
                "it matches no linear layer inside the model's layers; patterns must match whole paths, and "
                "head, embedding and norms are high always",
                allowed=", ".join(kinds),
                instead=f"match: '{near[0]}'",
            )
        if not found & left:
            raise refusal(
                "precision.rules",
                pattern,
                "all that it matches is matched by rules before it, and the first match counts",
                allowed="rules from the particular to the general",
                instead="this rule before the others",
            )
        left -= found
    _check_groups(linears, precision)
    named = names_of(precision) and all(format_of(linear, precision) == HIGH for linear in linears)
    if named or (precision.adaptive and not any(adapts(linear, precision) for linear in linears)):
        raise refusal(
            "precision.compute",
            precision.compute,
            "no linear layer takes it: all are high, by rules, precision.high_first and precision.high_last",
            allowed="options that leave it a layer",
            instead="smaller precision.high_first and precision.high_last",
        )


def _check_groups(linears: Sequence[Linear], precision: PrecisionConfig) -> None:
    """Refuse weights whose rows are not whole groups, as `hybridtrain quantize` does (raises UserError)."""
    for linear in linears:
        name = format_of(linear, precision)
        if name in SCHEMES and FORMATS[name].scale == "block" and linear.inputs % BLOCK:
            raise refusal(
                "precision.compute",
                name,
                f"{linear.path} has rows of {linear.inputs} weights, which are not whole groups of {BLOCK}",
                allowed="rows of whole groups",
                instead=f"precision.rules=[{{match: '{linear.path}', compute: high}}], or qat_int8",
            )


_READ_WITH: tuple[tuple[Callable[[PrecisionConfig], bool], tuple[str, ...], str], ...] = (
    (
        has_dynamic_scale,
        ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "min_scale"),
        "no loss scale adapts",
    ),
    (lambda p: p.adaptive, ("adaptive_patience", "adaptive_budget"), "precision.adaptive is false"),
    (lambda p: p.monitor_every > 0, ("monitor_modules",), "precision.monitor_every is 0"),
)
"""(when they are read, options, what is so otherwise). hysteresis is left out: it is in every older run."""


def idle_options(precision: PrecisionConfig) -> list[str]:
    """Lines about options that were set and do nothing. Not refused: runs of earlier versions go on."""
    default = PrecisionConfig()
    return [
        f"precision.{name}={getattr(precision, name)} does nothing: {why}"
        for is_read, names, why in _READ_WITH
        if not is_read(precision)
        for name in names
        if getattr(precision, name) != getattr(default, name)
    ]


def check_options(precision: PrecisionConfig) -> None:
    """Refuse options that would do nothing (raises UserError)."""
    if precision.static_scale is not None and not has_loss_scale(precision):
        raise refusal(
            "precision.static_scale",
            precision.static_scale,
            f"precision.kind={precision.kind} has no loss scale",
            allowed="null without products in fp16",
            instead="precision=fp16_mixed, or without precision.static_scale",
        )
    if precision.emulate and not names_of(precision) - SCHEMES.keys():
        raise refusal(
            "precision.emulate",
            "true",
            f"precision.kind={precision.kind} has no format to emulate",
            allowed="false without precision.compute and precision.rules",
            instead="precision=fp8_tensorwise precision.emulate=true",
        )


@dataclass(frozen=True)
class Row:
    """A line of the table of formats."""

    format: str
    modules: int
    parameters: int
    share: float
    """Part of the matrix products with weights, of the whole model."""


def table(linears: Sequence[Linear], precision: PrecisionConfig, *, head: int) -> list[Row]:
    """A row for each format of the whole model. `head`: parameters of the head, which is high."""
    sizes: dict[str, list[int]] = {}
    for linear in linears:
        name = format_of(linear, precision)
        sizes.setdefault(name, []).append(linear.inputs * linear.outputs)
    high = sizes.pop(HIGH, [])
    total = sum(map(sum, sizes.values())) + sum(high) + head
    return [
        Row(name, len(of_name), sum(of_name), sum(of_name) / total)
        for name, of_name in [*sizes.items(), (HIGH, [*high, head])]
    ]
