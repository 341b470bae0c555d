"""Writes the weights of a quantised model, a layer at a time."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtrain.errors import refusal
from hybridtrain.export import safetensors
from hybridtrain.export.safetensors import TensorSpec
from hybridtrain.models import build
from hybridtrain.models.conversion import as_stored
from hybridtrain.models.init import WeightSource
from hybridtrain.models.structure import structure_of
from hybridtrain.models.weights import INDEX
from hybridtrain.quantize import experts, stored, walk
from hybridtrain.quantize.plan import Plan, choice
from hybridtrain.quantize.progress import Progress
from hybridtrain.quantize.walk import Quantised
from hybridtrain.runtime import log
from hybridtrain.types import Batch

_SUMS = ("bytes", "bits", "weights")
_log = log.get("quantize")


class Writer:
    """`plan`: of the layers that are stored in codes; all other weights are stored in `dtype`."""

    def __init__(
        self, built: Any, meta: Any, source: WeightSource, plan: Plan, *, dtype: torch.dtype, field: str
    ):
        self.built, self.meta, self.source, self.plan = built, meta, source, plan
        self.dtype, self.field = dtype, field
        self.whole = experts.names(meta)
        self.experts = {path for path in plan if not isinstance(meta.get_submodule(path), torch.nn.Linear)}
        self.format = stored.format_of(plan, meta, dtype=dtype, field=field)
        self.layers = f"{structure_of(built).layers}."

    def description(self) -> dict[str, Any]:
        """What config.json says of it."""
        if self.format is None:
            return {}
        others = {
            path
            for path, module in self.meta.named_modules()
            if isinstance(module, torch.nn.Linear) and path not in self.plan
        }
        if not all(map(self._in_codes, self.whole)):
            others.add(stored.EXPERTS)
        return {"quantization_config": self.format.description(self.plan, ignored=others)}

    def write(self, progress: Progress, *, rows: Sequence[Batch]) -> tuple[int, float]:
        """Write what `progress` lacks of the weights into its folder; returns their bytes, and the bits of a
        weight of the layers in the plan.
        """
        count = self.built.get_text_config(decoder=True).num_hidden_layers
        states = progress.states() or walk.inputs_of_first(rows)
        layers = walk.layers_from(
            max(0, len(progress.files) - 1),
            self.built,
            self.source,
            choice(self.plan),
            states=states,
            rows=rows,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            field=self.field,
        )
        for number in range(len(progress.files), count + 1):
            found = next(layers) if number and self.plan else []
            file = self._save(found, layer=number - 1, folder=progress.folder)
            del found  # before the next layer is read
            gc.collect()  # and the modules of this one, which refer to one another
            progress.add(file, states=states if 0 < number < count else [])
            size = sum(each["bytes"] for each in progress.files)
            _log.info("%d/%d layers, %.2f GB", number, count, size / 1e9)
        where = {name: each["file"] for each in progress.files for name in each["tensors"]}
        total, bits, weights = (sum(each[key] for each in progress.files) for key in _SUMS)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (progress.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return total, bits / weights if weights else 8.0 * self.dtype.itemsize

    def _save(self, found: Sequence[Quantised], *, layer: int, folder: Path) -> dict[str, Any]:
        """Write the file of a layer, or with -1 of what is outside the layers; returns what there is to know
        of it.
        """
        tensors = self._rest(layer)
        for each in found:
            tensors |= self._codes(each)
        specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
        name = f"model-{layer + 1:05d}.safetensors"
        own = {} if self.format is None else self.format.metadata
        safetensors.write(folder / name, specs=specs, tensor=lambda spec: tensors[spec.name], metadata=own)
        linears = [(each.scheme, each.linear.outputs, each.linear.inputs) for each in found]
        return {
            "file": name,
            "tensors": list(tensors),
            "bytes": sum(spec.size for spec in specs),
            "bits": sum(scheme.stored_bits(outputs, inputs) for scheme, outputs, inputs in linears),
            "weights": sum(outputs * inputs for _, outputs, inputs in linears),
        }

    def _codes(self, layer: Quantised) -> Mapping[str, Tensor]:
        assert self.format is not None
        tensors = self.format.tensors(layer)
        return {f"{layer.linear.path}.{name}": value.contiguous() for name, value in tensors.items()}

    def _rest(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer, or with -1 those outside of layers, that are not in codes, as stored."""
        tensors = {}
        for name, value in (*self.meta.named_parameters(), *build.saved_buffers(self.meta).items()):
            if self._layer(name) == layer and not self._in_codes(name):
                whole = self.source(name, tuple(value.shape), tuple(slice(0, size) for size in value.shape))
                is_parameter = isinstance(value, torch.nn.Parameter)
                tensors[name] = self._cast(name, whole) if is_parameter else whole.to(value.dtype)
        kept = {}
        if self.plan:  # of experts without codes, a matrix each, transformers would look for the codes
            kept = {name: tensors.pop(name) for name in self.whole & tensors.keys()}
        return {name: tensor.contiguous() for name, tensor in (as_stored(self.meta, tensors) | kept).items()}

    def _in_codes(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.plan or name.rpartition(".")[0] in self.experts

    def _cast(self, name: str, whole: Tensor) -> Tensor:
        value = whole.to(self.dtype)
        if bool(value.isinf().any()) and bool((value.isinf() & ~whole.isinf()).any()):
            problem = f"{name} has values up to {whole.abs().max().item():.3g}"
            raise refusal(
                "quantize.dtype",
                str(self.dtype).removeprefix("torch."),
                problem,
                allowed="bfloat16 or float32",
                instead="quantize.dtype=bfloat16",
            )
        return value

    def _layer(self, name: str) -> int:
        """The number of the layer that a tensor is in; -1: none."""
        inside = name.startswith(self.layers)
        return int(name.removeprefix(self.layers).partition(".")[0]) if inside else -1
