"""What runs in the ranks: train a few steps, and hold every gradient and parameter against the reference's.

The reference writes its first gradients and last parameters to files; a rank gathers its own whole, one tensor at a time, and
returns numbers only. Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hybridtrain import engine as engines
from hybridtrain import registry, tasks
from hybridtrain.config.schema import Config
from hybridtrain.data.blend import Blend, data_of
from hybridtrain.data.loader import Collate, Loader
from hybridtrain.data.synthetic import Synthetic, Tokens
from hybridtrain.models.build import hf_config
from hybridtrain.models.facts import facts_of, read_config
from hybridtrain.models.family import family_for
from hybridtrain.models.load import initial
from hybridtrain.parallel import mesh
from hybridtrain.parity.verdict import GRADIENT_FLOOR
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.precision.policy import policy
from hybridtrain.reference import Reference as PlainLoop
from hybridtrain.tasks.task import Task as Learnt
from hybridtrain.types import StepResult


@dataclass(frozen=True)
class Task:
    """What a rank needs to know; it pickles."""

    config: Config
    layout: ParallelLayout
    plan: BatchPlan
    steps: int
    vocab: int
    folder: str
    """Where the reference leaves its tensors."""
    learnt: Learnt | None
    """A program's own task; None: what task.kind names."""
    data: Blend | None
    """A program's own rows; None: what the config names."""


@dataclass
class Steps:
    """Per optimizer step; the same on every rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0


@dataclass
class Differences:
    """The largest differences over this rank's tensors, and the names of the tensors compared."""

    largest: float = 0.0
    name: str = ""
    seen: set[str] = field(default_factory=set)

    def add(self, name: str, value: float) -> None:
        self.seen.add(name)
        if not value <= self.largest:  # NaN counts as larger than anything
            self.largest, self.name = value, name


@dataclass(frozen=True)
class Reference:
    """How the plain process went, and the names in the two files it left."""

    steps: Steps
    moved: float
    """The largest change of an element of a parameter; 0 where nobody asks, for AdamW: it is known to be about the learning rate a step."""
    gradients: set[str]
    parameters: set[str]


@dataclass(frozen=True)
class Measured:
    """What one rank found."""

    steps: Steps
    gradients: Differences
    parameters: Differences


def train_reference(task: Task) -> Reference:
    """Train in one plain process and leave gradients.safetensors and parameters.safetensors in the task's folder."""
    device, config = mesh.device(), task.config
    registry.load(config.run.plugins)
    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    family = family_for(built)
    precision = policy(config.precision.kind)
    source = initial(config.model, built, family=family, seed=config.run.seed)
    learnt = task.learnt or tasks.of(config, labels=len(facts_of(config.model).labels))
    dtypes = {"compute": precision.compute, "param": precision.param}
    plain = PlainLoop(built, family=family, source=source, settings=config.optim, freeze=config.model.freeze, task=learnt, **dtypes)
    plain.loss_scale = config.precision.init_scale if precision.loss_scale else 1.0
    for model in {plain.master, plain.worker}:
        model.to(device)
    tokens = _tokens(task, dp_rank=0, dp_size=1, collate=learnt.collate)
    begun = {} if config.optim.kind == "adamw" else {name: value.clone() for name, value in plain.parameters().items()}
    done = Steps()
    for step in range(task.steps):
        batches = [batch.to(device) for batch in tokens.micro_batches(step)]
        with device:  # the reference makes its accumulators where tensors are made by default
            result = plain.step(batches, lr=config.optim.lr)
        done.losses.append(result.loss)
        done.grad_norms.append(result.grad_norm)
        if step == 0:
            gradients = _leave(result.gradients, Path(task.folder) / "gradients.safetensors")
        del result
    moved = max((float((value - begun[name]).abs().max()) for name, value in plain.parameters().items() if begun), default=0.0)
    return Reference(done, moved, gradients, _leave(plain.parameters(), Path(task.folder) / "parameters.safetensors"))


def train_layout(task: Task, reference_norm: float) -> Measured:
    """Train under the task's layout (collective) and compare. `reference_norm`: the reference's first global gradient norm."""
    device = mesh.device()
    registry.load(task.config.run.plugins)
    mesh.connect(device, timeout_s=task.config.engine.timeout_s)
    engine = engines.build_for(task.learnt, task.config, layout=task.layout, plan=task.plan, device=device, initial=True)
    gradients, parameters = Differences(), Differences()

    def compare_gradients(named: Iterable[tuple[str, Any]]) -> None:
        floor = GRADIENT_FLOOR * reference_norm
        relative = lambda ours, theirs: float((ours - theirs).norm() / theirs.norm().clamp(min=floor))  # noqa: E731
        _compare(named, Path(task.folder) / "gradients.safetensors", gradients, relative)

    engine.on_gradients(compare_gradients)
    tokens = _tokens(task, dp_rank=engine.mesh.dp_rank, dp_size=task.layout.dp, collate=engine.task.collate)
    done = Steps()
    for step in range(task.steps):
        _note(done, engine.train_step(tokens.micro_batches(step), lr=task.config.optim.lr))
    _compare(engine.weights(), Path(task.folder) / "parameters.safetensors", parameters, lambda ours, theirs: float((ours - theirs).abs().max()))
    engine.close()
    return Measured(done, gradients, parameters)


def _note(done: Steps, result: StepResult) -> None:
    done.losses.append(float(result.loss))
    done.grad_norms.append(float(result.grad_norm))
    done.skipped += int(result.skipped)


def _compare(named: Iterable[tuple[str, Any]], reference: Path, found: Differences, difference: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """Gather each tensor whole (collective over its mesh) and add its difference to `found`."""
    with safe_open(reference, framework="pt") as file:
        known = set(file.keys())
        for name, tensor in named:
            ours = whole(tensor)
            found.add(name, difference(ours, file.get_tensor(name)) if name in known else float("nan"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor or DTensor, fp32, on the CPU (collective over its mesh)."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().float().cpu()


def _leave(tensors: dict[str, torch.Tensor], path: Path) -> set[str]:
    """Write tensors to a file in fp32; returns their names."""
    save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return set(tensors)


def _tokens(task: Task, *, dp_rank: int, dp_size: int, collate: Collate) -> Tokens:
    seed = task.config.run.seed
    if task.data or task.config.data.named:
        data = task.data or data_of(task.config, timeout_s=0)
        return Loader(data, plan=task.plan, dp_rank=dp_rank, dp_size=dp_size, seed=seed, vocab=task.vocab, collate=collate)
    return Synthetic(
        vocab=task.vocab, plan=task.plan, dp_rank=dp_rank, dp_size=dp_size, seed=seed, labels=len(facts_of(task.config.model).labels), collate=collate
    )
