"""The head of a model for pre-training that tells whether the second part of a row follows the first."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hybridtrain.errors import UserError, refusal
from hybridtrain.models import encoder, tracing


def pairs_of(model: Any) -> tuple[str, str] | None:
    """(path of the module whose result this head takes, path of the head); None for a model of another kind.

    Raises UserError for a model for pre-training with other heads.
    """
    if encoder.predicts(model.config) != encoder.PRETRAINING:
        return None
    modules = dict(model.named_modules())
    head = modules.get(encoder.PAIRS)
    results: dict[str, Any] = {}
    taken: list[Any] = []
    if not isinstance(head, nn.Linear) or head.out_features != 2:
        raise _refusal(model, f"it has no head {encoder.PAIRS} with two rows")

    def keep(path: str, result: Any) -> None:
        results.setdefault(path, result)

    handles = [
        module.register_forward_hook(lambda *given, path=path: keep(path, given[2]))
        for path, module in modules.items()
    ]
    handles.append(head.register_forward_pre_hook(lambda _, given: taken.append(given[0])))
    with tracing.hooked(*handles):
        tracing.call(model)
    pooled = [
        path
        for path, result in results.items()
        if isinstance(result, Tensor) and any(result is each for each in taken)
    ]
    if len(taken) != 1 or not pooled:
        raise _refusal(model, f"its head {encoder.PAIRS} does not take the result of one of its modules")
    return pooled[0], encoder.PAIRS


def _refusal(model: Any, problem: str) -> UserError:
    return refusal(
        "model.config.architectures",
        model.config.architectures,
        f"of models for pre-training those with a head for pairs, like BERT's, are trained; {problem}",
        allowed="...ForMaskedLM, or ...ForPreTraining with such a head",
        instead="its ...ForMaskedLM",
    )
