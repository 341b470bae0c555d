"""Computing in fp64 throughout: where models and losses ask for fp32, in norms and softmax, they get fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Double(TorchFunctionMode):
    """Inside it torch's functions make fp64 where they are asked for fp32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        return function(*map(_double, args), **{key: _double(value) for key, value in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class InDouble:
    """A module's forward in `Double`."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *given: Any, **options: Any) -> Any:
        with Double():
            return self.forward(*given, **options)


def compute_in_double(module: nn.Module) -> None:
    """Let a module's forward compute in fp64, in place."""
    module.forward = InDouble(module.forward)
