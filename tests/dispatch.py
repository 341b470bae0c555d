"""Modes that watch every operation of a step on the CPU: what would wait for a GPU, collectives, matrix
products, memory that is alive."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "repeat_interleave.Tensor",
    "bincount",
)
INDEXING = ("index.", "index_put", "_index_put_impl_", "lift_fresh")
"""An index made of numbers, and a tensor made of numbers, are copied to the device, and the
host waits for that."""


class Watching(TorchDispatchMode):
    """Sees the operations on local tensors, those of compiled kernels too."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: what it calls comes here again
        self.before(str(function).removeprefix("aten."), args)
        result = function(*args, **(kwargs or {}))
        self.after(result)
        return result

    def before(self, name: str, args: Any) -> None: ...

    def after(self, result: Any) -> None: ...


class Collectives(Watching):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()

    def before(self, name: str, args: Any) -> None:  # noqa: ARG002
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait_tensor" not in name:
            self.collectives[name.rpartition(".")[0].partition(".")[2].removesuffix("_")] += 1


class NoWait(Collectives):
    """Fails at an operation for which the host would wait for a GPU, too."""

    def before(self, name: str, args: Any) -> None:
        kind = name.rpartition(".")[0]
        if kind in WAITS or name in WAITS or (name.startswith(INDEXING) and not _of_one_number(name, args)):
            raise AssertionError(f"{name} waits for the device")
        super().before(name, args)


def _of_one_number(name: str, args: Any) -> bool:
    """A 0-d tensor made of a number, or such a one written where a mask is true, which torch does as
    masked_fill: neither is waited for."""
    if name.startswith("lift_fresh"):
        return args[0].dim() == 0
    return (
        "index_put" in name
        and args[2].numel() == 1
        and all(index is None or index.dtype == torch.bool for index in args[1])
    )


class Products(Watching):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def before(self, name: str, args: Any) -> None:  # noqa: ARG002
        self.count += name.partition(".")[0] in ("mm", "addmm", "bmm", "baddbmm")


class Alive(Watching):
    """Bytes of the tensors made since it was entered that still exist, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def after(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and type(tensor) is not DTensor:
                self._note(tensor.untyped_storage())

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
