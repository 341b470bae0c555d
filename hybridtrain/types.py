"""The nouns of the system, shared by every layer. Nothing here imports torch at run time.

Shape suffixes used across the project: B micro-batch rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from hybridtrain.runtime.flags import Flags

IGNORE_INDEX = -100  # a label with this value carries no loss (the convention of torch and of Hugging Face)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank. All tensors have shape (B, T) and dtype int64."""

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """Already shifted: position t holds the token that follows input t, or IGNORE_INDEX."""
    position_ids_BT: torch.Tensor
    packed: bool = False
    """Each position 0 begins a document that attends to itself alone (data.document_mask); else a row is one document."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device, without waiting for the copy."""
        ids, labels, positions = (tensor.to(device, non_blocking=True) for tensor in (self.input_ids_BT, self.labels_BT, self.position_ids_BT))
        return Batch(ids, labels, positions, packed=self.packed)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. 0-d tensors on the device, so that the step never synchronises."""

    loss: torch.Tensor
    """Mean loss per valid token over the global batch, fp32; NaN without one."""
    tokens: torch.Tensor
    """Valid tokens in the global batch."""
    grad_norm: torch.Tensor
    """L2 norm over the whole model, before clipping, unscaled."""
    skipped: torch.Tensor
    """1 if the update was skipped because a gradient was not finite, else 0."""
    empty: torch.Tensor
    """1 if the global batch has no valid token, so that no update was made, else 0. Such a step is not in `skipped`."""
    loss_scale: torch.Tensor
    """The scale this step used; 1 without loss scaling."""


@dataclass(frozen=True)
class EvalResult:
    """Sum of token losses and number of valid tokens, over all ranks."""

    loss_sum: float
    tokens: int


@dataclass(frozen=True)
class Progress:
    """The position of a run, all a checkpoint holds besides tensors."""

    step: int
    tokens_seen: int
    fingerprints: Mapping[str, str]


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model; read from its config without transformers."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    window: int | None
    """Sliding-window length of the layers that have one, else None."""
    max_positions: int
    parameters: int
    """Number of parameters, tied weights counted once."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine can run on this device. `plan.rules` refuses the rest before processes meet."""

    engine: str
    axes: frozenset[str]
    zero_stages: frozenset[int]
    schedules: frozenset[str]
    precisions: frozenset[str]
    pipelined_zero_stages: frozenset[int]
    """ZeRO stages together with pp > 1."""
    sequence_parallel: bool
    """Activations outside attention and MLP sharded over tp."""
    hybrid_sharding: bool
    """dp_replicate and dp_shard both above 1."""
    repeated_heads: bool
    """More tp ranks than key/value heads."""


class Saving(Protocol):
    """A checkpoint on its way to disk."""

    def poll(self) -> bool:
        """True when it is complete; raises what went wrong, without waiting."""

    def result(self) -> None:
        """Wait until it is complete; raises what went wrong."""


class Engine(Protocol):
    """The contract both engines keep. Its verb is one optimizer step: DeepSpeed and torch pipelining cannot be cut finer."""

    capabilities: Capabilities
    flags: Flags
    """What ranks tell each other with each train_step; the training loop puts its own here."""

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Forward, backward and update over this data rank's micro-batches."""

    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalResult:
        """Forward only. Every rank calls it with the same number of micro-batches."""

    def save(self, path: Path, progress: Progress) -> Saving:
        """Start writing a complete checkpoint to `path` (collective)."""

    def load(self, path: Path) -> Progress:
        """Load a complete checkpoint, whatever layout wrote it (collective)."""

    def weights(self) -> Iterator[tuple[str, Any]]:
        """This rank's (Hugging Face name, parameter or DTensor) pairs; tied weights once."""

    def on_gradients(self, call: Callable[[Iterator[tuple[str, Any]]], None]) -> None:
        """Call once, when the next step has its gradients, with (name, gradient or DTensor): over all data ranks, before clipping."""

    def modules(self) -> Iterator[tuple[str, Any]]:
        """This rank's named modules, for hooks that watch them."""

    def close(self) -> None:
        """Leave the process group."""
