"""The reduced copy of a model: its config with all its switches, types of layers and ratios, and small sizes.

Sizes differ from one another (hidden, attention width, MLP), so that a mistaken dimension does not fit. There
are as many layers as cuts and layer types need, in the order in which the model first has them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN, HEADS, HEAD_DIM, FFN, VOCABULARY, POSITIONS, EXPERTS, WINDOW = 48, 6, 8, 80, 131, 64, 4, 5
LAYERS = 4

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    "num_blocks",
)
_ROLES: tuple[tuple[int, str], ...] = (
    (HIDDEN, "hidden_size n_embd d_model embedding_size embedding_dim word_embed_proj_dim lru_width"),
    (HEAD_DIM, "head_dim kv_channels dim_head d_head swa_head_dim global_head_dim linear_head_dim"),
    (HEAD_DIM, "v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim swa_v_head_dim"),
    (HEAD_DIM // 2, "qk_rope_head_dim rotary_dim index_head_dim"),
    (FFN, "intermediate_size ffn_dim n_inner dff dim_ff d_inner decoder_ffn_dim encoder_ffn_dim"),
    (FFN, "ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    (FFN // 2, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size"),
    (FFN // 2, "shared_expert_intermediate_size shared_experts_intermediate_size"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (POSITIONS, "max_position_embeddings n_positions max_seq_len n_ctx"),
    (1, "n_group num_expert_group topk_group num_expert_groups"),
    (1, "num_shared_experts n_shared_experts moe_num_shared_experts"),
    (WINDOW, "sliding_window window_size attention_chunk_size sliding_window_size attention_window_size"),
    (12, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank gated_norm_rank hc_lowrank"),
    (12, "hidden_size_per_layer_input ple_embed_dim d_rel"),
    (24, "moe_latent_size"),
    (8, "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size"),
    (1, "mamba_n_groups n_groups"),
    (4, "time_step_rank mamba_dt_rank linear_num_value_heads index_topk"),
    (2, "linear_num_key_heads linear_num_heads index_n_heads"),
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


def is_random(name: str, value: object) -> bool:
    """Whether a field is a probability of dropout or jitter."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and any(word in name for word in _RANDOM)


def reduced(config: Any, *, random: bool, tp: int) -> Any:
    """The reduced copy of a transformers config, with LAYERS layers, or as many as it has types of layers.

    `random`: with the model's dropout and jitter; else without. `tp`: with as many heads as so many
    tensor-parallel ranks need.
    """
    fields = config.to_dict()
    known = type(config)().to_dict()
    fields = {key: value for key, value in fields.items() if value is not None or known.get(key) is not None}
    text = config.get_text_config(decoder=True)
    own_heads = getattr(text, "num_attention_heads", None) or HEADS
    own_kv = getattr(text, "num_key_value_heads", None) or own_heads
    heads, kv_heads = _ratio(own_heads, own_kv, tp=tp)
    small = _reduced(fields, chosen=_layers_to_keep(config), heads=heads, kv_heads=kv_heads, tp=tp)
    if random:
        small |= {name: value for name, value in fields.items() if is_random(name, value)}
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
    """The first layer of each type, and as many of the following as make LAYERS, in order."""
    text = config.get_text_config(decoder=True)
    count, fields = text.num_hidden_layers, text.to_dict()
    if count < LAYERS:
        return list(range(count))
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == count]
    sharing = count - (
        fields.get("num_kv_shared_layers") or 0
    )  # the last layers use keys and values of others
    kinds = [(index >= sharing, *(str(values[index]) for values in lists)) for index in range(count)]
    first = {kinds.index(kind) for kind in set(kinds)}
    rest = [index for index in range(count) if index not in first]
    return sorted([*first, *rest[: max(0, LAYERS - len(first))]])


def _reduced(
    fields: Mapping[str, Any], *, chosen: Sequence[int], heads: int, kv_heads: int, tp: int
) -> dict[str, Any]:
    count = next((fields[key] for key in _LAYERS if isinstance(fields.get(key), int)), 0)
    result: dict[str, Any] = {}
    for key, value in fields.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, Mapping) and key == "per_layer_config":
            value = {place: value[index] for place, index in enumerate(chosen) if index in value}
        elif isinstance(value, Mapping) and key.endswith("config"):
            value = _reduced(value, chosen=chosen, heads=heads, kv_heads=kv_heads, tp=tp)
        elif key in _LAYERS and number:
            value = len(chosen)
        elif key == "num_kv_shared_layers" and number:
            value = sum(index >= count - value for index in chosen)
        elif isinstance(value, list) and len(value) == count > 1 and max(chosen) < count:
            value = [value[index] for index in chosen]
        elif key in _HEADS and number:
            value = heads
        elif key in _KV_HEADS and number:
            value = kv_heads
        elif key in _SIZES and number and value > 0:
            value = _width(_SIZES[key], heads=heads, tp=tp)
        elif key in EXPERTS_USED and number:
            value = min(value, 2)
        elif is_random(key, value):
            value = type(value)(0)
        elif key.endswith("token_id") and number:
            value = 1
        result[key] = copy.deepcopy(value)
    if "qk_rope_head_dim" in fields and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        result["head_dim"] = result["qk_rope_head_dim"]
    return _consistent(result, hidden=_width(HIDDEN, heads=heads, tp=tp))


def _width(size: int, *, heads: int, tp: int) -> int:
    """A size of _SIZES; widths grow with the number of heads, and are shared out evenly."""
    if size not in (HIDDEN, FFN, FFN // 2):
        return size
    size *= heads // HEADS
    return size if size == HIDDEN * (heads // HEADS) else -(-size // (2 * tp)) * 2 * tp


def _consistent(fields: dict[str, Any], *, hidden: int) -> dict[str, Any]:
    """`fields`, with sizes that follow from others."""
    inner = hidden * fields.get("mamba_expand", fields.get("expand", 2))
    if "qk_head_dim" in fields:
        fields["qk_head_dim"] = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    for heads, width in (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim")):
        if fields.get(heads):
            fields[heads], fields[width] = HEADS, inner // HEADS
    if "state_size" in fields and "num_heads" in fields:  # Mamba 2
        fields["num_heads"], fields["head_dim"] = HEADS, inner // HEADS
    if fields.get("attention_head_dim") and fields.get("attention_hidden_size"):  # Zamba: twice as wide
        fields["attention_hidden_size"] = 2 * hidden
        fields["attention_head_dim"] = 2 * hidden // HEADS
    if fields.get("mamba_d_ssm"):
        fields["mamba_d_ssm"] = inner
    if fields.get("num_experts_per_tok") is None and "n_routed_experts" in fields:
        fields["num_experts_per_tok"] = 2
    return fields
