"""The reduced copy of a model: its config with all its switches, types of layers and ratios, and small sizes.

Sizes differ from one another (hidden, attention width, MLP), so that a mistaken dimension does not fit. There
are as many layers as cuts and layer types need, in the order in which the model first has them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HIDDEN, HEADS, HEAD_DIM, FFN, VOCABULARY, POSITIONS, EXPERTS, WINDOW = 48, 6, 8, 80, 131, 64, 4, 5
LAYERS = 4

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    "num_blocks",
)
_ROLES: tuple[tuple[int, str], ...] = (
    (HIDDEN, "hidden_size n_embd d_model emb_dim"),
    (HIDDEN, "adapter_in_dim adapter_out_dim adapter_input_size"),
    (HEAD_DIM, "head_dim kv_channels dim_head d_head swa_head_dim global_head_dim linear_head_dim"),
    (HEAD_DIM, "v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim swa_v_head_dim"),
    (HEAD_DIM // 2, "qk_rope_head_dim rotary_dim index_head_dim indexer_head_dim"),
    (FFN, "intermediate_size ffn_dim n_inner dff dim_ff d_inner decoder_ffn_dim encoder_ffn_dim"),
    (FFN, "ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    (FFN // 2, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size"),
    (FFN // 2, "shared_expert_intermediate_size shared_experts_intermediate_size"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (POSITIONS, "max_position_embeddings n_positions max_seq_len n_ctx"),
    (1, "n_group num_expert_group topk_group num_expert_groups"),
    (1, "num_shared_experts n_shared_experts moe_num_shared_experts"),
    (WINDOW, "sliding_window window_size attention_chunk_size sliding_window_size attention_window_size"),
    (WINDOW, "keep_window_size"),
    (2 * WINDOW, "local_attention"),
    (8, "original_max_position_embeddings"),
    (4, "block_size index_block_size indexer_budget rel_extent"),
    (4, "lsh_attn_chunk_length local_attn_chunk_length"),
    (3, "floor_scale log_scaling_n_floor"),
    (2, "indexer_compress_ratio index_topk_blocks"),
    (12, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank gated_norm_rank hc_lowrank adapter_rank"),
    (12, "hidden_size_per_layer_input ple_embed_dim d_rel"),
    (24, "moe_latent_size"),
    (8, "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size"),
    (1, "mamba_n_groups n_groups"),
    (4, "time_step_rank mamba_dt_rank linear_num_value_heads index_topk"),
    (2, "linear_num_key_heads linear_num_heads index_n_heads indexer_n_heads"),
)
"""(size, names of fields that get it)."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields for the number of experts of a layer."""
EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")
"""Fields for the number of experts that a token uses."""
_SIZES = {
    **{name: size for size, names in _ROLES for name in names.split()},
    **dict.fromkeys(EXPERT_COUNTS, EXPERTS),
}
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    *("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"),
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads")
_RANDOM = ("dropout", "pdrop", "jitter", "layerdrop")
"""Parts of names of fields."""
_WIDTHS = (
    *("embedding_size", "embedding_dim", "word_embed_proj_dim", "lru_width", "input_embedding_size"),
    "output_embedding_size",
)
"""Fields that are the hidden size in most models; in others the model has matrices between the two."""
_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Fields for the number of first layers without experts."""
_PLACES = ("interval", "offset")
"""Parts of names of fields by which a model counts its layers, to give some of them another type."""
_MOST = 16
"""Layers of a copy that such fields can ask for."""
_COUNTS = {
    "codegen": (4, 4),  # its fused projections are laid out in four parts
    "mimo_v2_flash": (8, 2),  # layers with a window have twice as many key/value heads
}
"""Model type -> (heads, key/value heads), where six heads do not fit."""
_TWICE = ("zamba", "zamba2")
"""Model types whose layers of one type share parameters: the copy has two of each type."""


def is_random(name: str, value: object) -> bool:
    """Whether a field is a probability of dropout or jitter."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and any(word in name for word in _RANDOM)


def reduced(config: Any, *, random: bool, tp: int) -> Any:
    """The reduced copy of a transformers config, with LAYERS layers, or as many as it has types of layers.

    `random`: with the model's dropout and jitter; else without. `tp`: number of
    tensor-parallel ranks that must be able to share out its heads.
    """
    fields = config.to_dict()
    known = type(config)().to_dict()
    fields = {key: value for key, value in fields.items() if value is not None or known.get(key) is not None}
    text = config.get_text_config(decoder=True)
    heads, kv_heads = _COUNTS.get(text.model_type) or _ratio(*_heads(text), tp=tp)
    small = _reduced(fields, _Copy(_layers_to_keep(config), heads, kv_heads, tp, random))
    result = type(config)(**small)
    result.architectures = config.architectures
    result.use_cache = False
    return result


def experts_of(text: Any) -> tuple[int, int]:
    """(experts of a layer, those that a token uses) in a config; 0 for none."""
    experts, used = (
        next((value for name in names if isinstance(value := getattr(text, name, None), int)), 0)
        for names in (EXPERT_COUNTS, EXPERTS_USED)
    )
    return experts, used


def first_layer(text: Any) -> Any:
    """The config of the first layer, in which fields that differ between layers can be read."""
    layers = getattr(text, "per_layer_config", None)
    return layers[0] if layers else text


def _heads(text: Any) -> tuple[int, int]:
    """(heads, key/value heads) of the first layer."""
    first = first_layer(text)
    heads = getattr(first, "num_attention_heads", None) or HEADS
    return heads, getattr(first, "num_key_value_heads", None) or heads


def _ratio(heads: int, kv_heads: int, *, tp: int) -> tuple[int, int]:
    """(heads, key/value heads) of the reduced copy: as many heads for a key/value head, within reason, and as
    many ranks for one, or heads for a rank, as in the model.
    """
    wanted = next(HEADS * n for n in range(1, tp + 1) if HEADS * n % tp == 0)
    if kv_heads == heads:
        return wanted, wanted
    few = kv_heads if kv_heads < tp else tp if tp > 1 and kv_heads % tp == 0 else min(kv_heads, 2)
    return (wanted if few < wanted else 2 * wanted), few


def _layers_to_keep(config: Any) -> list[int]:
    """Which layers of the model the copy has: the first of each type, and as many of the following as make
    LAYERS, in order.
    """
    text = config.get_text_config(decoder=True)
    count, fields = text.num_hidden_layers, text.to_dict()
    if count < LAYERS:
        return list(range(count))
    per_layer = [_per_layer(key, value, count) for key, value in fields.items()]
    own = _own(fields)
    sharing = count - (
        fields.get("num_kv_shared_layers") or 0
    )  # the last layers use keys and values of others
    kinds = [
        (index >= sharing, str(own.get(index)), *(str(values[index]) for values in per_layer if values))
        for index in range(count)
    ]
    times = 2 if text.model_type in _TWICE else 1
    first = set(range(min(_counted(fields), count, _MOST)))
    for kind in set(kinds):
        first.update([index for index in range(count) if kinds[index] == kind][:times])
    if images := fields.get("cross_attention_layers"):  # not called for text: one follows that is
        first.add(min(min(images) + 1, count - 1))
    rest = [index for index in range(count) if index not in first]
    return sorted([*first, *rest[: max(0, LAYERS - len(first))]])


def _per_layer(key: str, value: object, count: int) -> list[Any]:
    """What a field says of each of `count` layers; empty for one that says nothing of single layers."""
    if not isinstance(value, list):
        return []
    if _is_places(key, value, count):
        return [index in value for index in range(count)]
    return value if len(value) == count else []


def _is_places(key: str, value: list[Any], count: int) -> bool:
    """Whether a field lists some of `count` layers by their places."""
    integers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    named = any(word in key for word in ("layer", "idx", "indices"))
    return named and integers and set(value) <= set(range(count)) and sorted(set(value)) == value != []


def _counted(fields: Mapping[str, Any]) -> int:
    """As many first layers as have all types that follow from counting."""
    numbers = {key: value for key, value in fields.items() if isinstance(value, int)}
    found = [
        value + (key in _DENSE or "offset" in key)
        for key, value in numbers.items()
        if (key in _DENSE and value > 0) or any(word in key for word in _PLACES)
    ]
    return max(found, default=0)


def _own(fields: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Layer -> fields of its own."""
    return {int(index): own for index, own in (fields.get("per_layer_config") or {}).items()}


@dataclass(frozen=True)
class _Copy:
    """What a copy has."""

    chosen: Sequence[int]
    """Layers of the model."""
    heads: int
    kv_heads: int
    tp: int
    random: bool
    """Whether it keeps dropout and jitter."""


def _reduced(fields: Mapping[str, Any], to: _Copy) -> dict[str, Any]:
    count = next((fields[key] for key in _LAYERS if isinstance(fields.get(key), int)), 0)
    hidden = next((fields[key] for key in _ROLES[0][1].split() if isinstance(fields.get(key), int)), None)
    result: dict[str, Any] = {}
    for key, value in fields.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, Mapping) and key.endswith("config") and key != "per_layer_config":
            value = _reduced(value, to)
        elif key in _LAYERS and number:
            value = len(to.chosen)
        elif key == "num_kv_shared_layers" and number:
            value = sum(index >= count - value for index in to.chosen)
        elif key in _DENSE and number:
            value = sum(index < value for index in to.chosen)
        elif isinstance(value, list) and count > 1 and max(to.chosen) < count:
            value = _of_chosen(key, value, count=count, chosen=to.chosen)
        elif key in _HEADS and number:
            value = to.heads
        elif key in _KV_HEADS and number:
            value = to.kv_heads
        elif key in _WIDTHS and number and hidden:
            value = HIDDEN + 8 * ((value > hidden) - (value < hidden))
        elif key in _SIZES and number and value > 0:
            value = _width(_SIZES[key], heads=to.heads, tp=to.tp)
        elif key in EXPERTS_USED and number:
            value = min(value, 2)
        elif is_random(key, value) and not to.random:
            value = type(value)(0)
        elif key.endswith("token_id") and number:
            value = 1
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            value = _long_factors(value)
        result[key] = copy.deepcopy(value)
    if "qk_rope_head_dim" in fields and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        result["head_dim"] = result["qk_rope_head_dim"]
    result = _consistent(result, hidden=_width(HIDDEN, heads=to.heads, tp=to.tp))
    if own := _own(fields):
        places = {place: own[index] for place, index in enumerate(to.chosen) if index in own}
        result["per_layer_config"] = {
            place: {key: _in_ratio(value, fields.get(key), result.get(key)) for key, value in each.items()}
            for place, each in places.items()
        }
        for place, each in places.items():  # heads of which a part has positions
            rope, nope = fields.get("qk_rope_head_dim"), each.get("qk_nope_head_dim")
            if rope and nope and fields.get("head_dim") == nope + rope:
                small = result["per_layer_config"][place]["qk_nope_head_dim"]
                result["head_dim"] = small + result["qk_rope_head_dim"]
    return result


def _long_factors(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters with as many factors as a head of the copy has frequencies, and an original length
    that its rows exceed.
    """
    original = "original_max_position_embeddings"
    return {
        key: value[: HEAD_DIM // 2]
        if key in ("short_factor", "long_factor")
        else _SIZES[original]
        if key == original and "long_factor" in rope
        else value
        for key, value in rope.items()
    }


def _of_chosen(key: str, value: list[Any], *, count: int, chosen: Sequence[int]) -> list[Any]:
    """A list in the config, for the chosen layers of `count`."""
    if _is_places(key, value, count):
        return [place for place, index in enumerate(chosen) if index in value]
    return [value[index] for index in chosen] if len(value) == count else value


def _in_ratio(value: Any, whole: Any, small: Any) -> Any:
    """A layer's own size, which is to the copy's `small` as `value` is to the model's `whole`."""
    if all(isinstance(each, int) and not isinstance(each, bool) for each in (value, whole, small)) and whole:
        return max(1, small * value // whole)
    return value


def _width(size: int, *, heads: int, tp: int) -> int:
    """A size of _SIZES; widths grow with the number of heads, and are shared out evenly."""
    if size not in (HIDDEN, FFN, FFN // 2):
        return size
    factor = max(1, heads // HEADS)
    size *= factor
    return size if size == HIDDEN * factor else -(-size // (2 * tp)) * 2 * tp


def _consistent(fields: dict[str, Any], *, hidden: int) -> dict[str, Any]:
    """`fields`, with sizes that follow from others."""
    inner = hidden * fields.get("mamba_expand", fields.get("expand", 2))
    if "qk_head_dim" in fields:
        fields["qk_head_dim"] = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    for heads, width in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("n_mamba_heads", "mamba_headdim"),
    ):
        if fields.get(heads) and width in fields:
            fields[heads], fields[width] = HEADS, inner // HEADS
    if "state_size" in fields and "num_heads" in fields:  # Mamba 2
        fields["num_heads"], fields["head_dim"] = HEADS, inner // HEADS
    if fields.get("attention_head_dim") and fields.get("attention_hidden_size"):  # Zamba: twice as wide
        fields["attention_hidden_size"] = 2 * hidden
        fields["attention_head_dim"] = 2 * hidden // HEADS
    if fields.get("num_random_blocks"):  # BigBird: rows of eleven blocks have full attention
        fields["block_size"] = 1
    if fields.get("axial_pos_embds_dim"):  # Reformer: widths of the factors of positions
        fields["axial_pos_embds_dim"] = [hidden // 4, hidden - hidden // 4]
    if fields.get("mamba_d_ssm"):
        fields["mamba_d_ssm"] = inner
    if fields.get("num_experts_per_tok") is None and "n_routed_experts" in fields:
        fields["num_experts_per_tok"] = 2
    return fields
