"""ModelFacts of a model type whose config.json alone does not tell them.

The model is built without memory for its weights, and a reduced copy of it is examined (analyse.py). The
result is kept in the user's cache folder, by every field of the config, the attention implementation and the
versions of what computed it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from hybridtrain.analysis import analyse, cuts, randomness
from hybridtrain.analysis.cache import cached
from hybridtrain.errors import UserError
from hybridtrain.models import build, classifier, encoder, reduced
from hybridtrain.models.heads import is_encoder
from hybridtrain.models.structure import OTHER, cannot_train, structure_of
from hybridtrain.runtime import log
from hybridtrain.types import ModelFacts

_log = log.get("model")
_UNBOUNDED = 1 << 40


def facts_of_any(fields: Mapping[str, Any], *, attention: str) -> ModelFacts:
    """The facts of a causal LM or an encoder with config.json `fields` and an attention implementation.

    Raises UserError for one that cannot be trained.
    """
    answer = cached(
        ["facts", attention, fields],
        compute=lambda: dataclasses.asdict(_facts(fields, attention=attention)),
        valid=lambda known: bool(_read(known)),
    )
    facts = _read(answer)
    assert facts is not None
    return facts


def _facts(fields: Mapping[str, Any], *, attention: str) -> ModelFacts:
    began = time.monotonic()
    try:
        facts = examined(fields, attention=attention)
    except UserError:
        raise
    except Exception as error:  # a model's own code, with whatever it raises
        problem = f"a reduced copy of it fails ({analyse.words(error)})"
        raise cannot_train(fields["model_type"], problem, instead=OTHER) from error
    _log.info("analysis  of a reduced copy of the model, in %.1f s", time.monotonic() - began)
    return facts


def _read(known: Mapping[str, Any]) -> ModelFacts | None:
    """What is kept; None for what another version wrote."""
    try:
        lists = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
        return ModelFacts(**{**known, **lists})
    except TypeError:
        return None


def examined(fields: Mapping[str, Any], *, attention: str) -> ModelFacts:
    """The facts, each time anew."""
    config = build.hf_config(fields, chosen={}, attention=attention)
    dropped = randomness.dropped(config)
    refused = analyse.refused(config)
    begins = cuts.allowed(config, holds="pp" not in refused)
    if begins == ():
        refused.setdefault("pp", "its layers use more of each other than hidden states")
    else:
        refused.pop("pp", None)
    text = config.get_text_config(decoder=True)
    model: Any = build.meta_model(config)
    shared = structure_of(config).shared if "pp" not in refused else ()
    first = reduced.first_layer(text)
    heads, window = getattr(first, "num_attention_heads", None) or 1, getattr(first, "sliding_window", None)
    kinds = (getattr(text, "layer_types", None) or []) if window else []
    sizes, inactive = _of_layers(model, config)
    return ModelFacts(
        model_type=config.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(first, "num_key_value_heads", None) or heads,
        head_dim=getattr(first, "head_dim", None) or text.hidden_size // heads,
        ffn=_ffn(first, hidden=text.hidden_size),
        vocab=model.get_input_embeddings().weight.shape[0],
        labels=tuple(classifier.labels_of({**fields, "architectures": config.architectures})),
        head=classifier.HEADS.get(classifier.kind_of(config.architectures), ""),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        window=window,
        max_positions=_positions(text, model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        full_layers=tuple(index for index, kind in enumerate(kinds) if kind == "full_attention"),
        layer_parameters=sizes,
        layer_inactive=inactive,
        refused=refused,
        shared={
            path: sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
            for path in shared
        },
        cuts=begins or None,
        encoder=bool(encoder.predicts(config)) or is_encoder(config),
        pairs=encoder.predicts(config) == encoder.PRETRAINING,
        dropped=dropped,
    )


def _positions(text: Any, model: Any) -> int:
    """The longest row: of a learned table, without the rows up to that for padding."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions")
    most = next((value for name in names if (value := getattr(text, name, None))), _UNBOUNDED)
    padded = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
    )
    return most - max(padded, default=0)


def _of_layers(model: Any, config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(parameters of each layer, those among them of experts that a token does not use)."""
    text = config.get_text_config(decoder=True)
    experts, chosen = reduced.experts_of(text)
    sizes, inactive = [], []
    for layer in model.get_submodule(structure_of(config).layers):
        stacked = [p.numel() for p in layer.parameters() if p.dim() == 3 and p.shape[0] == experts]
        sizes.append(sum(p.numel() for p in layer.parameters()))
        inactive.append(sum(stacked) * (experts - chosen) // experts if experts and chosen else 0)
    return tuple(sizes), tuple(inactive)


def _ffn(first: Any, *, hidden: int) -> int:
    """The MLP's width, or of layers that differ the largest."""
    width = getattr(first, "intermediate_size", None) or 4 * hidden
    return max(width) if isinstance(width, list | tuple) else width
