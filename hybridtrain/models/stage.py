"""One pipeline stage: consecutive layers of a Hugging Face model, run by the model's own forward.

    embedding -> layers[a:b] -> norm -> head, which computes the loss        every module under its own name
    (first stage)               (last stage)

On each stage the own forward runs from its start: it makes masks, positions and whatever else its layers
take. Layers of other stages are stubs: those before return the hidden states that the stage received, the
first one after ends the forward; the last stage ends it at the head. With pp=1 the only stage is the whole
model.

Modules before the layers are stubs on later stages, but for those that give layers more than hidden states,
such as embeddings for each layer: every stage has and runs them (Structure.shared).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridtrain.models import attention, dropout, encoder
from hybridtrain.models.build import empty_model
from hybridtrain.models.heads import arguments_of
from hybridtrain.models.structure import Stop, hidden_of, outermost, structure_of, stub
from hybridtrain.types import Batch


class Stage(nn.Module):
    """Layers `layers` of the model; `first` adds the embedding, `last` the final norm and the head.

    `head` makes a module from (the model's own head, scale=, cap=) that replaces it and is called with
    (hidden, batch), and with the logits of a head for pairs; see tasks/head.py.
    forward: (input_ids (B, T) or hidden (B, T, D), batch) -> hidden (B, T, D), or on the last stage what the
    head returns: the task's sums of losses, fp32. Hidden states of some models have another shape
    (Structure.boundary). Under sequence parallelism they have this rank's T / tp positions.
    """

    _model: Any
    _received: Tensor | None
    _ids_BT: Tensor | None
    _pooled: Tensor | None

    def __init__(
        self,
        config: Any,
        *,
        layers: range,
        first: bool,
        last: bool,
        head: Callable[..., nn.Module],
    ):
        super().__init__()
        self.config, self.layers, self.first, self.last = config, layers, first, last
        structure = structure_of(config)
        own = copy.deepcopy(config)
        own._attn_implementation = structure.attention
        model = empty_model(own, initializing=_BuffersAlone())
        # One table for both: a module that is replaced in the stage is replaced in the model.
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.__dict__["_model"] = model  # not registered: its modules are the stage's
        self.structure = structure
        self._received = self._ids_BT = self._pooled = None
        self.partial: set[str] = set()
        """Parameters of which each tensor-parallel rank computes a part of the gradient."""
        self.pieces: Mapping[str, Any] = {}
        """Parameter -> what this tensor-parallel rank uses of it (models/slicing.py)."""
        listed: Any = self.part(structure.layers)
        for index, layer in enumerate(listed):
            if index not in layers:
                listed[index] = stub(layer, self._inject if index < layers.start else _stop)
        if not first:
            self._replace_before()
        if last:
            _replace(
                self,
                structure.head,
                head(self.part(structure.head), scale=structure.scale, cap=structure.cap),
            )
            self.part(structure.head).register_forward_pre_hook(_stop_without_batch)
            if structure.pairs is not None:
                self.part(structure.pairs[0]).register_forward_hook(self._keep_pooled)
        else:
            for path in (*structure.after, structure.head):
                _replace(self, path, stub(self.part(path), _unchanged))
        self.dropouts = dropout.install(self, config=config, layers=structure.layers, adapted=False)
        self.initial_buffers = dict(self.named_buffers())
        """Name -> value, e.g. of rotary frequencies, for reset_buffers."""
        self.untrained = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        """Parameters that the model itself does not train, such as fixed positions."""

    def _replace_before(self) -> None:
        """Make stubs of what is called before the layers and belongs to the first stage alone."""
        structure = self.structure
        for path, shape in outermost(structure.before):
            if path in structure.shared:
                continue
            if "?" in shape:
                raise ValueError(f"{path}, called before the layers, is neither an embedding nor a norm")
            _replace(self, path, stub(self.part(path), partial(self._zeros, shape) if shape else _unchanged))

    @property
    def tied(self) -> bool:
        """Whether the model shares one matrix between embedding and head."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @property
    def embeds(self) -> bool:
        """Whether this stage has the embedding."""
        return self.first or self.structure.embed in self.structure.shared

    def tie(self) -> None:
        """Let embedding and head share one parameter, if the model ties them and this stage has both."""
        if self.tied and self.embeds and self.last:
            self.part(self.structure.head).weight = self.part(self.structure.embed).weight

    def owner(self, name: str) -> str:
        """The name under which a parameter is initialized, frozen and saved: that of the embedding
        for a tied head.
        """
        structure = self.structure
        return f"{structure.embed}.weight" if self.tied and name == f"{structure.head}.weight" else name

    def part(self, path: str) -> nn.Module:
        return self.get_submodule(path)

    def hidden_shape(self, *, rows: int, positions: int) -> tuple[int, ...]:
        """The shape of what a stage hands to the next."""
        width = self.config.get_text_config(decoder=True).hidden_size
        return _sizes(self.structure.boundary, rows, positions, width)

    def hidden_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype of what a layer hands to the next, where it computes in another."""
        wide = getattr(self.config.get_text_config(decoder=True), "residual_in_fp32", False)
        return torch.promote_types(torch.float32, compute) if wide else compute

    def layer_modules(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index in the whole model, layer)."""
        for index in self.layers:
            yield index, self.part(f"{self.structure.layers}.{index}")

    def forward(self, x: Tensor, *, batch: Batch) -> Tensor:
        ids_BT = batch.input_ids_BT
        self._received, self._ids_BT = None if self.first else x, ids_BT
        if not self.embeds:  # models read the device of their embedding
            self.part(self.structure.embed).__dict__["weight"] = x
        try:
            with attention.documents_of(batch), self._dropping(batch):
                self._model(input_ids=ids_BT, **self._arguments(batch))
        except Stop as stop:
            hidden, pooled = stop.hidden, self._pooled
        finally:
            self._received = self._ids_BT = self._pooled = None
            if not self.embeds:  # kept, it would hold the last micro-batch's hidden states
                del self.part(self.structure.embed).__dict__["weight"]
        if not self.last:
            return hidden.contiguous()
        of_pairs = () if pooled is None else (self.part(encoder.PAIRS)(pooled),)
        return self.part(self.structure.head)(hidden, batch, *of_pairs)

    def _dropping(self, batch: Batch) -> AbstractContextManager[None]:
        keys_B = batch.keys_B if self.training else None
        return self.dropouts.of(keys_B, start=0, length=batch.input_ids_BT.shape[1])

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        """Those of the model's forward besides the tokens, as far as it has them."""
        arguments = {
            "position_ids": batch.position_ids_BT,
            # With it, transformers looks for no documents of its own in the positions.
            "attention_mask": torch.ones_like(batch.input_ids_BT),
            "use_cache": False,
        }
        known = {name: value for name, value in arguments.items() if name in self.structure.arguments}
        return {**known, **arguments_of(self._model, batch)}

    def train(self, mode: bool = True) -> Stage:
        """As nn.Module.train, also for the model, which is not registered."""
        self._model.training = mode
        return super().train(mode)

    def _inject(self, *_: Any, **__: Any) -> Any:
        """A layer of an earlier stage: returns what this stage received, in the form of a layer's result."""
        structure = self.structure
        if structure.items == 0:
            return self._received
        return structure.returns((self._received, *[None] * (structure.items - 1)))

    def _keep_pooled(self, module: nn.Module, given: Any, result: Tensor) -> None:  # noqa: ARG002 - a hook's
        self._pooled = result

    def _zeros(self, shape: str, *_: Any, **__: Any) -> Tensor:
        """An embedding of an earlier stage: of its result only shape and dtype are used."""
        assert self._received is not None
        assert self._ids_BT is not None
        rows, positions = self._ids_BT.shape
        return self._received.new_zeros(_sizes(shape, rows, positions, self._received.shape[-1]))


class _BuffersAlone(TorchDispatchMode):
    """Leaves out the initial values of parameters, which are on meta: torch takes a millisecond for each."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("normal_", "uniform_", "fill_", "zero_", "copy_") and args[0].device.type == "meta":
            return args[0]
        return function(*args, **(kwargs or {}))


def _sizes(shape: str, rows: int, positions: int, width: int) -> tuple[int, ...]:
    """The sizes of a shape such as "BTD" (Structure.boundary)."""
    named = {"B": rows, "T": positions, "D": width}
    return tuple(named[size] if size in named else int(size) for size in shape)


def _stop_without_batch(head: nn.Module, given: tuple[Any, ...]) -> None:  # noqa: ARG001 - a hook's signature
    """Ends the model's own forward, which calls the head with hidden states alone."""
    if len(given) == 1:
        raise Stop(given[0])


def _stop(*given: Any, **options: Any) -> Any:
    raise Stop(hidden_of(given, options))


def _unchanged(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
