"""Watches the linear layers of a quantised folder whose inputs are rounded to 8 bits (a8, a8s). On texts that
differ from the rows on which a scale was found, a layer's inputs may saturate, or its output overflow: that
call is computed with inputs as they are, in the dtype of the weights.

The scales of inputs are those that compressed-tensors loads with the weights.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from hybridtrain.plan.formats import E4M3, INT8

LOST = 0.01
"""Largest share of the inputs' sum of squares that may lie beyond the range of their scale."""
_SATURATE, _OVERFLOW = "inputs saturate", "the output is not finite"


class Guard:
    """`on`: whether to watch a model at all; else it stays as it is."""

    def __init__(self, model: Any, *, on: bool):
        self.calls: Counter[str] = Counter()
        self.unrounded: dict[str, Counter[str]] = {}
        """Path -> why calls were computed with inputs as they are -> how many."""
        self.dtype = str(model.dtype).removeprefix("torch.")
        for path, module in model.named_modules() if on else ():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is not None and scheme.input_activations is not None:
                self._watch(path, module, scheme.input_activations)

    def lines(self) -> list[str]:
        """What happened, a line for each layer, and what to do about it."""
        lines = [
            f"{path}: {sum(whys.values())} of {self.calls[path]} calls in {self.dtype}, inputs unrounded: "
            + ", ".join(f"{why} ({count})" if len(whys) > 1 else why for why, count in whys.items())
            for path, whys in self.unrounded.items()
        ]
        if lines:
            lines.append(
                "these texts differ from those that the scales were found on: hybridtrain quantize ... "
                "quantize.prompts_file=FILE finds them on texts like these"
            )
        return lines

    def _watch(self, path: str, module: Any, inputs: Any) -> None:
        """Add hooks, as compressed-tensors changes forward once more when the model is first called."""
        module.quantization_enabled = True

        def before(_: Any, given: tuple[Tensor, ...]) -> None:
            self.calls[path] += 1
            if not inputs.dynamic and _lost(given[0], _limit(module, inputs)) > LOST:
                self._note(path, _SATURATE)
                module.quantization_enabled = False

        def after(_: Any, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if module.quantization_enabled and not bool(y.isfinite().all()):
                self._note(path, _OVERFLOW)
                module.quantization_enabled = False
                y = module.forward(*given)
            module.quantization_enabled = True
            return y

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _note(self, path: str, why: str) -> None:
        self.unrounded.setdefault(path, Counter())[why] += 1


def _limit(module: Any, inputs: Any) -> float:
    """The largest input of one scale."""
    from accelerate.utils import align_module_device

    largest = INT8.largest if inputs.type == "int" else E4M3.largest
    with align_module_device(module):
        return float(module.input_scale.detach().float().max()) * largest


def _lost(x: Tensor, limit: float) -> float:
    """The share of the sum of squares that lies beyond a limit."""
    size = x.abs().float()
    beyond = (size - limit).clamp(min=0).square().sum()
    return float(beyond / size.square().sum().clamp(min=1e-30))
