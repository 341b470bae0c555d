"""ModelFacts from a model's config.json.

Needs no torch or transformers, so that planning works on a login node.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from hybridtrain.config.schema import Config, ModelConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import classifier, encoder, plain
from hybridtrain.models.fields import MOST_PARAMETERS, check_fields
from hybridtrain.models.source import read_config
from hybridtrain.types import ModelFacts

# The defaults of transformers for fields that are missing in config.json, as far as planning needs them.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "max_position_embeddings": 2048, "vocab_size": 32000},
    "mistral": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}
BY_FIELDS = tuple(_DEFAULTS)
"""Model types whose facts follow from their config.json."""
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "albert",
    "electra",
    "deberta",
    "deberta-v2",
    "modernbert",
    "mpnet",
    "vit",
    "clip",
)
_DECODERS = ("bert", "roberta", "xlm-roberta", "electra")
"""Encoders that are causal language models with is_decoder."""
_OTHERS = ("t5", "mt5")


def facts_of(model: ModelConfig) -> ModelFacts:
    """`facts` of `read_config`. Errors about a field of from_pretrained's config.json name that file."""
    try:
        return _facts(read_config(model), attention=model.attention)
    except UserError as error:
        first, line, rest = str(error).partition("\n")
        field = re.match(r"model\.config\.(\w+)", first)
        if field is None or field[1] in model.config or not model.from_pretrained:
            raise
        raise UserError(f"{first} (config.json of {model.from_pretrained}){line}{rest}") from error


def facts_of_run(config: Config) -> ModelFacts:
    """`facts_of` the model of a run, with its adapters, which need torch. Raises UserError."""
    found = facts_of(config.model)
    if config.adapters.kind == "none":
        return found
    from hybridtrain.analysis.adapters import sizes

    return dataclasses.replace(found, **vars(sizes(config)))


def facts(fields: Mapping[str, Any]) -> ModelFacts:
    """Derive the facts from config.json fields.

    Raises UserError for families and features that are not supported.
    """
    return _facts(fields, attention="sdpa")


def _facts(fields: Mapping[str, Any], *, attention: str) -> ModelFacts:
    """`attention`: implementation with which a model is examined."""
    kind = fields.get("model_type")
    if quantization := fields.get("quantization_config"):
        raise refusal(
            "model.config.quantization_config",
            quantization,
            "training of quantized weights is not supported yet",
            allowed="none",
            instead="the unquantized model with precision=bf16_mixed",
        )
    if kind not in BY_FIELDS or classifier.HEADS.get(classifier.kind_of(fields.get("architectures"))):
        return _of_any(fields, attention=attention)
    complete: dict[str, Any] = {
        **_DEFAULTS[kind],
        **{key: value for key, value in fields.items() if value is not None or key == "sliding_window"},
    }
    get: Callable[[str], Any] = complete.get
    missing = [key for key in _SIZES if get(key) is None]
    if missing:
        raise UserError(f"model.config.{missing[0]} is missing: a {kind} model needs {', '.join(_SIZES)}")
    check_fields(complete)
    rate = get("attention_dropout")
    if rate and attention != "eager":
        raise in_kernel({"attention_dropout": rate})
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    window = get("sliding_window") if kind == "mistral" or get("use_sliding_window") else None
    head_dim, kv_heads = _head_sizes(complete)
    result = ModelFacts(
        model_type=kind,
        layers=get("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=get("intermediate_size"),
        vocab=get("vocab_size"),
        labels=tuple(classifier.labels_of(complete)),
        tied=bool(get("tie_word_embeddings")),
        window=window or None,
        max_positions=get("max_position_embeddings"),
        parameters=0,
        refused=_of_whole_rows(complete),
        dropped={plain.ATTENTION: rate} if rate else {},
    )
    biases = {"attention": bool(get("attention_bias")), "mlp": bool(get("mlp_bias"))}
    counted = _count(result, biases=biases)
    if counted.parameters > MOST_PARAMETERS:
        problem = f"the model would have {counted.parameters:,} parameters"
        raise refusal(
            "model.config.hidden_size",
            hidden,
            problem,
            allowed=f"up to {MOST_PARAMETERS:,}",
            instead="the published sizes",
        )
    return counted


def _of_whole_rows(fields: Mapping[str, Any]) -> dict[str, str]:
    """What models cannot do whose rotary positions depend on the longest document of a micro-batch."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("longrope", "dynamic"):
        return {}
    return {"documents": f"its {kind} positions depend on the longest document of a micro-batch"}


def places(dropped: Mapping[str, float]) -> str:
    """ModelFacts.dropped in words."""
    by_rate: dict[float, list[str]] = {}
    for path, rate in dropped.items():
        by_rate.setdefault(rate, []).append(path)
    return "; ".join(f"{rate:g} in {', '.join(paths)}" for rate, paths in by_rate.items())


def in_kernel(fields: Mapping[str, float]) -> UserError:
    """The refusal of dropout inside an attention kernel. `fields`: those that ask for it, and their rates."""
    name, rate = next(iter(fields.items()))
    problem = "random numbers of an attention kernel would differ between layouts"
    off = " ".join(f"model.config.{each}=0" for each in fields)
    return refusal(
        f"model.config.{name}",
        rate,
        problem,
        allowed="0, or with model.attention=eager a rate",
        instead=f"model.attention=eager, which takes more time and memory, or {off}",
    )


def no_classifier(kind: object) -> UserError:
    """The refusal of a classifier of this model type."""
    return refusal(
        "model.config.model_type",
        kind,
        "transformers has no such classifier of this architecture",
        allowed="architectures with a ...ForSequenceClassification, or for labels of words "
        "a ...ForTokenClassification, or for answers encoders with a ...ForQuestionAnswering",
        instead="a model of one of these, or another task and no model.labels",
    )


def _of_any(fields: Mapping[str, Any], *, attention: str) -> ModelFacts:
    """The facts of another model type; loads torch."""
    kind = fields.get("model_type")
    decoder = kind in _DECODERS and fields.get("is_decoder")
    classifies = classifier.is_classifier(fields.get("architectures"))
    heads = decoder or encoder.is_encoder(fields) or classifies
    if (kind in _ENCODERS and not heads) or kind in _OTHERS:
        raise _unsupported(kind)
    if fields.get("num_labels") and not classifies:
        raise no_classifier(kind)
    from hybridtrain.analysis.of_any import facts_of_any
    from hybridtrain.models.heads import is_known

    if not is_known(fields):
        raise no_classifier(kind) if classifies else _unsupported(kind)
    return facts_of_any(fields, attention=attention)


def _head_sizes(fields: Mapping[str, Any]) -> tuple[int, int]:
    """(head_dim, number of key-value heads).

    Raises UserError for numbers of heads that do not divide evenly.
    """
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim")
    if not head_dim and hidden % heads:
        raise refusal(
            "model.config.num_attention_heads",
            heads,
            f"does not divide hidden_size {hidden}",
            allowed=f"divisors of {hidden}",
            instead="a head_dim, or another number of heads",
        )
    kv_heads = fields.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise refusal(
            "model.config.num_key_value_heads",
            kv_heads,
            f"does not divide num_attention_heads {heads}",
            allowed=f"divisors of {heads}",
            instead=f"model.config.num_key_value_heads={math.gcd(heads, kv_heads)}",
        )
    return head_dim or hidden // heads, kv_heads


def _unsupported(kind: object) -> UserError:
    """The error for an architecture that cannot be trained, with a suggestion."""
    if kind in _ENCODERS or kind in _OTHERS:
        problem = (
            "without a head for masked tokens, an encoder is not trained"
            if kind in _ENCODERS
            else "only models of one list of layers are trained, and this is an encoder-decoder model"
        )
    else:
        problem = "this architecture is not supported yet"
    near = difflib.get_close_matches(str(kind), BY_FIELDS, n=1, cutoff=0.75)
    instead = f"model.config.model_type={near[0]}" if near else "another model (see hybridtrain inspect)"
    if kind in _ENCODERS:
        instead = "task=masked_lm and model.config.architectures=[...ForMaskedLM], or task=classification"
    if kind in _DECODERS:
        instead += ", or model.config.is_decoder=true"
    allowed = f"causal language models of transformers, such as {', '.join(BY_FIELDS)}, and encoders"
    return refusal("model.config.model_type", kind, problem, allowed=allowed, instead=instead)


def _count(facts: ModelFacts, *, biases: Mapping[str, bool]) -> ModelFacts:
    """Fill in the number of parameters (a test compares it with the real modules)."""
    q, kv, hidden = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim, facts.hidden
    layer = hidden * (2 * q + 2 * kv) + 3 * hidden * facts.ffn + 2 * hidden
    if biases["attention"] and facts.model_type in ("llama", "qwen3"):
        layer += q + 2 * kv + hidden
    if facts.model_type == "qwen2":
        layer += q + 2 * kv
    if biases["mlp"] and facts.model_type == "llama":
        layer += 2 * facts.ffn + hidden
    if facts.model_type == "qwen3":
        layer += 2 * facts.head_dim
    total = (
        facts.layers * layer + hidden + facts.vocab * hidden + (0 if facts.tied else facts.outputs * hidden)
    )
    return ModelFacts(**{**facts.__dict__, "parameters": total})
