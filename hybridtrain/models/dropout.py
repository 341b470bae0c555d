"""Dropout as a function of where an element is, not of random numbers in order of computation:

    kept(element) = hash(row's key, layer, place in the layer, position, channel)  >=  p * 2^64
    attention:            (row's key, layer, place in the layer, head, query, key)

A row's key (Batch.keys_B) follows from run.seed and the row's place in the order of the data. So every layout
drops the same elements, and recomputation and resumed runs do, with nothing to save. The hash is the
finalizer of splitmix64 (Steele, Lea and Flood 2014), in int64.

`install` replaces a model's nn.Dropout modules; attention.py its attention weights' dropout. Dropout that a
model's own code calls otherwise stays as it is, and is refused (analysis/randomness.py).

B rows, T positions (of whole rows, or of this rank under sequence parallelism), H heads, N layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hybridtrain.models import heads
from hybridtrain.models.reduced import is_random

_OF_HEADS = ("summary", "classifier")
"""Parts of names of rates that other heads have; an encoder that classifies has the second itself."""
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


class CannotKey(RuntimeError):
    """Why dropout is no function of row, position and channel."""


@dataclass(frozen=True)
class Rows:
    """The rows of a forward pass."""

    keys_B: Tensor
    """Of a layer: differs from those of other layers."""
    start: int
    """Place of their first position in the whole rows."""
    length: int
    """Positions of the rows, of all ranks."""


class Slot:
    """Where dropout in one layer, or in all modules outside layers, finds the rows of the forward pass."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.rank = 0
        """Of this tensor-parallel rank."""
        self.cut: Collection[str] = ()
        """Paths of sites of which this rank has a part of the channels or heads."""


class Site:
    """A place in a layer where elements are dropped. `path`: inside the layer; outside layers the whole."""

    def __init__(self, path: str, slot: Slot):
        self.path, self.slot = path, slot
        digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
        self.number = int.from_bytes(digest, "little", signed=True)

    def first(self, size: int) -> int:
        """The first of the `size` channels or heads that this rank has."""
        return self.slot.rank * size if self.path in self.slot.cut else 0

    def drop(self, x: Tensor, p: float) -> Tensor:
        """x with elements set to 0 with probability p, others divided by 1 - p. Hidden states (B, T, ...),
        or attention weights (B, H, T, T), or of whole rows (B, D). Raises CannotKey for others.
        """
        rows = self.slot.rows
        if not 0 <= p < 1:
            raise CannotKey(f"{self.path} has the rate {p}")
        if rows is None:
            raise CannotKey(f"{self.path} is called outside of a forward pass of rows with keys")
        size, length = x.shape, rows.length
        mine_B = rows.keys_B + self.number
        places_T = torch.arange(rows.start, rows.start + length, device=x.device)
        if len(size) == 4 and size[0] == len(mine_B) and size[2] == size[3] == length:
            first = self.first(size[1])
            heads_H = torch.arange(first, first + size[1], device=x.device)
            rows_BHT = _mixed(_mixed(mine_B[:, None] + heads_H)[..., None] + places_T)
            kept = _kept(rows_BHT[..., None] + places_T, p)
        else:
            of_rows = len(size) == 2  # a pooler's result
            parts, rest = divmod(length, size[1]) if len(size) > 2 else (int(of_rows), 0)
            if size[0] != len(mine_B) or parts < 1 or rest:
                raise CannotKey(f"{self.path} has no rows and positions in {tuple(size)}")
            if parts > 1:  # sequence parallelism
                places_T = places_T.narrow(0, self.slot.rank * size[1], size[1])
            places_T = places_T[:1] if of_rows else places_T
            width = size[1 if of_rows else 2 :].numel()
            channels = self.first(width) + torch.arange(width, device=x.device)
            rows_BT = _mixed(mine_B[:, None] + places_T)
            kept = _kept(rows_BT[..., None] + channels, p).view(size)
        return torch.where(kept, x * (1 / (1 - p)), 0.0)


def _mixed(x: Tensor) -> Tensor:
    """A hash of each element: every bit of it affects every bit of the result."""
    x = _scattered(x)
    return x ^ ((x >> 31) & ((1 << 33) - 1))  # >> copies the sign


def _scattered(x: Tensor) -> Tensor:
    """`_mixed`, but for the lower half of the bits."""
    x = x * _STEP
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FACTORS[0]
    return (x ^ ((x >> 27) & ((1 << 37) - 1))) * _FACTORS[1]


def _kept(x: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, by a hash of x."""
    return _scattered(x) >= round(p * 2.0**64) - (1 << 63)


class Dropout(nn.Dropout):
    """In the place of an nn.Dropout of a model."""

    dropout_site: Site

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout_site.drop(x, self.p) if self.training and self.p else x


class OfAttention(TorchFunctionMode):
    """Inside it, torch's dropout is that of a site."""

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout:
            return self.site.drop(args[0], kwargs["p"] if "p" in kwargs else args[1])
        return function(*args, **kwargs)


class Dropouts:
    """The dropout of a model or stage whose modules have sites."""

    def __init__(self, slots: list[Slot]):
        self.slots = slots
        """Of what is outside layers, and of each layer of the whole model."""

    def of_layer(self, index: int) -> Slot | None:
        """None for a model without dropout."""
        return self.slots[index + 1] if self.slots else None

    def share(self, rank: int, *, cut: Collection[str]) -> None:
        """With tensor parallelism: those of rank `rank`, see Slot."""
        for slot in self.slots:
            slot.rank, slot.cut = rank, cut

    @contextmanager
    def of(self, keys_B: Tensor | None, *, start: int, length: int) -> Iterator[None]:
        """Forward passes inside are those of rows with these keys, see Rows. Without keys, in training, they
        fail.
        """
        if keys_B is not None and self.slots:
            numbers_N = torch.arange(len(self.slots), device=keys_B.device)
            for slot, own_B in zip(self.slots, _mixed(keys_B + numbers_N[:, None]), strict=True):
                slot.rows = Rows(own_B, start, length)
        try:
            yield
        finally:
            for slot in self.slots:
                slot.rows = None


class Recomputation:
    """The context in which a layer is recomputed: of the rows of its first computation, when it is made. A
    pipeline may be in the forward pass of others by then. Can be entered several times.
    """

    def __init__(self, slot: Slot):
        self.slot, self.rows = slot, slot.rows

    def __enter__(self) -> None:
        self.kept, self.slot.rows = self.slot.rows, self.rows

    def __exit__(self, *error: object) -> None:
        self.slot.rows = self.kept


def rates(config: Any) -> dict[str, float]:
    """Fields of a transformers config, and of its text config, with rates of dropout or jitter that are not
    0, but for those of other heads; by their paths.
    """
    others = _OF_HEADS[:1] if heads.is_encoder(config) else _OF_HEADS
    text = config.get_text_config(decoder=True)
    inside = next((f"{name}." for name, value in vars(config).items() if value is text), "")
    fields = {f"{inside}{name}": value for name, value in text.to_dict().items()} | config.to_dict()
    return {
        path: value
        for path, value in fields.items()
        if is_random(path, value) and value > 0 and not any(word in path for word in others)
    }


def install(model: nn.Module, *, config: Any, layers: str, adapted: bool) -> Dropouts:
    """Give the modules of a model or stage their sites, and replace those of dropout, in place; nothing
    without rates in its config or its modules (heads may have one that the config does not name), unless it
    is `adapted`: its adapters have dropout. `layers`: path of its layers.
    """
    of_modules = any(type(module) is nn.Dropout and module.p for module in model.modules())
    if not (rates(config) or of_modules or adapted):
        return Dropouts([])
    seen: dict[nn.Module, Slot] = {}
    slots = [Slot() for _ in range(config.get_text_config(decoder=True).num_hidden_layers + 1)]
    for path, module in model.named_modules(remove_duplicate=False):
        index, _, inside = path.removeprefix(f"{layers}.").partition(".")
        in_layer = path.startswith(f"{layers}.")
        site = Site(inside if in_layer else path, slots[int(index) + 1 if in_layer else 0])
        own: Any = module
        if seen.setdefault(module, site.slot) is not site.slot:
            site = Site(f"{path}, which several layers share,", Slot())  # has no rows: fails where it acts
        own.dropout_site = site
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
    return Dropouts(slots)


def replace_sites(model: nn.Module, make: Callable[[str, Site], Site]) -> None:
    """Give each module of a model with sites what `make` makes of its path and its site."""
    for path, module in model.named_modules():
        if (site := site_of(module)) is not None:
            own: Any = module
            own.dropout_site = make(path, site)


def site_of(module: nn.Module) -> Site | None:
    """The site of a module of a model with sites."""
    return vars(module).get("dropout_site")
