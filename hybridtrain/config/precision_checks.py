"""Checks of the formats of linear layers: precision.compute, precision.rules."""

from __future__ import annotations

from hybridtrain.config import schema
from hybridtrain.config.keys import nearest_name
from hybridtrain.config.section_checks import require
from hybridtrain.errors import refusal
from hybridtrain.plan.formats import CARRIERS, FORMATS, HIGH, is_wider

_RULE = {"match", "compute"}


def check_compile(config: schema.Config) -> None:
    """Raise UserError for compiled layers in fp64, which computes under a mode of torch's functions."""
    require(
        not (config.engine.compile and config.precision.kind == "fp64"),
        "engine.compile",
        True,
        "not with precision.kind=fp64",
        allowed="false",
        instead="engine.compile=false",
    )


def check(precision: schema.PrecisionConfig) -> None:
    """Raise UserError for formats that do not exist, or are wider than what precision.kind exchanges."""
    if precision.compute:
        _format("precision.compute", precision.compute, precision, also=())
    for number, rule in enumerate(precision.rules):
        field = f"precision.rules[{number}]"
        require(
            rule.keys() == _RULE,
            field,
            dict(rule),
            "not a pattern and a format",
            allowed="{match: PATTERN, compute: FORMAT}",
            instead="{match: '*.down_proj', compute: high}",
        )
        _format(f"{field}.compute", rule["compute"], precision, also=(HIGH,))
    for field, value in (("high_first", precision.high_first), ("high_last", precision.high_last)):
        require(
            not value or bool(precision.compute),
            f"precision.{field}",
            value,
            "all linear layers are high, since precision.compute is empty",
            allowed="0 without precision.compute",
            instead="precision.compute=fp8_tensorwise",
        )


def _format(field: str, name: str, precision: schema.PrecisionConfig, *, also: tuple[str, ...]) -> None:
    known = (*FORMATS, *also)
    require(
        name in known,
        field,
        name,
        "no such format",
        allowed=", ".join(known),
        instead=f"{field}={nearest_name(name, known)}",
    )
    carrier = CARRIERS[precision.kind]
    if name in FORMATS and name != carrier and is_wider(name, carrier):
        kind = "fp64" if name == "fp64" else "fp32"
        raise refusal(
            field,
            name,
            f"it is wider than what linear layers exchange with precision.kind={precision.kind}: inputs and "
            f"weights would be rounded to {carrier} before",
            allowed=f"{carrier} and narrower formats",
            instead=f"precision.kind={kind} precision.compute={carrier}, with this rule",
        )
