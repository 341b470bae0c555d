"""Exports a run with adapters: these alone, as a folder that peft loads, or the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybridtrain.checkpoint import marker, metadata
from hybridtrain.config.schema import AdaptersConfig, Config
from hybridtrain.errors import refusal
from hybridtrain.export import safetensors, weights
from hybridtrain.export.safetensors import TensorSpec
from hybridtrain.models import adapter_folder, adapters, build, dora, hub, load
from hybridtrain.models.init import WeightSource
from hybridtrain.models.linears import is_transposed
from hybridtrain.models.parameters import trained_shapes
from hybridtrain.models.plain import TYPES
from hybridtrain.models.source import read_config, with_head
from hybridtrain.models.weights import digest
from hybridtrain.run.identity import other_base
from hybridtrain.runtime import log

_log = log.get("export")


def _built(config: Config) -> Any:
    """The transformers config of the run's model."""
    config = with_head(config)
    fields = read_config(config.model)
    return build.hf_config(fields, chosen=config.model.config, attention=config.model.attention)


def check_merge(merge: bool, settings: AdaptersConfig) -> None:
    """Refuse export.merge for a run without adapters (raises UserError)."""
    if merge and settings.kind == "none":
        raise refusal(
            "export.merge",
            "true",
            "the run has no adapters: its export is a whole model anyway",
            allowed="false",
            instead="without export.merge",
        )


def write(
    checkpoint: Path,
    *,
    partial: Path,
    config: Config,
    merge: bool,
    stored: metadata.dcp_metadata.Metadata,
    dtype: torch.dtype,
    average: bool,
    max_shard_bytes: int,
) -> None:
    """Write the adapters of a checkpoint to the folder `partial`, or with `merge` the whole model."""
    read = weights.reader(checkpoint, stored, average=average)
    if merge:
        _write_merged(
            checkpoint,
            read,
            partial=partial,
            config=config,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
    else:
        _write_alone(read, partial=partial, config=config, dtype=dtype)


def _write_alone(
    read: Callable[[TensorSpec], torch.Tensor], *, partial: Path, config: Config, dtype: torch.dtype
) -> None:
    """Write adapters, the head of a classifier, and their adapter_config.json."""
    built, settings = _built(config), config.adapters
    linears = adapters.chosen(built, settings)
    changed = {name: value for name, value in config.model.config.items() if name != "architectures"}
    if changed:
        _log.warning(
            "export: adapters go with the base model as it is, without model.config=%s; "
            "export.merge=true writes a model with it",
            changed,
        )
    names = trained_shapes(built, freeze=(), settings=settings)
    specs = {
        f"{adapter_folder.PREFIX}{name}": TensorSpec(name, tuple(shape), dtype)
        for name, shape in names.items()
    }
    safetensors.write(
        partial / adapter_folder.WEIGHTS,
        specs=[TensorSpec(name, spec.shape, dtype) for name, spec in specs.items()],
        tensor=lambda spec: read(specs[spec.name]),
        metadata={},
    )
    fields = adapter_folder.config_of(linears, settings, base=config.model, model=built)
    (partial / adapter_folder.CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _write_merged(
    checkpoint: Path,
    read: Callable[[TensorSpec], torch.Tensor],
    *,
    partial: Path,
    config: Config,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write the model with the adapters of a checkpoint added to its weights. Raises UserError if the weights
    are not those that the adapters were trained on.
    """
    of_checkpoint = marker.read_progress(checkpoint).fingerprints.get("base")
    if of_checkpoint != (here := digest(hub.weights_folder(config.model))):
        raise other_base(of_checkpoint, here)
    built = _built(config)
    model = build.meta_model(built)
    base = load.initial(config.model, built, seed=config.run.seed)
    kept = build.saved_buffers(model)
    parameters = dict(model.named_parameters())
    specs = [TensorSpec(name, tuple(each.shape), dtype) for name, each in parameters.items()]
    specs += [TensorSpec(name, tuple(each.shape), each.dtype) for name, each in kept.items()]
    merge = _Merge(config, built, model=model, base=base, read=read)
    weights.write_files(
        weights.in_order(specs),
        merge,
        model=None if built.model_type in TYPES else model,
        partial=partial,
        max_shard_bytes=max_shard_bytes,
    )


class _Merge:
    """Reads a parameter of the base model, with its adapter added, or one that was trained whole."""

    def __init__(
        self, config: Config, built: Any, *, model: Any, base: WeightSource, read: Callable[..., torch.Tensor]
    ):
        self.settings, self.model, self.base, self.read = config.adapters, model, base, read
        linears = adapters.chosen(built, config.adapters)
        self.saved = adapters.saved(built, config.adapters)
        self.shapes = adapters.shapes(linears, config.adapters)

    def __call__(self, spec: TensorSpec) -> torch.Tensor:
        if spec.name in self.saved:
            return self.read(spec)
        value = self.base(spec.name, spec.shape, tuple(slice(0, size) for size in spec.shape))
        path = spec.name.rpartition(".")[0]
        a, b = (self._of(f"{path}.{part}.weight") for part in (adapters.A, adapters.B))
        if spec.name.endswith(".weight") and a is not None and b is not None:
            value = adapters.merged(
                value,
                a,
                b,
                self._of(f"{path}.{dora.MAGNITUDE}"),
                scale=adapters.scale_of(self.settings),
                transposed=is_transposed(self.model.get_submodule(path)),
            )
        return weights.cast(value, spec=spec)

    def _of(self, name: str) -> torch.Tensor | None:
        """A parameter of an adapter in the checkpoint, if the run has it."""
        if name not in self.shapes:
            return None
        return self.read(TensorSpec(name, tuple(self.shapes[name]), torch.float32))
