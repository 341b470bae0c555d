"""Layers in 8-bit floats as torchao stores them: e4m3, and e5m2, which only it has.

    _weight_qdata   the codes
    _weight_scale   in bf16

What a tensor is stands in the metadata of safetensors files. transformers reads that of all and keeps one:
each file has the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.walk import Quantised

_CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def holds(scheme: Scheme) -> bool:
    """Whether torchao stores it, and computes it everywhere as it is."""
    return scheme.codes in _CODES and not (scheme.inputs or scheme.affine or scheme.rank or scheme.bias)


class Format:
    """Writes layers of a model (on meta). `schemes`: path -> scheme; `dtype`: of the weights that codes stand
    for."""

    def __init__(self, schemes: Mapping[str, Scheme], meta: nn.Module, *, dtype: torch.dtype) -> None:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # kernels for GPUs that do not load
        import torchao
        import torchao.core.config
        import torchao.prototype.safetensors.safetensors_support as safetensors
        import torchao.quantization as quantization

        self._library, self._quantization = torchao, quantization
        weights = {
            f"{path}.weight": self._empty(scheme, meta, path, dtype) for path, scheme in schemes.items()
        }
        self.metadata: Mapping[str, str] = safetensors.flatten_tensor_state_dict(weights)[1]

    def _empty(self, scheme: Scheme, meta: nn.Module, path: str, dtype: torch.dtype) -> Tensor:
        outputs, inputs = meta.get_submodule(path).weight.shape  # type: ignore[union-attr, misc]
        rows = 1 if scheme.share == "row" else outputs
        found: Tensor = self._quantization.Float8Tensor(
            torch.empty(outputs, inputs, dtype=_CODES[scheme.codes], device="meta"),
            torch.empty(outputs // rows, 1, dtype=torch.bfloat16, device="meta"),
            block_size=[rows, inputs],
            dtype=dtype,
        )
        return found

    def description(self, schemes: Mapping[str, Scheme], *, ignored: Iterable[str]) -> dict[str, Any]:  # noqa: ARG002
        """`quantization_config` of config.json: the scheme of each layer by its name, and no others."""
        plan = self._quantization.FqnToConfig({path: self._scheme(each) for path, each in schemes.items()})
        return {
            "quant_method": "torchao",
            "quant_type": {"default": self._library.core.config.config_to_dict(plan)},
            "version": self._library.__version__,
        }

    def _scheme(self, scheme: Scheme) -> Any:
        share = {"row": self._quantization.PerRow, "tensor": self._quantization.PerTensor}[scheme.share]
        return self._quantization.Float8WeightOnlyConfig(
            weight_dtype=_CODES[scheme.codes], granularity=share()
        )

    def tensors(self, layer: Quantised) -> dict[str, Tensor]:
        """Name inside the layer -> what is stored of it, without its bias."""
        assert layer.grid is not None
        return {"_weight_qdata": layer.codes.cpu(), "_weight_scale": layer.grid.scale_NG.bfloat16().cpu()}
