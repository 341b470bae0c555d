"""Merges model.config into the fields of a model's config.json, in one notation and without outdated
derived fields. No torch.

    config.json (old or new notation)  +  model.config  ->  new notation  ->  build.hf_config,
    which checks the result

config.json has rotary fields in one of two notations (`rope_theta` and `rope_scaling`, or both inside
`rope_parameters`), and files written by transformers 5 have fields derived from others (`layer_types`,
`head_dim`). Given contradicting fields, transformers silently uses one of them.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from hybridtrain.errors import UserError, refusal
from hybridtrain.models.plain import TYPES

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
"""Rotary fields of config.json."""
_ALWAYS = ("rope_theta", "rope_type", "partial_rotary_factor")
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("original_max_position_embeddings", "attention_factor", "factor"),
    ),
}
"""rope_type -> (required keys, optional keys), besides _ALWAYS."""
_KNOWN = {*_ALWAYS, *(key for needs, may in ROPE_TYPES.values() for key in (*needs, *may))}
_LAYER_TYPES_FOLLOW = ("num_hidden_layers", "use_sliding_window", "sliding_window", "max_window_layers")
_WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_HEAD_DIM_FOLLOWS = ("llama", "mistral")
"""Families whose head_dim is hidden_size / num_attention_heads unless config.json has one."""


def merge(source: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json `source`, overridden by the user's `chosen`; mappings are merged by key.

    Raises UserError. If the user chose rotary fields, they become `rope_parameters`. Fields of the source
    that are derived from a chosen one are dropped, unless they are chosen, too.
    """
    for key in ("dtype", "torch_dtype"):
        if chosen.get(key) not in (None, "float32"):
            words = "a precision recipe decides the dtypes of training, export.dtype that of an export"
            raise refusal(
                f"model.config.{key}",
                chosen[key],
                words,
                allowed="float32, or leave it out",
                instead="precision=bf16_mixed",
            )
    chosen = {key: value for key, value in chosen.items() if key not in ("dtype", "torch_dtype")}
    rope = _rope(source, chosen)
    if rope is not None:
        source, chosen = (
            {key: value for key, value in fields.items() if key not in ROPE} for fields in (source, chosen)
        )
    result = _deep(_without_derived(source, chosen), chosen)
    return result if rope is None else {**result, "rope_parameters": rope}


def _deep(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        before = result.get(key)
        result[key] = (
            _deep(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
        )
    return result


# -- rotary positions ----------------------------------------------------------------------------------------


def _rope(source: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any] | None:
    """The merged rotary fields in the new notation; None if the user chose none."""
    if not any(key in chosen for key in ROPE):
        return None
    if of_layer_types(chosen.get("rope_parameters")):
        before = source.get("rope_parameters") if of_layer_types(source.get("rope_parameters")) else None
        return {**(before or {}), **chosen["rope_parameters"]}
    if chosen.get("model_type", source.get("model_type")) not in TYPES and "rope_parameters" in chosen:
        # Keys of its own: that they are in the built config is checked later (build.py).
        return {**rope_of(source), **chosen["rope_parameters"]}
    rope_chosen, base = _chosen_rope(chosen), rope_of(source)
    kind = rope_chosen.get("rope_type") or base.get("rope_type") or "default"
    if kind not in ROPE_TYPES:
        near = difflib.get_close_matches(str(kind), ROPE_TYPES, n=1, cutoff=0.3)
        where = _where(chosen, "rope_type")
        raise refusal(
            where,
            kind,
            "no such kind of rotary positions",
            allowed=", ".join(ROPE_TYPES),
            instead=f"{where}={near[0] if near else 'default'}",
        )
    if kind != base.get("rope_type", "default"):  # drop keys of the other type
        base = {key: value for key, value in base.items() if key in _ALWAYS}
    rope = {
        key: value for key, value in {**base, **rope_chosen, "rope_type": kind}.items() if value is not None
    }
    needs, may = ROPE_TYPES[kind]
    for key in rope_chosen:
        _check_rope_key(key, rope_chosen[key], chosen=chosen, kind=kind, takes=(*_ALWAYS, *needs, *may))
    missing = [key for key in needs if key not in rope]
    if missing:
        words = f"rope_type={kind} needs {', '.join(needs)}"
        raise refusal(
            _where(chosen, missing[0]),
            "(missing)",
            words,
            allowed="all of them",
            instead=f"{_where(chosen, missing[0])}=VALUE",
        )
    return rope


def of_layer_types(rope: Any) -> bool:
    """Whether rotary fields are those of each type of layers, as {full_attention: {rope_type: ...}}."""
    return (
        isinstance(rope, Mapping)
        and any(isinstance(value, Mapping) for value in rope.values())
        and all(value is None or isinstance(value, Mapping) for value in rope.values())
    )


def rope_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields that transformers reads from config.json `fields`, in the
    new notation; empty: defaults.
    """
    value = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(value, Mapping):
        raise _no_mapping("rope_scaling" if fields.get("rope_scaling") else "rope_parameters", value)
    rope = dict(value)
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if fields.get(key) is not None:
            rope.setdefault(key, fields[key])
    return rope


def _chosen_rope(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The user's rotary fields in one notation. Raises UserError for contradictions."""
    rope: dict[str, Any] = {}
    names: dict[str, str] = {}
    for field in ROPE:
        if field not in chosen:
            continue
        value = chosen[field]
        if field in ("rope_scaling", "rope_parameters"):
            if value is not None and not isinstance(value, Mapping):
                raise _no_mapping(field, value)
            parts = (
                {f"{field}.{key}": item for key, item in value.items()}
                if value is not None
                else {f"{field}.rope_type": "default"}
            )
        else:
            parts = {field: value}
        for name, item in parts.items():
            key = name.rpartition(".")[2]
            key = "rope_type" if key == "type" else key
            if key in rope and rope[key] != item:
                words = f"model.config.{names[key]}={rope[key]} says otherwise"
                raise refusal(
                    f"model.config.{name}",
                    item,
                    words,
                    allowed="one of the two",
                    instead=f"model.config.{names[key]}={item}",
                )
            rope[key], names[key] = item, name
    return rope


def _check_rope_key(
    key: str, value: Any, *, chosen: Mapping[str, Any], kind: str, takes: tuple[str, ...]
) -> None:
    if value is None or key in takes:
        return
    where = _where(chosen, key)
    if key in _KNOWN:
        words = f"rope_type={kind} does not take it"
        whole = (
            where.rpartition(".")[0]
            + "={rope_type:"
            + kind
            + ","
            + ",".join(f"{name}:VALUE" for name in ROPE_TYPES[kind][0])
            + "}"
        )
        raise refusal(
            where,
            value,
            words,
            allowed=", ".join(takes),
            instead=f"{where}=null, or {whole.replace(',}', '}')}",
        )
    near = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.3)
    instead = f"{where.rpartition('.')[0]}.{near[0]}={value}" if near else "leave it out"
    raise refusal(
        where, value, "rotary positions have no such key", allowed=", ".join(sorted(_KNOWN)), instead=instead
    )


def _where(chosen: Mapping[str, Any], key: str) -> str:
    """The option in which the user set `key`, or could set it."""
    if key in chosen and key in ROPE:
        return f"model.config.{key}"
    for field in ("rope_parameters", "rope_scaling"):
        value = chosen.get(field)
        if isinstance(value, Mapping):
            return f"model.config.{field}.{'type' if key == 'rope_type' and 'type' in value else key}"
    return f"model.config.rope_parameters.{key}"


def _no_mapping(field: str, value: Any) -> UserError:
    return refusal(
        f"model.config.{field}",
        value,
        "not a mapping",
        allowed="{rope_type: linear, factor: 4.0} and the like, or null",
        instead="null",
    )


def numbers(value: Any) -> Any:
    """A copy of config.json fields in which infinities are numbers: transformers writes them as
    {"__float__": "Infinity"}.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: numbers(each) for key, each in value.items()}
    return [numbers(each) for each in value] if isinstance(value, list) else copy.deepcopy(value)


def same(effective: Any, value: Any) -> bool:
    """Whether a field of a transformers config is what was chosen; of a config in it, the fields chosen."""
    if isinstance(value, Mapping) and isinstance(effective, Mapping):
        return all(key in effective and same(effective[key], each) for key, each in value.items())
    return bool((list(effective) if isinstance(effective, tuple) else effective) == value)


# -- derived fields
# ------------------------------------------------------------------------------------------------


def _without_derived(source: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`source` without the fields that are derived from those the user changes."""
    result = dict(source)
    changed = {key for key, value in chosen.items() if source.get(key) != value}
    kind = chosen.get("model_type", source.get("model_type"))
    heads, hidden = _whole(source.get("num_attention_heads")), _whole(source.get("hidden_size"))
    followed = kind in _HEAD_DIM_FOLLOWS and heads and hidden and source.get("head_dim") == hidden // heads
    if followed and changed & {"num_attention_heads", "hidden_size"}:
        result.pop("head_dim")
    if "num_attention_heads" in changed and heads and source.get("num_key_value_heads") == heads:
        result["num_key_value_heads"] = chosen["num_attention_heads"]
    if (
        source.get("layer_types") is not None
        and "layer_types" not in chosen
        and changed & set(_LAYER_TYPES_FOLLOW)
    ):
        _cut_layer_types(result, source, chosen, changed=changed)
    return result


def _whole(value: Any) -> int:
    """`value` if it is a positive integer, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _cut_layer_types(
    result: dict[str, Any], source: Mapping[str, Any], chosen: Mapping[str, Any], *, changed: set[str]
) -> None:
    """Drop layer types that are derived from other fields; of the model's own pattern keep the
    first layers, or refuse.
    """
    listed, layers = list(source["layer_types"]), chosen.get("num_hidden_layers")
    if listed == layer_types(source):
        del result["layer_types"]
    elif changed & set(_LAYER_TYPES_FOLLOW) == {"num_hidden_layers"} and 0 < _whole(layers) <= len(listed):
        result["layer_types"] = listed[: _whole(layers)]
    else:
        field = sorted(changed & set(_LAYER_TYPES_FOLLOW))[0]
        words = (
            f"the model has its own pattern of attention in its {len(listed)} layers (layer_types), "
            "which does not follow from this field"
        )
        raise refusal(
            f"model.config.{field}",
            chosen[field],
            words,
            allowed="with layer_types",
            instead="model.config.layer_types=[full_attention,...]",
        )


def layer_types(fields: Mapping[str, Any]) -> list[str] | None:
    """The attention type of each layer by Qwen's window fields; None if these are invalid."""
    given = {
        **_WINDOW_DEFAULTS,
        **{key: value for key, value in fields.items() if value is not None or key == "sliding_window"},
    }
    layers, first = _whole(given.get("num_hidden_layers")), given["max_window_layers"]
    if not layers or not isinstance(first, int):
        return None
    windowed = given["use_sliding_window"] and given["sliding_window"] is not None
    return [
        "sliding_attention" if windowed and index >= first else "full_attention" for index in range(layers)
    ]


def windows(fields: Mapping[str, Any], *, layers: int) -> list[int | None]:
    """The sliding window of each layer by config.json `fields`; None: full attention."""
    kind = fields.get("model_type")
    if kind == "mistral":
        return [fields.get("sliding_window", 4096)] * layers
    if kind not in ("qwen2", "qwen3"):
        return [None] * layers
    listed = fields.get("layer_types") or layer_types({**fields, "num_hidden_layers": layers}) or []
    window = fields.get("sliding_window", _WINDOW_DEFAULTS["sliding_window"])
    return [window if name == "sliding_attention" else None for name in listed]
