"""Checks of the section adapters."""

from __future__ import annotations

import dataclasses

from hybridtrain.config import schema
from hybridtrain.config.section_checks import in_range, one_of, require
from hybridtrain.registry import BUILT_IN

KINDS = ("none", "lora")
BASE_FORMATS = ("none", "nf4", "int8")


def check(config: schema.Config, *, trains: bool) -> None:
    """Raise UserError for adapters that cannot be trained, and for options that would do nothing. `trains`:
    the command is one that trains a model of the user's.
    """
    settings, default = config.adapters, schema.AdaptersConfig()
    one_of("adapters.kind", settings.kind, KINDS)
    one_of("adapters.base_format", settings.base_format, BASE_FORMATS)
    if settings.kind == "none":
        for option in dataclasses.fields(settings):
            value = getattr(settings, option.name)
            require(
                value == getattr(default, option.name),
                f"adapters.{option.name}",
                value,
                "it does nothing: adapters.kind is none",
                allowed="the default without adapters",
                instead="adapters=lora with it",
            )
        return
    in_range("adapters.rank", settings.rank, lambda rank: rank >= 1, allowed="1 or more", instead=16)
    in_range("adapters.alpha", settings.alpha, lambda alpha: alpha > 0, allowed="above 0", instead=32)
    _together(config)
    if settings.base_format != "none":
        _with_codes(config)
    require(
        bool(config.model.from_pretrained) or not trains,
        "model.from_pretrained",
        "''",
        "the model's own weights are not trained with adapters, and would be new, random ones",
        allowed="a Hugging Face folder or hub id",
        instead="model.from_pretrained=Qwen/Qwen3-8B",
    )


def _together(config: schema.Config) -> None:
    """What other sections may not ask for."""
    frozen, kind = config.model.freeze, config.optim.kind
    require(
        not frozen,
        "model.freeze",
        frozen,
        "with adapters, all parameters of the model are frozen",
        allowed="[]",
        instead="adapters.match, which says what is trained",
    )
    require(
        kind != "muon",
        "optim.kind",
        kind,
        "muon is for the matrices of a model, not for the factors of adapters",
        allowed=", ".join(name for name in BUILT_IN["optimizer"] if name != "muon"),
        instead="optim=adamw",
    )
    require(
        "vocab_size" not in config.model.config or not config.model.from_pretrained,
        "model.config.vocab_size",
        config.model.config.get("vocab_size"),
        "rows of added tokens would not be trained with adapters",
        allowed="the size of model.from_pretrained",
        instead="without model.config.vocab_size",
    )


def _with_codes(config: schema.Config) -> None:
    """What cannot be with frozen weights that are stored in codes."""
    precision, instead = config.precision, "adapters.base_format=none"
    none: dict[str, object] = {"compute": "", "rules": [], "adaptive": False, "monitor_every": 0}
    for name, allowed in none.items():
        value = getattr(precision, name)
        require(
            value == allowed,
            f"precision.{name}",
            value,
            "not with frozen weights that are stored in codes (adapters.base_format)",
            allowed=f"{allowed or repr(allowed)}",
            instead=f"without precision.{name}, or {instead}",
        )
