"""Types shared by all layers. Nothing here imports torch at run time.

Shape suffixes used across the project: B micro-batch rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch

    from hybridtrain.runtime.flags import Flags
    from hybridtrain.tasks.task import Task

IGNORE_INDEX = -100  # labels with this value are ignored in the loss (as in torch and Hugging Face)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank: tensors with B rows, those here of shape (B, T) and int64. A task that needs more adds fields."""

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """Already shifted: position t holds the token that follows input t, or IGNORE_INDEX."""
    position_ids_BT: torch.Tensor
    packed: bool = False
    """Each position 0 begins a document that attends to itself alone (data.document_mask); else a row is one document."""

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with every tensor changed, those that a task has added included. What is not a flag is a tensor."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if not isinstance(value, bool)}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device) -> Self:
        """The same on a device, without waiting for the copy."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> Self:
        """Some of its rows."""
        return self.each(lambda tensor: tensor[start:stop])


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. 0-d tensors on the device, so that the step never synchronises."""

    loss: torch.Tensor
    """Weighted sum of the task's mean losses over the global batch, fp32; NaN without a single target."""
    sums: torch.Tensor
    """Of each of the task's sums over the global batch, in the order of its weights: fp32, (K,)."""
    counts: torch.Tensor
    """What each sum is divided by: int64, (K,). Of a causal LM the tokens with a label."""
    grad_norm: torch.Tensor
    """L2 norm over the whole model, before clipping, unscaled."""
    skipped: torch.Tensor
    """1 if the update was skipped because a gradient was not finite, else 0."""
    empty: torch.Tensor
    """1 if the global batch has no valid token, so that no update was made, else 0. Such a step is not in `skipped`."""
    loss_scale: torch.Tensor
    """The scale this step used; 1 without loss scaling."""


@dataclass(frozen=True)
class Sums:
    """A task's sums of losses over all ranks, by name, and what each is divided by."""

    values: Mapping[str, float]
    counts: Mapping[str, int]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            {name: value + other.values[name] for name, value in self.values.items()}, {name: n + other.counts[name] for name, n in self.counts.items()}
        )


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
    labels: tuple[str, ...]
    """Classes of a classifier, whose head has a row for each; empty: the head has a row for each token."""
    tied: bool
    window: int | None
    """Sliding-window length of the layers that have one, else None."""
    max_positions: int
    parameters: int
    """Number of parameters, tied weights counted once."""

    @property
    def outputs(self) -> int:
        """Rows of the head."""
        return len(self.labels) or self.vocab


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
    growing_batches: bool
    """A batch-size ramp and sequence-length warm-up."""


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
    task: Task

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Forward, backward and update over this data rank's micro-batches."""

    def eval_step(self, micro_batches: Sequence[Batch]) -> Sums:
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
