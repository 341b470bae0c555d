"""The head of a classifier, found by calling a reduced copy, and what it returns.

    decoder    last layer -> norm               -> head (C, D) -> (B, T, C), of which the last token's are
    encoder    last layer -> pooler, or dense   -> head (C, D) -> (B, C)             the logits, (B, C)

C classes; B rows, T positions, D hidden.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.errors import refusal
from hybridtrain.models import build, classifier, encoder, plain, tracing
from hybridtrain.types import AnswerBatch, Batch, TextBatch


def head_of(model: Any) -> Any:
    """The linear layer whose results are the logits of a classifier, of texts or of their last tokens.

    Raises UserError if there is none.
    """
    results: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, given, result: results.append((module, result)))  # noqa: ARG005
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with tracing.hooked(*handles):
        logits = tracing.logits(model)
    for module, result in reversed(results):
        last = result[:, -1] if result.dim() > logits.dim() else result
        if last.shape == logits.shape and torch.equal(last, logits):
            return module
    raise refusal(
        "model.config.architectures",
        model.config.architectures,
        "its logits are not the results of a linear layer",
        allowed="classifiers with a linear head",
        instead="a model of another architecture",
    )


class _Reached(Exception):
    """Ends a model's forward at the head's result."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = result


def results_of(model: Any, given: dict[str, Any]) -> Tensor:
    """What a classifier's head returns, (B, T, C) or (B, C): the own forward of a decoder goes on with
    the last token alone.
    """
    from hybridtrain.models.structure import structure_of

    config = model.config
    path = classifier.HEAD if config.model_type in plain.TYPES else structure_of(config).head

    def end(module: nn.Module, taken: Any, result: Tensor) -> None:  # noqa: ARG001 - a hook's signature
        raise _Reached(result)

    with tracing.hooked(model.get_submodule(path).register_forward_hook(end)):
        try:
            model(**given)
        except _Reached as reached:
            return reached.result
    raise AssertionError(f"{type(model).__name__} does not call {path}")


def text_logits(model: Any, batch: TextBatch) -> Tensor:
    """The plain model's logits of rows that are a text and padding, (B, C), or of their tokens, (B, T, C)."""
    row_BT = ((batch.position_ids_BT == 0).cumsum(1) == 1).long()  # what follows is padding
    more = arguments_of(model, batch)
    return build.logits_of(model(input_ids=batch.input_ids_BT, attention_mask=row_BT, **more))


def arguments_of(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Further arguments of a batch for the model's forward: for answers no segments with a model that does
    not tell two apart, such as RoBERTa.
    """
    more = batch.arguments()
    if not isinstance(batch, AnswerBatch):
        return more
    known = "token_type_ids" in inspect.signature(model.forward).parameters
    return more if known and getattr(model.config, "type_vocab_size", 2) > 1 else {}


def is_encoder(config: Any) -> bool:
    """Whether the tokens of a classifier see those that follow them: transformers has a model of this type
    that predicts masked tokens.
    """
    from transformers.models.auto import modeling_auto

    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return (
        masked and classifier.is_classifier(config.architectures) and not getattr(config, "is_decoder", False)
    )


def is_known(fields: Mapping[str, Any]) -> bool:
    """Whether transformers has the model that config.json `fields` name: by default a causal LM. Answers are
    found by encoders alone.
    """
    from transformers.models.auto import modeling_auto

    kind = fields.get("model_type")
    names: Mapping[str, Any] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    answers = modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
    if encoder.is_encoder(fields):
        names = masked
    elif classes := classifier.kind_of(fields.get("architectures")):
        names = {
            classifier.TEXTS: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            classifier.TOKENS: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            classifier.ANSWERS: {name: model for name, model in answers.items() if name in masked},
        }[classes]
    return isinstance(kind, str) and kind in names


def drawn(config: Any) -> set[str]:
    """Parameters of a classifier that the language model of its type does not have: its files lack them."""
    return _own(config) - next(_others(config))


def left_out(config: Any) -> set[str]:
    """Names in the files of other models of its type that a classifier has no parameters for: their heads,
    and numbers of positions.
    """
    return set().union(*_others(config)) - _own(config)


def _own(config: Any) -> set[str]:
    return {name for name, _ in build.meta_model(config).named_parameters()}


def _others(config: Any) -> Iterator[set[str]]:
    """Names in the files of models of this type without classes: first a language model, last one without a
    head.
    """
    import transformers

    decoders = (transformers.AutoModelForCausalLM, transformers.AutoModel)
    encoders = (
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForPreTraining,
        transformers.AutoModel,
    )
    for family in encoders if is_encoder(config) else decoders:
        other = copy.deepcopy(config)
        other.architectures = None
        try:
            with torch.device("meta"):
                model: Any = family.from_config(other)
        except ValueError:  # transformers has no such model of this type
            continue
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        names |= {name for name, _ in model.named_buffers()}  # older files have numbers of positions
        yield names | {
            f"{model.base_model_prefix}.{name}" for name in names if family is transformers.AutoModel
        }
