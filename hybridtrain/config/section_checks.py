"""Checks within one section (`RULES`), and the functions they are written
with: `require`, `one_of`, `in_range`.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable
from typing import Any

from hybridtrain import registry
from hybridtrain.config import schema
from hybridtrain.config.keys import ADAPTERS, nearest_name
from hybridtrain.errors import refusal

BYTES = 256  # a byte-level BPE vocabulary has one token per byte, plus the end-of-text token


def require(holds: bool, field: str, value: object, problem: str, *, allowed: str, instead: str) -> None:
    """Raise UserError about `value` of the option `field` unless `holds`."""
    if not holds:
        raise refusal(field, value, problem, allowed=allowed, instead=instead)


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError, suggesting the nearest name, unless `value` is in `allowed`."""
    instead = f"{field}={nearest_name(value, allowed)}"
    require(
        value in allowed,
        field,
        value,
        "not one of the kinds there are",
        allowed=", ".join(allowed),
        instead=instead,
    )


def in_range(
    field: str, value: float, holds: Callable[[float], bool], *, allowed: str, instead: object
) -> None:
    """Raise UserError unless `value` is finite and `holds(value)`."""
    require(
        math.isfinite(value) and holds(value),
        field,
        value,
        "out of range",
        allowed=allowed,
        instead=f"{field}={instead}",
    )


def _parallel(parallel: schema.ParallelConfig) -> None:
    zero, instead = parallel.zero_stage, "parallel.zero_stage=1 with parallel.dp_shard > 1"
    require(
        zero in (0, 1, 2, 3),
        "parallel.zero_stage",
        zero,
        "no such ZeRO stage",
        allowed="0, 1, 2, 3",
        instead=instead,
    )


def _optim(optim: schema.OptimConfig) -> None:
    in_range("optim.lr", optim.lr, lambda lr: lr > 0, allowed="above 0", instead="3e-4")
    in_range("optim.eps", optim.eps, lambda eps: eps > 0, allowed="above 0", instead="1e-8")
    betas = optim.betas
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "optim.betas",
        betas,
        "not two decay rates",
        allowed="two numbers of at least 0 and below 1",
        instead="optim.betas=[0.9,0.95]",
    )
    in_range("optim.ema", optim.ema, lambda decay: 0 <= decay < 1, allowed="0 to below 1", instead="0.999")
    _optimizer_options(optim)
    for number, rule in enumerate(optim.rules):
        _optimizer_rule(f"optim.rules[{number}]", rule)


MOST = 1e4
_READ_BY = {
    "betas": ("adamw", "lion", "muon"),
    "eps": ("adamw", "muon"),
    "momentum": ("sgd", "muon", "adafactor"),
    "nesterov": ("sgd", "muon"),
}
"""Option -> the built-in optimizers that read it."""


def _optimizer_options(optim: schema.OptimConfig) -> None:
    in_range("optim.momentum", optim.momentum, lambda m: 0 <= m < 1, allowed="0 to below 1", instead="0.9")
    require(
        not optim.nesterov or optim.momentum > 0,
        "optim.nesterov",
        "true",
        "it looks ahead along the momentum, and optim.momentum is 0",
        allowed="false without momentum",
        instead="optim.momentum=0.9",
    )
    built_in = optim.kind in registry.BUILT_IN["optimizer"]
    for name, kinds in _READ_BY.items():
        value, usual = getattr(optim, name), getattr(schema.OptimConfig(), name)
        require(
            not built_in or optim.kind in kinds or value == usual,
            f"optim.{name}",
            value,
            f"optim.kind={optim.kind} reads none",
            allowed=f"{usual} here",
            instead=f"optim={kinds[0]}",
        )


def _optimizer_rule(field: str, rule: object) -> None:
    numbers = {"lr", "weight_decay"}
    given = rule if isinstance(rule, dict) else {}
    holds = isinstance(given.get("match"), str) and {"match"} < given.keys() <= {"match", *numbers}
    problem = "not a pattern with a learning rate, a weight decay or both"
    allowed, instead = "{match: PATTERN, lr: NUMBER, weight_decay: NUMBER}", "{match: '*.bias', lr: 1e-4}"
    require(holds, field, rule, problem, allowed=allowed, instead=instead)
    for name in sorted(numbers & given.keys()):
        value = given[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(
            number and (0 < value <= MOST if name == "lr" else 0 <= value <= MOST),
            f"{field}.{name}",
            value,
            "not such a number",
            allowed="above 0, up to 1e4" if name == "lr" else "0 to 1e4",
            instead="model.freeze for what is not to be trained" if name == "lr" else "0",
        )


def _schedule(schedule: schema.ScheduleConfig) -> None:
    require(
        schedule.decay_steps == 0 or schedule.kind == "wsd",
        "schedule.decay_steps",
        schedule.decay_steps,
        f"schedule.kind={schedule.kind} has no such phase",
        allowed="0 unless schedule.kind is wsd",
        instead="schedule=wsd",
    )


def _precision(precision: schema.PrecisionConfig) -> None:
    default = schema.PrecisionConfig().rounding
    require(
        precision.kind == "bf16_pure" or precision.rounding == default,
        "precision.rounding",
        precision.rounding,
        f"precision.kind={precision.kind} has master weights in fp32, which are not rounded",
        allowed=f"{default} (the default, unused) unless precision.kind is bf16_pure",
        instead="precision=bf16_pure, or without precision.rounding",
    )
    require(
        precision.kind != "fp64" or precision.state == "auto",
        "precision.state",
        precision.state,
        "precision.kind=fp64 has optimizer states in fp64",
        allowed="auto with precision.kind=fp64",
        instead="precision.state=auto",
    )
    in_range(
        "precision.min_scale", precision.min_scale, lambda scale: scale > 0, allowed="above 0", instead="1.0"
    )
    in_range(
        "precision.init_scale",
        precision.init_scale,
        lambda scale: scale >= precision.min_scale,
        allowed="precision.min_scale or more",
        instead="65536",
    )
    in_range(
        "precision.growth_factor",
        precision.growth_factor,
        lambda factor: factor > 1,
        allowed="above 1",
        instead="2.0",
    )
    in_range(
        "precision.backoff_factor",
        precision.backoff_factor,
        lambda factor: 0 < factor < 1,
        allowed="above 0 and below 1",
        instead="0.5",
    )
    require(
        bool(precision.monitor_modules) or not precision.monitor_every,
        "precision.monitor_modules",
        "[]",
        "the numerics monitor would watch nothing",
        allowed="patterns of modules",
        instead="precision.monitor_every=0, or precision.monitor_modules=['*']",
    )


def _model(model: schema.ModelConfig) -> None:
    for key in model.config:
        if ADAPTERS.search(str(key)):
            raise refusal(
                f"model.config.{key}",
                model.config[key],
                "low-rank adapters (LoRA) are no field of a model's config.json",
                allowed="the options of the section adapters",
                instead="adapters=lora adapters.rank=16",
            )
    if model.config and not model.from_pretrained and not model.config.get("model_type"):
        raise refusal(
            "model.config.model_type",
            "(missing)",
            "the fields belong to no architecture",
            allowed="llama, gpt2, gemma2, or another that docs/models.md lists",
            instead="model=nano, or model.config.model_type=llama",
        )


def _data(data: schema.DataConfig) -> None:
    in_range(
        "data.eval_fraction",
        data.eval_fraction,
        lambda share: 0 <= share < 1,
        allowed="0 or more, below 1",
        instead="0.02",
    )
    _encoding(data.encoding)
    for field, value in (
        ("data.text_key", data.text_key),
        ("data.messages_key", data.messages_key),
        ("data.dataset_split", data.dataset_split),
    ):
        require(
            bool(value),
            field,
            "''",
            "empty",
            allowed="a name",
            instead=f"{field}={getattr(schema.DataConfig(), field.partition('.')[2])}",
        )
    if data.tokenizer == "train":
        in_range(
            "data.vocab_size",
            data.vocab_size,
            lambda size: size > BYTES,
            allowed=f"above {BYTES} (one token per byte, and end of text)",
            instead="4096",
        )
    _blend(data)
    for option, given, empty in (
        ("data.path", data.path, "''"),
        ("data.blend", data.blend, "{}"),
        ("data.eval_path", data.eval_path, "''"),
    ):
        problem = f"data.kind={data.kind} takes its place"
        require(
            data.kind == "prepared" or not given,
            option,
            given,
            problem,
            allowed=empty,
            instead=f"{option}={empty}",
        )


def _encoding(name: str) -> None:
    try:
        known = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        known = False
    require(
        known,
        "data.encoding",
        name,
        "Python has no such text encoding",
        allowed="utf-8, latin-1, cp1251, koi8-r, utf-16, ...",
        instead="data.encoding=utf-8",
    )


def _blend(data: schema.DataConfig) -> None:
    for path, weight in data.blend.items():
        in_range(
            f"data.blend.{path}",
            weight,
            lambda share: share > 0,
            allowed="above 0",
            instead="0.5, or the blend without it",
        )
    require(
        not (data.blend and data.path),
        "data.path",
        data.path,
        "data.blend is set too",
        allowed="one of data.path and data.blend",
        instead="data.path='' with the blend",
    )


def _task(task: schema.TaskConfig) -> None:
    in_range("task.mask_rate", task.mask_rate, lambda rate: rate > 0, allowed="above 0", instead=0.15)
    classifies = ("classification", "token_classification", "question_answering")
    for name in ("label_smoothing", "z_loss"):
        require(
            task.kind != "question_answering" or getattr(task, name) == 0,
            f"task.{name}",
            getattr(task, name),
            "question_answering does not read it",
            allowed="0",
            instead=f"task.{name}=0",
        )
    for name in ("mask_rate", "tokens", "whole_words", "next_sentence"):
        value, default = getattr(task, name), getattr(schema.TaskConfig(), name)
        with_tokens = classifies if name == "tokens" else ()
        require(
            value == default or task.kind not in {"causal_lm", *classifies}.difference(with_tokens),
            f"task.{name}",
            value,
            f"task.kind={task.kind} masks no tokens",
            allowed=f"{default} without masked_lm",
            instead=f"task=masked_lm, or without task.{name}",
        )


RULES: dict[str, Callable[[Any], None]] = {
    "task": _task,
    "parallel": _parallel,
    "optim": _optim,
    "schedule": _schedule,
    "precision": _precision,
    "model": _model,
    "data": _data,
}
"""Section -> its check."""
