"""One pipeline stage: consecutive layers of a Hugging Face model, with every module under its original name.

    embed (first stage) -> layers[a:b] -> norm -> head, which computes the loss (last stage)

With pp=1 the only stage is the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.models.build import meta_model
from hybridtrain.models.family import Family
from hybridtrain.types import Batch


class Stage(nn.Module):
    """Layers `layers` of the model; `first` adds the embedding, `last` the final norm and the head.

    `head` makes a module from the model's own head that replaces it and is called with (hidden, batch); see
    tasks/head.py. forward: (input_ids (B, T) or hidden (B, T, D), batch) -> hidden (B, T, D), or on the last
    stage what the head returns: the task's sums of losses, fp32. Under sequence parallelism hidden states
    have this rank's T / tp positions.
    """

    def __init__(
        self,
        config: Any,
        *,
        family: Family,
        layers: range,
        first: bool,
        last: bool,
        head: Callable[[nn.Module], nn.Module],
    ):
        super().__init__()
        self.config, self.family, self.layers, self.first, self.last = config, family, layers, first, last
        whole = meta_model(config)
        paths = [family.rotary, *(f"{family.layers}.{i}" for i in layers)]
        paths += [family.embed] * first + [family.norm] * last
        for path in paths:
            _place(self, path, whole.get_submodule(path))
        if last:
            _place(self, family.head, head(whole.get_submodule(family.head)))

    @property
    def tied(self) -> bool:
        """Whether the model shares one matrix between embedding and head."""
        return bool(self.config.tie_word_embeddings)

    def tie(self) -> None:
        """Let embedding and head share one parameter, if the model ties them and this stage has both."""
        if self.tied and self.first and self.last:
            self.part(self.family.head).weight = self.part(self.family.embed).weight

    def owner(self, name: str) -> str:
        """The name under which a parameter is initialized, frozen and saved: that of the embedding
        for a tied head.
        """
        return f"{self.family.embed}.weight" if self.tied and name == f"{self.family.head}.weight" else name

    def part(self, path: str) -> nn.Module:
        return self.get_submodule(path)

    def layer_modules(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index in the whole model, layer)."""
        for index in self.layers:
            yield index, self.part(f"{self.family.layers}.{index}")

    def forward(self, x: Tensor, *, batch: Batch) -> Tensor:
        positions_BT, packed = batch.position_ids_BT, batch.packed
        hidden = self.part(self.family.embed)(x) if self.first else x
        rotary = self.part(self.family.rotary)(hidden, positions_BT)
        windows = {index: self.family.window(self.config, index) for index in self.layers}
        masks = {
            window: attention_mask(
                self.config, window=window, position_ids_BT=positions_BT, packed=packed, like=hidden
            )
            for window in set(windows.values())
        }
        for index, layer in self.layer_modules():
            hidden = layer(
                hidden,
                attention_mask=masks[windows[index]],
                position_ids=positions_BT,
                position_embeddings=rotary,
            )
        return (
            self.part(self.family.head)(self.part(self.family.norm)(hidden), batch) if self.last else hidden
        )


def attention_mask(
    config: Any, *, window: int | None, position_ids_BT: Tensor, packed: bool, like: Tensor
) -> Tensor | None:
    """The mask of a layer: None for full causal SDPA, else (1 or B, 1, T, T); bool for
    sdpa, additive for eager.

    With `packed`, each position 0 starts a document, and documents do not attend to each other.

    Without a mask, transformers' SDPA path ignores a window that is shorter than the row, and its eager
    path is not causal.
    """
    sdpa, positions = config._attn_implementation == "sdpa", position_ids_BT.shape[1]
    if sdpa and not packed and (window is None or window >= positions):
        return None
    index = torch.arange(positions, device=like.device)
    distance = index[:, None] - index[None, :]
    allowed = ((distance >= 0) & (distance < (window or positions)))[None]
    if packed:
        document_BT = (position_ids_BT == 0).cumsum(1)
        allowed = allowed & (document_BT[:, :, None] == document_BT[:, None, :])
    if sdpa:
        return allowed[:, None]
    dtype = like.dtype
    return torch.zeros((), dtype=dtype, device=like.device).masked_fill(~allowed, torch.finfo(dtype).min)[
        :, None
    ]


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` under the dotted `path`, inside empty modules."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
