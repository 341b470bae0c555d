"""Checks of the formats of linear layers: precision.compute, precision.rules."""

from __future__ import annotations

import itertools

from hybridtrain.config import schema
from hybridtrain.config.keys import nearest_name
from hybridtrain.config.section_checks import require
from hybridtrain.errors import refusal
from hybridtrain.plan.formats import CARRIERS, FORMATS, HIGH, SCHEMES, is_wider

_RULE = {"match", "compute"}


def check_engine(config: schema.Config) -> None:
    """Raise UserError for what another section does not allow: compiled layers in fp64, which computes under
    a mode of torch's functions, another precision of products than that of tf32, ends of the run at numbers
    that adaptive precision waits for, adapters on weights that are rounded.
    """
    _rounded(config)
    lower, policy = config.precision.ladder[:-1], config.train.on_nonfinite
    require(
        "fp16" not in lower or policy == "skip",
        "train.on_nonfinite",
        policy,
        "adaptive precision promotes a layer that overflows fp16 after the step, which must not end the run, "
        "nor undo the promotion",
        allowed="skip with fp16 below the top of precision.ladder",
        instead="train.on_nonfinite=skip",
    )
    matmul = config.engine.fp32_matmul
    require(
        config.precision.kind != "tf32" or matmul in ("auto", "high"),
        "engine.fp32_matmul",
        matmul,
        "precision.kind=tf32 computes products in high",
        allowed="auto, high",
        instead="engine.fp32_matmul=auto",
    )
    require(
        not (config.engine.compile and config.precision.kind == "fp64"),
        "engine.compile",
        True,
        "not with precision.kind=fp64",
        allowed="false",
        instead="engine.compile=false",
    )


def _rounded(config: schema.Config) -> None:
    """Quantisation-aware training is of the weights that are exported."""
    compute = config.precision.compute
    rounded = [rule for rule in config.precision.rules if rule["compute"] in SCHEMES]
    require(
        config.adapters.kind == "none" or not (rounded or compute in SCHEMES),
        "precision.compute" if compute in SCHEMES else "precision.rules",
        compute if compute in SCHEMES else rounded,
        "adapters are merged into the weights before these are quantised, and training would round others",
        allowed="formats without qat",
        instead="adapters=none, or precision=bf16_mixed",
    )


def check_fixed(precision: schema.PrecisionConfig, *, command: str) -> None:
    """Raise UserError for adaptive precision in a command that repeats a few steps, and adapts nothing."""
    require(
        not precision.adaptive,
        "precision.adaptive",
        True,
        f"{command} makes a few steps, in formats that do not change",
        allowed="false",
        instead="precision.adaptive=false precision.ladder=[]",
    )


def check(precision: schema.PrecisionConfig) -> None:
    """Raise UserError for formats that do not exist, or are wider than what precision.kind exchanges."""
    if precision.compute:
        _format("precision.compute", precision.compute, precision, also=(), option="precision.compute={}")
    for number, rule in enumerate(precision.rules):
        field = f"precision.rules[{number}]"
        require(
            isinstance(rule, dict)
            and rule.keys() == _RULE
            and all(isinstance(v, str) for v in rule.values()),
            field,
            rule,
            "not a pattern and a format",
            allowed="{match: PATTERN, compute: FORMAT}",
            instead="{match: '*.down_proj', compute: high}",
        )
        option = "compute: {} inside the rule"
        _format(f"{field}.compute", rule["compute"], precision, also=(HIGH,), option=option)
    _adaptive(precision)
    for field, value in (("high_first", precision.high_first), ("high_last", precision.high_last)):
        require(
            not value or bool(precision.compute),
            f"precision.{field}",
            value,
            "all linear layers are high, since precision.compute is empty",
            allowed="0 without precision.compute",
            instead="precision.compute=fp8_tensorwise",
        )


def _adaptive(precision: schema.PrecisionConfig) -> None:
    ladder = precision.ladder
    if not precision.adaptive:
        require(
            not ladder,
            "precision.ladder",
            ladder,
            "only adaptive precision has one",
            allowed="[] without precision.adaptive",
            instead="precision.adaptive=true",
        )
        return
    _ladder(ladder, precision)
    require(
        precision.compute == ladder[0],
        "precision.compute",
        precision.compute,
        "layers start on the lowest rung of precision.ladder",
        allowed=ladder[0],
        instead=f"precision.compute={ladder[0]}",
    )
    require(
        precision.monitor_every > 0,
        "precision.monitor_every",
        precision.monitor_every,
        "adaptive precision decides on what the monitor samples, and it samples never",
        allowed="above 0 with precision.adaptive",
        instead="precision.monitor_every=10",
    )
    require(
        precision.monitor_modules == ["*"],
        "precision.monitor_modules",
        precision.monitor_modules,
        "adaptive precision needs samples of all linear layers",
        allowed="['*'] with precision.adaptive",
        instead="precision.rules for the layers that are not to adapt",
    )


def _ladder(ladder: list[str], precision: schema.PrecisionConfig) -> None:
    """Formats from narrow to wide, each of which a histogram of a tensor can judge."""
    fitting = _sorted(ladder, precision)
    instead = f"precision.ladder=[{','.join(fitting)}]"
    if precision.compute != fitting[0]:
        instead += f" precision.compute={fitting[0]}"
    require(
        len(ladder) > 1,
        "precision.ladder",
        ladder,
        "adaptive precision needs a format to start with, and one to go to",
        allowed="two formats or more",
        instead=instead,
    )
    for number, name in enumerate(ladder):
        others = [*ladder[:number], "{}", *ladder[number + 1 :]]
        option = f"precision.ladder=[{','.join(others)}]"
        _format(f"precision.ladder[{number}]", name, precision, also=(), option=option)
        require(
            name not in SCHEMES,
            "precision.ladder",
            ladder,
            f"{name} is what the weights are to be stored in, whether their numbers fit it or not",
            allowed="formats in which layers multiply",
            instead=f"precision.adaptive=false precision.ladder=[] precision.compute={name}",
        )
    for lower, upper in itertools.pairwise(ladder):
        require(
            FORMATS[lower].scale != "block",
            "precision.ladder",
            ladder,
            f"a histogram of a whole tensor does not tell whether its numbers fit {lower}, whose blocks have "
            "scales of their own",
            allowed="formats with a scale for a tensor or a row, or without",
            instead=instead,
        )
        require(
            is_wider(upper, lower),
            "precision.ladder",
            ladder,
            f"{upper} is no wider than {lower}",
            allowed="each format wider than the one before",
            instead=instead,
        )


def _sorted(ladder: list[str], precision: schema.PrecisionConfig) -> list[str]:
    """The formats of `ladder` that can be on one, from narrow to wide; of fewer than two, another ladder."""
    wide = {
        FORMATS[name].order: name
        for name in ladder
        if name in FORMATS and name not in SCHEMES and FORMATS[name].scale != "block"
    }
    return (
        [wide[order] for order in sorted(wide)]
        if len(wide) > 1
        else ["fp8_tensorwise", CARRIERS[precision.kind]]
    )


def _format(
    field: str, name: str, precision: schema.PrecisionConfig, *, also: tuple[str, ...], option: str
) -> None:
    """`option`: how a format is written there, for {}."""
    carrier, in_rule = CARRIERS[precision.kind], field.startswith("precision.rules")
    known = (*FORMATS, *also)
    require(
        name in known,
        field,
        name,
        "no such format",
        allowed=", ".join(known),
        instead=option.replace("{}", nearest_name(name, known)),
    )
    require(
        name != "fp32" or precision.kind != "tf32" or precision.emulate,
        field,
        name,
        "with precision.kind=tf32 a GPU multiplies all fp32 operands in TF32",
        allowed="tf32 and narrower formats",
        instead="precision.kind=fp32"
        + (f" precision.compute={precision.compute or 'tf32'}, with this rule" if in_rule else ""),
    )
    if name in FORMATS and name != carrier and is_wider(name, carrier):
        kind = "fp64" if name == "fp64" else "fp32"
        raise refusal(
            field,
            name,
            f"it is wider than what linear layers exchange with precision.kind={precision.kind}: inputs and "
            f"weights would be rounded to {carrier} before",
            allowed=f"{carrier} and narrower formats",
            instead=f"precision.kind={kind}"
            + (f" precision.compute={precision.compute or carrier}, with this rule" if in_rule else ""),
        )
