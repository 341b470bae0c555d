"""The plain single-process training loop that parallel layouts are compared with.

It has the model config, initial weights, data and optimizer settings of the engines, but none of their code:
Hugging Face's forward pass, gradients accumulated by hand, and torch's clipping and AdamW. Only
the arithmetic of other optimizers, and of other formats of weights and moments, is the engines'
(optim/stored.py), over whole parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain import registry
from hybridtrain.config.schema import OptimConfig, PrecisionConfig
from hybridtrain.models.build import logits, pair_logits, plain_model, saved_buffers
from hybridtrain.models.heads import text_logits
from hybridtrain.models.init import WeightSource
from hybridtrain.models.linears import linears_in
from hybridtrain.models.patterns import matches
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
        self.master: nn.Module = build_model(config, source=source, param=param, device=torch.device("cpu"))
        for name, parameter in self.master.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not matches(name, freeze))
        self.worker: nn.Module = self.master
        if compute != param:
            self.worker = build_model(config, source=source, param=compute, device=torch.device("cpu"))
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
        return {name: parameter.detach() for name, parameter in self.master.named_parameters()}

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
        whole = _of_documents if batch.packed else logits
        with Double() if self.sums == torch.float64 else contextlib.nullcontext():
            if isinstance(batch, PairBatch):
                assert isinstance(self.task, NextSentence)
                return self.task.loss_of_pairs(*pair_logits(self.worker, batch), batch)
            if isinstance(batch, TextBatch):
                return self.task.loss_of_logits(text_logits(self.worker, batch), batch)
            outputs = whole(self.worker, batch.input_ids_BT, position_ids_BT=batch.position_ids_BT)
            return self.task.loss_of_logits(outputs, batch)


def _of_documents(model: Any, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Tensor:
    """The head's output of packed rows, (B, T, outputs): each document is a row of its own."""
    rows = []
    for ids, places in zip(input_ids_BT, position_ids_BT, strict=True):
        bounds = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
        alone = [
            logits(model, ids[None, start:stop], position_ids_BT=places[None, start:stop])[0]
            for start, stop in itertools.pairwise(bounds)
        ]
        rows.append(torch.cat(alone))
    return torch.stack(rows)


@torch.no_grad()
def build_model(config: Any, *, source: WeightSource, param: torch.dtype, device: torch.device) -> nn.Module:
    """Hugging Face's model of `config` on `device`, with parameters from `source` in dtype `param`."""
    with device:
        model = _in_dtype(plain_model(config), param)
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
