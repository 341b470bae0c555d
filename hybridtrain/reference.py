"""The plain single-process training loop that parallel layouts are compared with.

It has the model config, initial weights, data and optimizer settings of the engines, but none of their code:
Hugging Face's forward pass, gradients accumulated by hand, and torch's clipping and AdamW. Only
the arithmetic of other optimizers, and of other formats of weights and moments, is the engines'
(optim/stored.py), over whole parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain import registry
from hybridtrain.config.schema import AdaptersConfig, OptimConfig, PrecisionConfig
from hybridtrain.models import adapters as low_rank
from hybridtrain.models.build import logits, pair_logits, plain_model, saved_buffers
from hybridtrain.models.dropout import Dropouts
from hybridtrain.models.heads import text_logits
from hybridtrain.models.init import WeightSource
from hybridtrain.models.keyed import keyed
from hybridtrain.models.linears import linears_in
from hybridtrain.models.patterns import is_frozen
from hybridtrain.models.structure import structure_of
from hybridtrain.optim import matrices, optimizer, user_optimizer
from hybridtrain.optim.shards import Update, groups, local_shards, set_rate
from hybridtrain.optim.stored import Formats
from hybridtrain.plan.formats import FORMATS, HIGH
from hybridtrain.precision.double import Double
from hybridtrain.precision.policy import policy
from hybridtrain.precision.qlinear import Product, convert
from hybridtrain.precision.rules import format_of
from hybridtrain.tasks.next_sentence import NextSentence
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch, PairBatch, TextBatch


@dataclass(frozen=True)
class ReferenceStep:
    loss: float
    """Mean over target tokens; NaN if there are none."""
    grad_norm: float
    gradients: dict[str, Tensor]
    """Hugging Face parameter name -> gradient before clipping, fp32."""


class Reference:
    """Master weights in `param`; forward and backward in `compute`, on a copy of the model
    if the dtypes differ.
    """

    def __init__(
        self,
        config: Any,
        *,
        source: WeightSource,
        settings: OptimConfig,
        precision: PrecisionConfig,
        seed: int,
        freeze: Sequence[str],
        adapters: AdaptersConfig,
        task: Task,
    ):
        dtypes = policy(precision)
        param, compute = dtypes.param, dtypes.compute
        self.settings, self.compute, self.task = settings, compute, task
        self.sums = torch.promote_types(torch.float32, compute)
        """dtype of gradients over micro-batches, and of losses."""
        self.loss_scale = 1.0
        """Fixed loss scale: without one, small gradients underflow in fp16. Gradients are
        divided by it again."""
        stored: Any = {"config": config, "dtype": compute}
        if adapters.kind != "none":
            source = low_rank.source(source, adapters, **stored, seed=seed)
        self.codes = low_rank.codes_of(source, adapters, **stored)
        """What engines store of frozen weights that they keep in codes; here they are rounded."""
        source = low_rank.as_stored(source, adapters, **stored)
        build = partial(build_model, config, adapters, source=source, device=torch.device("cpu"))
        self.master: nn.Module = build(param=param)
        for name, parameter in self.master.named_parameters():
            frozen = is_frozen(name, freeze=freeze, adapters=adapters)
            parameter.requires_grad_(parameter.requires_grad and not frozen)
            if frozen and adapters.kind != "none":  # not trained: stored as it computes
                parameter.data = parameter.data.to(compute)
        self.worker: nn.Module = build(param=compute) if compute != param else self.master
        self.dropouts = keyed(self.worker, config, adapters=adapters)
        structure = structure_of(config)
        for number, layer in enumerate(self.worker.get_submodule(structure.layers).children()):
            path = f"{structure.layers}.{number}"
            for linear, module in linears_in(layer, path=path, number=number, config=config):
                if (name := format_of(linear, precision)) != HIGH:
                    convert(module, Product(FORMATS[name], "", None, native=False))
        self.optimizer = _optimizer(parameter_groups(self.master, settings), settings)
        self.ours = _built_in(self.master, settings, precision=precision, seed=seed, config=config)
        """In the place of `optimizer`, where torch has none."""

    def parameters(self) -> dict[str, Tensor]:
        own = {name: parameter.detach() for name, parameter in self.master.named_parameters()}
        return own | self.codes

    def step(self, micro_batches: Sequence[Batch], *, lr: float) -> ReferenceStep:
        """One optimizer step over all micro-batches of the global batch."""
        counts = {
            name: sum(int(self.task.counts(batch)[name]) for batch in micro_batches)
            for name in self.task.weights
        }
        trained = {name: p for name, p in self.master.named_parameters() if p.requires_grad}
        totals = dict.fromkeys(counts, 0.0)
        if not any(counts.values()):  # no targets: no loss and no update
            return ReferenceStep(math.nan, 0.0, {name: torch.zeros(p.shape) for name, p in trained.items()})
        gradients: dict[str, Tensor] = {}
        """Of what the model uses; the rest gets no weight decay either."""
        self._refresh()
        for batch in micro_batches:
            sums = self._sums(batch)
            for name, value in sums.items():
                totals[name] += value.item()
            means = [weight * sums[name] / max(1, counts[name]) for name, weight in self.task.weights.items()]
            (torch.stack(means).sum() * self.loss_scale).backward()
            for name, parameter in self.worker.named_parameters():
                if name in trained and parameter.grad is not None:
                    part = parameter.grad.to(self.sums) / self.loss_scale
                    gradients[name] = gradients[name] + part if name in gradients else part
                parameter.grad = None
        for name, parameter in self.master.named_parameters():
            parameter.grad = gradients[name].to(parameter.dtype, copy=True) if name in gradients else None
        updated = [p for p in self.master.parameters() if p.grad is not None]
        # fp64: on the CPU torch's fp32 norm is one running sum, with errors of 1e-5 at 2^20 elements and 8e-4
        # at 2^24
        squares = [
            torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            for gradient in (p.grad for p in updated)
            if gradient is not None
        ]
        norm = torch.stack(squares).sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_(
            updated, self.settings.clip if self.settings.clip > 0 else float("inf"), norm.to(self.sums)
        )
        self._update(lr=lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum(weight * totals[name] / max(1, counts[name]) for name, weight in self.task.weights.items())
        return ReferenceStep(loss, float(norm), gradients)

    @torch.no_grad()
    def _update(self, *, lr: float) -> None:
        if self.ours is None:
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        else:
            one = torch.ones((), dtype=self.sums)
            self.ours.step(lr=lr, divide=one, skip=torch.zeros(()))

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.worker is not self.master:
            for ours, theirs in zip(self.worker.parameters(), self.master.parameters(), strict=True):
                ours.copy_(theirs)

    def _sums(self, batch: Batch) -> dict[str, Tensor]:
        with Double() if self.sums == torch.float64 else contextlib.nullcontext():
            if isinstance(batch, PairBatch | TextBatch):
                with self.dropouts.of(batch.keys_B, start=0, length=batch.input_ids_BT.shape[1]):
                    if isinstance(batch, TextBatch):
                        return self.task.loss_of_logits(text_logits(self.worker, batch), batch)
                    assert isinstance(self.task, NextSentence)
                    return self.task.loss_of_pairs(*pair_logits(self.worker, batch), batch)
            if batch.packed:
                rows = [batch.rows(row, row + 1) for row in range(len(batch.input_ids_BT))]
                outputs = torch.cat([_of_documents(self.worker, row, self.dropouts) for row in rows])
            else:
                outputs = _outputs(self.worker, batch, self.dropouts, start=0)
            return self.task.loss_of_logits(outputs, batch)


def _outputs(model: Any, batch: Batch, dropouts: Dropouts, *, start: int) -> Tensor:
    """The head's output, (B, T, outputs). `start`: place of the first position in the rows of `keys_B`."""
    ids_BT = batch.input_ids_BT
    with dropouts.of(batch.keys_B, start=start, length=ids_BT.shape[1]):
        return logits(model, ids_BT, position_ids_BT=batch.position_ids_BT)


def _of_documents(model: Any, row: Batch, dropouts: Dropouts) -> Tensor:
    """The head's output of one packed row, (1, T, outputs): each document is a row of its own."""
    bounds = [*(row.position_ids_BT[0] == 0).nonzero().flatten().tolist(), row.input_ids_BT.shape[1]]
    alone = []
    for start, stop in itertools.pairwise(bounds):
        ids, places = row.input_ids_BT[:, start:stop], row.position_ids_BT[:, start:stop]
        document = dataclasses.replace(row, input_ids_BT=ids, position_ids_BT=places)
        alone.append(_outputs(model, document, dropouts, start=start))
    return torch.cat(alone, dim=1)


@torch.no_grad()
def build_model(
    config: Any, adapters: AdaptersConfig, *, source: WeightSource, param: torch.dtype, device: torch.device
) -> nn.Module:
    """Hugging Face's model of `config` on `device`, with parameters from `source` in dtype `param`."""
    with device:
        model = plain_model(config)
        low_rank.add_to_model(model, adapters, config=config)
        model = _in_dtype(model, param)
    for name, tensor in {**dict(model.named_parameters()), **saved_buffers(model)}.items():
        shape = tuple(tensor.shape)
        tensor.copy_(source(name, shape, tuple(slice(0, size) for size in shape)))
    return model


def parameter_groups(model: nn.Module, settings: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimizers: trained parameters by rate and weight decay."""
    named = [(name, p.dim(), p) for name, p in model.named_parameters() if p.requires_grad]
    return groups(named, settings)


def _optimizer(groups: list[dict[str, Any]], settings: OptimConfig) -> torch.optim.Optimizer:
    """torch's AdamW or a user's optimizer over whole parameters; of others only the groups are used."""
    if settings.kind not in registry.BUILT_IN["optimizer"]:
        return user_optimizer.build(groups, settings)
    first, second = settings.betas
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(first, second), eps=settings.eps)


def _built_in(
    model: nn.Module, settings: OptimConfig, *, precision: PrecisionConfig, seed: int, config: Any
) -> Update | None:
    """An optimizer of the engines over whole parameters; None where torch's AdamW or a user's is compared."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    formats, kind = Formats.of(precision, seed=seed), settings.kind
    plain = kind == "adamw" and all(formats.plain(parameter.dtype) for _, parameter in named)
    if plain or kind not in registry.BUILT_IN["optimizer"]:
        return None
    parts = matrices.of_model(config) if kind == "muon" else {}
    return optimizer.build(local_shards(named), settings, formats=formats, parts=parts, group=None)


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast only parameters: `Module.to` would also round the rotary frequencies, by up to 0.4 %."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
