"""Classifiers: models with one output per class. No torch.

In config.json, `architectures` marks a classifier and `id2label` names its classes:

    ...ForSequenceClassification    of texts
    ...ForTokenClassification       of tokens
    ...ForQuestionAnswering         of encoders: two rows, for the first and the last token of an answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridtrain.errors import refusal
from hybridtrain.types import ANSWER_ENDS

HEAD = "score"
"""Path of the head's linear layer in the classifiers of plain.TYPES."""
TEXTS, TOKENS, ANSWERS = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
HEADS = {TEXTS: "", TOKENS: "tokens", ANSWERS: "answers"}
"""What a class of transformers ends with -> ModelFacts.head."""


def kind_of(architectures: object) -> str:
    """TEXTS, TOKENS or ANSWERS for `architectures` of config.json, or of a transformers config; empty if they
    are not those of a classifier.
    """
    one = isinstance(architectures, list | tuple) and len(architectures) == 1
    name = str(architectures[0]) if one else ""  # type: ignore[index]
    return next((kind for kind in HEADS if name.endswith(kind)), "")


def is_classifier(architectures: object) -> bool:
    """Whether they are those of a classifier."""
    return bool(kind_of(architectures))


def labels_of(fields: Mapping[str, Any]) -> list[str]:
    """Class names in the order of the head's rows, from config.json `fields`; empty for other models."""
    if kind_of(fields.get("architectures")) == ANSWERS:
        return list(ANSWER_ENDS)
    names = fields.get("id2label")
    if not is_classifier(fields.get("architectures")) or not isinstance(names, Mapping):
        return []
    by_number = {int(number): str(name) for number, name in names.items()}
    return [by_number.get(number, f"LABEL_{number}") for number in range(len(by_number))]


def has_head(architectures: object) -> bool:
    """Whether they are those of a model with the head of such a task, unlike a language model's."""
    named = architectures if isinstance(architectures, list | tuple) else ()
    return any(str(name).endswith(_TASKS) for name in named)


_TASKS = (TEXTS, TOKENS, ANSWERS, "ForMultipleChoice", "ForNextSentencePrediction")
"""Ends of classes whose head may have the names, and the shape, of that of another."""


def with_labels(
    fields: Mapping[str, Any], labels: Sequence[str], *, kind: str, source: object
) -> dict[str, Any]:
    """`fields` changed to those of a classifier of this kind with these classes, whose class build.hf_config
    names. Its head is not tied to the embedding. Without `labels` its classes are those of `source`, the
    `architectures` of the weights that it begins from, if these are a classifier's.

    Raises UserError for weights with another head.
    """
    if has_head(source) and kind_of(source) != kind:
        raise refusal(
            "model.config.architectures",
            source,
            "its head is that of another task",
            allowed=f"a language model, a ...{kind}, or an encoder without a head",
            instead="model.from_pretrained=FOLDER of one",
        )
    fields = {**fields, "architectures": [kind], "tie_word_embeddings": False}
    if not labels:
        others = () if kind_of(source) else ("id2label", "label2id")
        return {name: value for name, value in fields.items() if name not in others}
    names = {
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
    }
    return {**fields, **names}
