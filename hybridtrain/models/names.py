"""Names of parameters that transformers' model has under several."""

from __future__ import annotations

from typing import Any

from torch import nn


def single(model: Any) -> Any:
    """`model` with one name for each parameter, that of the module which uses it.

    BERT and its like have the bias of their head twice: in the head, and in the module around it, under whose
    name it is stored. A tied head keeps its matrix, which comes after the embedding's, whose name both have.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return model
    path = next(path for path, module in model.named_modules() if module is head)
    for outer in list(model.modules()):
        if outer is not head and outer._parameters.get("bias") is head.bias is not None:
            del outer._parameters["bias"]
    top = path.partition(".")[0]
    model._modules[top] = model._modules.pop(top)
    return model


def stored(model: Any) -> dict[str, str]:
    """Name of a parameter of `single(model)` -> another one, under which it is stored."""
    names = {name for name, _ in model.named_parameters()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: other for name, other in tied.items() if name in names and other not in names}
