"""Run a function of a test module on gloo ranks: `run_ranks(4, function, *args)` returns what
each rank returned."""

from collections.abc import Callable
from typing import Any

from hybridtrain.runtime import ranks
from hybridtrain.runtime.ranks import RankFailed

__all__ = ["RankFailed", "run_ranks"]

PRELOAD = (
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "hybridtrain.engine.torch_native",
    "hybridtrain.reference",
    "hybridtrain.data.loader",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "mistral", "qwen2", "qwen3")),
)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0, backend: str = "gloo"
) -> list[Any]:
    """See hybridtrain.runtime.ranks; a rank's output is shown when it fails."""
    return ranks.run_ranks(world_size, function, *args, preload=PRELOAD, backend=backend, timeout_s=timeout_s)
