"""Classifiers: a decoder whose head has one output per class instead of per token (transformers' ...ForSequenceClassification). No torch.

config.json says so in `architectures`, and names the classes in `id2label`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = "score"
"""Path of the head's linear layer in every classifier of transformers that is made of a decoder."""
_SUFFIX = "ForSequenceClassification"
_STEMS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def is_classifier(architectures: object) -> bool:
    """Whether `architectures` of a config.json, or of transformers' config, is that of a classifier."""
    return isinstance(architectures, list | tuple) and len(architectures) == 1 and str(architectures[0]).endswith(_SUFFIX)


def labels_of(fields: Mapping[str, Any]) -> list[str]:
    """Names of the classes by the fields of a config.json, in the order of the head's rows; empty: it is no classifier."""
    names = fields.get("id2label")
    if not is_classifier(fields.get("architectures")) or not isinstance(names, Mapping):
        return []
    by_number = {int(number): str(name) for number, name in names.items()}
    return [by_number.get(number, f"LABEL_{number}") for number in range(len(by_number))]


def with_labels(fields: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The fields of a classifier of these classes, made of `fields`. Its head is never tied to the embedding."""
    stem = _STEMS.get(str(fields.get("model_type")), "")
    names = {"id2label": {str(number): name for number, name in enumerate(labels)}, "label2id": {name: number for number, name in enumerate(labels)}}
    return {**fields, "architectures": [f"{stem}{_SUFFIX}"], "tie_word_embeddings": False, **names}
