"""Classifiers: models with one output per class (transformers' ...ForSequenceClassification). No torch.

In config.json, `architectures` marks a classifier and `id2label` names its classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridtrain.errors import refusal

HEAD = "score"
"""Path of the head's linear layer in the classifiers of plain.TYPES."""
SUFFIX = "ForSequenceClassification"


def is_classifier(architectures: object) -> bool:
    """Whether `architectures` of config.json, or of a transformers config, is that of a classifier."""
    return (
        isinstance(architectures, list | tuple)
        and len(architectures) == 1
        and str(architectures[0]).endswith(SUFFIX)
    )


def labels_of(fields: Mapping[str, Any]) -> list[str]:
    """Class names in the order of the head's rows, from config.json `fields`; empty for other models."""
    names = fields.get("id2label")
    if not is_classifier(fields.get("architectures")) or not isinstance(names, Mapping):
        return []
    by_number = {int(number): str(name) for number, name in names.items()}
    return [by_number.get(number, f"LABEL_{number}") for number in range(len(by_number))]


_OTHER_HEADS = (
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)
"""Of models whose head may have the names, and the shape, of that of a classifier of texts."""


def with_labels(fields: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """`fields` changed to those of a classifier with these classes, whose class build.hf_config names. Its
    head is not tied to the embedding.

    Raises UserError for those of a model with another head.
    """
    named = [str(name) for name in fields.get("architectures") or []]
    if any(name.endswith(_OTHER_HEADS) for name in named):
        raise refusal(
            "model.config.architectures",
            named,
            "its head is that of another task",
            allowed="a language model, a classifier of texts, or an encoder without a head",
            instead="model.from_pretrained=FOLDER of one",
        )
    names = {
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
    }
    return {**fields, "architectures": [SUFFIX], "tie_word_embeddings": False, **names}
