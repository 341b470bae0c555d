"""Types shared by all layers. Nothing here imports torch at run time.

Shape suffixes used across the project: B micro-batch rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    import torch

    from hybridtrain.runtime.flags import Flags
    from hybridtrain.tasks.task import Task

IGNORE_INDEX = -100  # labels with this value are ignored in the loss (as in torch and Hugging Face)
ANSWER_ENDS = ("start", "end")  # what the rows of a head are called that finds answers
SECOND_SEGMENT, ANSWER_FIRST, ANSWER_LAST = 1, 2, 4  # parts of a mark of data.format=answers


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data rank.

    These tensors are int64, (B, T); a task may add fields, tensors of B rows.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """Already shifted: position t holds the token that follows input t, or IGNORE_INDEX."""
    position_ids_BT: torch.Tensor
    packed: bool = False
    """Each position 0 starts a document that attends only to itself (data.document_mask); else a
    row is one document."""
    keys_B: torch.Tensor | None = None
    """For training: a number for each row, from run.seed and the row's place in the order of the data, of
    which dropout is a function (models/dropout.py). int64, (B,); the loader adds it."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply a function to every tensor, including those that a task added.

        Every field that is no bool and not None is a tensor.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {
            name: function(value)
            for name, value in values.items()
            if not isinstance(value, bool) and value is not None
        }
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device) -> Self:
        """Copy to a device, asynchronously."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop` - 1."""
        return self.map(lambda tensor: tensor[start:stop])

    def arguments(self) -> dict[str, torch.Tensor]:
        """Further arguments of the model's forward."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """A micro-batch of pairs: [CLS] first part [SEP] second part [SEP], then padding as a document."""

    segment_ids_BT: torch.Tensor
    """0 in the first part, 1 in the second."""
    unrelated_B: torch.Tensor
    """int64: 0 if the second part follows the first, 1 if it is of another document; or IGNORE_INDEX."""

    def arguments(self) -> dict[str, torch.Tensor]:
        return {"token_type_ids": self.segment_ids_BT}


@dataclass(frozen=True)
class TextBatch(Batch):
    """A micro-batch of rows that are a text each, and padding, which is a document of its own. The label of a
    whole text is that of position 0."""


@dataclass(frozen=True)
class TokenBatch(TextBatch):
    """The same, with labels of tokens."""


@dataclass(frozen=True, kw_only=True)
class AnswerBatch(TextBatch):
    """The same; a text is a question and its context. The labels of positions 0 and 1 are the positions of
    the answer's first and last token."""

    segment_ids_BT: torch.Tensor
    """1 in the second segment, else 0."""

    def arguments(self) -> dict[str, torch.Tensor]:
        return {"token_type_ids": self.segment_ids_BT}


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step: tensors on the device, 0-d unless noted, so that
    the step never synchronizes.
    """

    loss: torch.Tensor
    """Weighted sum of the task's mean losses over the global batch, fp32; NaN without targets."""
    sums: torch.Tensor
    """The task's sums over the global batch, in the order of its weights: fp32, (K,)."""
    counts: torch.Tensor
    """The divisor of each sum: int64, (K,). For a causal LM, the number of tokens with a label."""
    grad_norm: torch.Tensor
    """L2 norm over the whole model, unscaled, before clipping."""
    skipped: torch.Tensor
    """1 if the update was skipped because a gradient or the loss was not finite, else 0."""
    empty: torch.Tensor
    """1 if the global batch has no targets, so that no update was made, else 0. Such a
    step is not `skipped`."""
    loss_scale: torch.Tensor
    """The scale this step used; 1 without loss scaling."""
    next_scale: torch.Tensor
    """The scale of the next step."""
    spike: torch.Tensor | None = None
    """1 if the update was not made because the step is above `Engine.spike_limits`, else 0; None: without
    limits."""


@dataclass(frozen=True)
class Sums:
    """A task's sums of losses over all ranks, by name, and their divisors."""

    values: Mapping[str, float]
    counts: Mapping[str, int]

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            {name: value + other.values[name] for name, value in self.values.items()},
            {name: n + other.counts[name] for name, n in self.counts.items()},
        )


@dataclass(frozen=True)
class Progress:
    """The position of a run: everything in a checkpoint besides tensors."""

    step: int
    tokens_seen: int
    fingerprints: Mapping[str, str]
    states: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Small states by name, as JSON, each with a `version`; only those that differ from a new run's."""


class Quantised(NamedTuple):
    """Frozen weights that are stored in codes (models/quantised.py)."""

    weights: int
    codes: int
    """Bytes."""
    largest: int
    """Numbers, in the dtype that computes."""


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that planning needs; read from its config.json without transformers."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    labels: tuple[str, ...]
    """Classes of a classifier, whose head has a row for each class; empty: the head has a
    row for each token."""
    tied: bool
    window: int | None
    """Length of the sliding window of the layers that have one, else None."""
    max_positions: int
    parameters: int
    """Number of parameters, tied weights counted once."""
    full_layers: tuple[int, ...] = ()
    """Layers without a window, if others have one."""
    layer_parameters: tuple[int, ...] = ()
    """Parameters of each layer; empty: all layers have as many."""
    layer_inactive: tuple[int, ...] = ()
    """Of these, those of experts that a token does not use, on average; empty: none."""
    adapters: tuple[int, ...] = ()
    """Parameters of adapters in each layer, which alone are trained, and those of modules that are saved with
    them, outside of layers in the last; empty: the model's own are."""
    adapter_values: int = 0
    """Values of a token that their dropout and magnitudes keep for the backward pass, at most in a layer."""
    quantised: tuple[Quantised, ...] = ()
    """What each layer stores in codes (adapters.base_format); empty: nothing."""
    row_blocks: int = 0
    """Largest number that divides the blocks in the rows of all of them; 0: there are no blocks."""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What cannot be done with the model -> why: pp, tp (parallel axes), documents (in a row that do not
    attend to each other)."""
    sliced: float | None = None
    """Part of the layers' matrix products that tensor parallelism cuts; None: all, by their sizes."""
    stored: float | None = None
    """Part of the layers' parameters of which a tensor-parallel rank stores only its own; None: as above."""
    sequence: bool = True
    """Whether activations can be cut along the sequence too."""
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What tensor parallelism leaves whole on every rank -> why."""
    shared: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Modules that every pipeline stage has, besides a tied head, and their parameters."""
    cuts: tuple[int, ...] | None = None
    """Layers at which a pipeline stage may begin; None: every layer."""
    head: str = ""
    """Of a model with labels: tokens, if it classifies these; answers, if it finds them; empty: texts."""
    encoder: bool = False
    """Whether tokens see those that follow them; the head predicts masked ones, or classes."""
    pairs: bool = False
    """Whether it has a head that tells whether the second part of a row follows the first."""
    dropped: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Modules whose result, or whose attention weights, have dropout in training, by their path in a layer
    or, outside, in the model -> rate."""

    @property
    def outputs(self) -> int:
        """Rows of the head."""
        return len(self.labels) or self.vocab

    @property
    def inactive(self) -> int:
        """Parameters of experts that a token does not use, on average."""
        return sum(self.layer_inactive)

    @property
    def parameters_of_layers(self) -> tuple[int, ...]:
        """Parameters of each layer."""
        ends = self.vocab + (0 if self.tied else self.outputs)  # rows of the embedding and of the head
        equal = (self.parameters - self.hidden * (1 + ends)) // self.layers
        return self.layer_parameters or (equal,) * self.layers


@dataclass(frozen=True)
class Capabilities:
    """The features that an engine supports. `plan.rules` refuses all others before the processes connect."""

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
    shared_modules: bool
    """Pipelines of models with modules that every stage has (ModelFacts.shared)."""
    growing_batches: bool
    """A batch-size ramp and sequence-length warm-up."""


class Saving(Protocol):
    """A checkpoint that is being saved."""

    def poll(self) -> bool:
        """Whether it is complete, without waiting. Raises the error of a failed save."""

    def result(self) -> None:
        """Wait until it is complete. Raises the error of a failed save."""


class Engine(Protocol):
    """The protocol of both engines.

    Its unit is one optimizer step, the finest that DeepSpeed and torch pipelining allow.
    """

    capabilities: Capabilities
    flags: Flags
    """Flags that ranks exchange with each train_step; set by the training loop."""
    task: Task
    spike_limits: tuple[float, float] | None
    """(loss, gradient norm): a step above both makes no update; None: no limit. Set by the training loop."""

    def train_step(self, micro_batches: Sequence[Batch], *, lr: float) -> StepResult:
        """Forward, backward and update with this data rank's micro-batches (collective)."""

    def replay(self, micro_batches: Sequence[Batch], *, loss_scale: torch.Tensor, watcher: Any) -> StepResult:
        """Repeat a step without an update, at the loss scale that it had, and show the watcher
        (parallel/watch.py) what it computes (collective). Changes no state.
        """

    def eval_step(self, micro_batches: Sequence[Batch]) -> Sums:
        """Forward pass only. Every rank calls it with the same number of micro-batches (collective)."""

    def save(self, path: Path, progress: Progress) -> Saving:
        """Start writing a complete checkpoint to `path` (collective)."""

    def load(self, path: Path) -> Progress:
        """Load a complete checkpoint of any layout (collective)."""

    def weights(self) -> Iterator[tuple[str, Any]]:
        """This rank's (Hugging Face name, parameter or DTensor) pairs; tied weights once."""

    def on_gradients(self, call: Callable[[Iterator[tuple[str, Any]]], None]) -> None:
        """Call once in the next step with (name, gradient or DTensor) pairs: reduced over
        data ranks, before clipping.
        """

    def modules(self) -> Iterator[tuple[str, Any]]:
        """This rank's named modules, for hooks."""

    def close(self) -> None:
        """Free everything that holds process groups; the caller leaves the process group."""
