"""Proof of a slicing (models/slicing.py) on a reduced copy: ranks are threads of this process, and a
collective is a barrier between them.

Loss and gradients of all ranks together are compared with one plain forward and backward pass of Hugging
Face's own model. A gradient that is not cut must be the whole one on each rank, or have it as its sum.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.analysis.analyse import TOLERANCE, Copy, Found, batch_for, loss_of, plain, task_of, tokens
from hybridtrain.models import dropout
from hybridtrain.models.dropout import Site
from hybridtrain.models.init import reset_buffers
from hybridtrain.models.slicing import (
    WHOLE,
    Local,
    Slicing,
    pieces,
    rewire,
)
from hybridtrain.models.stage import Stage
from hybridtrain.tasks.head import Head

_LIMIT_S = 300
_ROUNDING = 1e-6
"""Part of the whole gradient's norm below which that of a parameter may be nothing but rounding."""


class ThreadRanks:
    """Ranks that are threads. See runtime.collectives.Ranks."""

    def __init__(self, rank: int, size: int, *, slots: list[Any], barrier: threading.Barrier):
        self.rank, self.size, self.slots, self.barrier = rank, size, slots, barrier

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def max(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).amax(0)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=1)

    def scatter(self, x: Tensor) -> Tensor:
        return self.sum(x).chunk(self.size, dim=1)[self.rank].contiguous()

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x.detach().clone()
        self.barrier.wait(_LIMIT_S)
        found = list(self.slots)
        self.barrier.wait(_LIMIT_S)
        return found


class Failure(Exception):
    """Why a slicing is not the model."""


class Probe:
    """Slicings of a reduced copy for `size` ranks, against one plain process."""

    def __init__(self, copy: Copy, *, size: int):
        self.copy, self.size = copy, size
        ids = tokens(length=-(-12 // size) * size)
        self.batch = batch_for(copy, ids)
        self.channels: dict[str, int] = {}
        """Module -> number of channels or heads of which it drops elements."""
        dropout.replace_sites(copy.model, lambda path, site: _Counted(site, path, self.channels))
        self.expected: Found = plain(copy, [(self.batch, 0)])
        self.total = torch.stack([g.norm() for g in self.expected[1].values()]).norm().item()

    def prove(self, slicing: Slicing) -> Slicing:
        """The slicing, with the parameters whose gradients are partial. Raises Failure."""
        found = self._run(slicing, backward=True)
        prefix = f"{found[0].stage.structure.layers}."
        verdicts: dict[str, bool] = {}
        unknown: dict[str, bool] = {}
        for name in {name for rank in found for name in rank.gradients}:
            inside = name.startswith(prefix)
            key = name.removeprefix(prefix).partition(".")[2] if inside else name
            if self._is_cut(name, found):
                continue
            if (is_partial := self._is_partial(name, found)) is None:
                unknown[key] = inside
            elif verdicts.setdefault(key, is_partial) != is_partial:
                raise Failure(f"the gradient of {key} is partial in some layers")
        verdicts = {key: inside and _between(key, slicing) for key, inside in unknown.items()} | verdicts
        partial_ones = frozenset(key for key, is_partial in verdicts.items() if is_partial)
        return dataclasses.replace(slicing, partial=partial_ones, dropped=_dropped(found))

    def forward(self, slicing: Slicing) -> None:
        """Compare the loss alone. Raises Failure."""
        self._run(slicing, backward=False)

    def _run(self, slicing: Slicing, *, backward: bool) -> list[_Rank]:
        """The ranks after a forward pass, and a backward pass."""
        barrier, slots = threading.Barrier(self.size), [None] * self.size

        try:
            ranks = [
                _Rank(self, slicing, ThreadRanks(rank, self.size, slots=slots, barrier=barrier))
                for rank in range(self.size)
            ]
        except Exception as error:  # a part of the model that cannot be shared out, or is not as expected
            raise Failure(f"{type(error).__name__}: {error}") from error

        def run(rank: _Rank) -> None:
            try:
                rank.run(backward=backward)
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(run, rank) for rank in ranks]
            errors = [raised for future in futures if (raised := future.exception())]
        causes = [each for each in errors if not isinstance(each, threading.BrokenBarrierError)]
        if errors and not causes:  # says nothing of the model
            raise TimeoutError(f"threads waited for each other for more than {_LIMIT_S} s; is the CPU busy?")
        if causes:
            first = causes[0]
            raise Failure(f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}") from first
        for rank in ranks:
            off = abs(rank.loss - self.expected[0]) / abs(self.expected[0])
            if not off <= TOLERANCE:
                raise Failure(f"loss differs by {off:.1e}")
        return ranks

    def _is_cut(self, name: str, ranks: list[_Rank]) -> bool:
        """Whether ranks store different parts of a parameter, and have their gradients. Raises Failure."""
        one = ranks[0]
        if not one.cut.get(name, WHOLE).stored:
            return False
        whole = self._whole(name, one)
        for rank in ranks:
            self._compare(name, rank.gradients.get(name), rank.part_of(name, whole))
        return True

    def _is_partial(self, name: str, ranks: list[_Rank]) -> bool | None:
        """Whether the ranks' gradients of a parameter add up to the whole one; None where that is nothing but
        rounding. Raises Failure.
        """
        whole = self._whole(name, ranks[0])
        parts = [torch.zeros_like(whole) if p is None else p for p in (r.gradients.get(name) for r in ranks)]
        size = whole.norm().item()
        if max(size, *(part.norm().item() for part in parts)) <= _ROUNDING * self.total:
            return None
        # Of two ranks or more, not all have nearly the whole.
        if all((part - whole).norm().item() <= 0.25 * size for part in parts):
            for part in parts:
                self._compare(name, part, whole)
            return False
        self._compare(name, torch.stack(parts).sum(0), whole)
        return True

    def _whole(self, name: str, rank: _Rank) -> Tensor:
        whole = self.expected[1].get(rank.stage.owner(name))
        return torch.zeros_like(rank.whole[name]) if whole is None else whole

    def _compare(self, name: str, actual: Tensor | None, expected: Tensor) -> None:
        off = self._difference(actual, expected)
        if not off <= TOLERANCE:
            raise Failure(f"the gradient of {name} differs by {off:.1e}")

    def _difference(self, actual: Tensor | None, expected: Tensor) -> float:
        actual = torch.zeros_like(expected) if actual is None else actual
        return ((actual - expected).norm() / max(expected.norm().item(), 1e-3 * self.total)).item()


def _between(key: str, slicing: Slicing) -> bool:
    """Whether a parameter of a layer is where gradients are partial: inside a block, or anywhere if ranks
    have other positions.

    For those whose gradient does not tell, such as that of a router that always chooses one expert: what is
    rounding must be added too, or the ranks' copies of the parameter drift apart.
    """
    return bool(slicing.sequence) or any(key.startswith(f"{path}.") for path in slicing.inputs)


class _Counted(Site):
    """A site that counts the channels or heads of its module, which are all."""

    def __init__(self, site: Site, module: str, channels: dict[str, int]):
        super().__init__(site.path, site.slot)
        self.module, self.channels = module, channels

    def first(self, size: int) -> int:
        self.channels[self.module] = size
        return 0


class _OfRank(_Counted):
    """A site of a rank, which has a part of the channels or heads where these are fewer than all."""

    has_part: bool | None = None

    def first(self, size: int) -> int:
        self.has_part = size != self.channels[self.module]
        return self.slot.rank * size if self.has_part else 0


def _dropped(ranks: Sequence[_Rank]) -> tuple[str, ...]:
    """Slicing.dropped. Raises Failure for what ranks have parts of in some layers alone."""
    parts: dict[str, set[bool | None]] = {}
    for rank in ranks:
        for site in (each for each in rank.sites if each.has_part is not None):
            parts.setdefault(site.path, set()).add(site.has_part)
    if mixed := [path for path, found in parts.items() if len(found) > 1]:
        raise Failure(f"dropout of {mixed[0]} is cut in some layers")
    return tuple(sorted(path for path, found in parts.items() if True in found))


class _Rank:
    """One thread's part of the model."""

    def __init__(self, probe: Probe, slicing: Slicing, ranks: ThreadRanks):
        self.probe = probe
        config = probe.copy.config
        count = config.get_text_config(decoder=True).num_hidden_layers
        head: Callable[..., nn.Module] = partial(Head, task=task_of(probe.batch), loss_chunk=0)
        self.stage = stage = Stage(config, layers=range(count), first=True, last=True, head=head)
        stage.to_empty(device="cpu")
        stage.tie()
        reset_buffers(stage, device=torch.device("cpu"))
        self.cut = pieces(stage, slicing, rank=ranks.rank, size=ranks.size)
        rewire(stage, slicing, ranks)
        self.sites: list[_OfRank] = []
        dropout.replace_sites(stage, self._site)
        weights = dict(probe.copy.model.named_parameters(remove_duplicate=False))
        self.whole = {name: weights[stage.owner(name)] for name, _ in stage.named_parameters()}
        for name, value in self.whole.items():
            path, _, key = name.rpartition(".")
            part = self.part_of(name, value.detach()).clone()
            stage.part(path).register_parameter(key, nn.Parameter(part, requires_grad=value.requires_grad))
        stage.tie()
        self.loss = 0.0
        self.gradients: dict[str, Tensor] = {}

    def _site(self, path: str, site: Site) -> _OfRank:
        self.sites.append(_OfRank(site, path, self.probe.channels))
        return self.sites[-1]

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """What this rank stores of a parameter."""
        each = self.cut.get(name, WHOLE)
        return each.of(whole) if each.stored else whole

    def run(self, *, backward: bool) -> None:
        stage = self.stage
        used = [
            (stage.part(path)._parameters, key, each.of)
            for name, each in self.cut.items()
            if not each.stored
            for path, _, key in [name.rpartition(".")]
        ]
        with torch.set_grad_enabled(backward):
            batch = self.probe.batch
            loss = loss_of(Local(stage.forward, used)(batch.input_ids_BT, batch=batch), batch)
            self.loss = loss.item()
            if backward:
                loss.backward()
        self.gradients = {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}
