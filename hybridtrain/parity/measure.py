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
from hybridtrain import reference, registry, tasks
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
from hybridtrain.tasks.task import Task
from hybridtrain.types import StepResult


@dataclass(frozen=True)
class LayoutJob:
    """What a rank needs to know; it pickles."""

    config: Config
    layout: ParallelLayout
    plan: BatchPlan
    steps: int
    vocab: int
    folder: str
    """Where the reference leaves its tensors."""
    task: Task | None
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
    compared: set[str] = field(default_factory=set)

    def add(self, name: str, value: float) -> None:
        self.compared.add(name)
        if not value <= self.largest:  # NaN counts as larger than anything
            self.largest, self.name = value, name


@dataclass(frozen=True)
class ReferenceResult:
    """How the plain process went, and the names in the two files it left."""

    steps: Steps
    moved: float
    """The largest change of an element of a parameter; 0 where nobody asks, for AdamW: it is known to be about the learning rate a step."""
    gradients: set[str]
    parameters: set[str]


@dataclass(frozen=True)
class Measurement:
    """What one rank found."""

    steps: Steps
    gradients: Differences
    parameters: Differences


def train_reference(job: LayoutJob) -> ReferenceResult:
    """Train in one plain process and leave gradients.safetensors and parameters.safetensors in the task's folder."""
    device, config = mesh.device(), job.config
    registry.load(config.run.plugins)
    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    family = family_for(built)
    precision = policy(config.precision.kind)
    source = initial(config.model, built, family=family, seed=config.run.seed)
    task = job.task or tasks.of(config, labels=len(facts_of(config.model).labels))
    dtypes = {"compute": precision.compute, "param": precision.param}
    plain = reference.Reference(built, family=family, source=source, settings=config.optim, freeze=config.model.freeze, task=task, **dtypes)
    plain.loss_scale = config.precision.init_scale if precision.loss_scale else 1.0
    for model in {plain.master, plain.worker}:
        model.to(device)
    tokens = _tokens(job, dp_rank=0, dp_size=1, collate=task.collate)
    first = {} if config.optim.kind == "adamw" else {name: value.clone() for name, value in plain.parameters().items()}
    steps = Steps()
    for step in range(job.steps):
        batches = [batch.to(device) for batch in tokens.micro_batches(step)]
        with device:  # the reference makes its accumulators where tensors are made by default
            result = plain.step(batches, lr=config.optim.lr)
        steps.losses.append(result.loss)
        steps.grad_norms.append(result.grad_norm)
        if step == 0:
            gradients = _write(result.gradients, Path(job.folder) / "gradients.safetensors")
        del result
    moved = max((float((value - first[name]).abs().max()) for name, value in plain.parameters().items() if first), default=0.0)
    return ReferenceResult(steps, moved, gradients, _write(plain.parameters(), Path(job.folder) / "parameters.safetensors"))


def train_layout(job: LayoutJob, reference_norm: float) -> Measurement:
    """Train under the task's layout (collective) and compare. `reference_norm`: the reference's first global gradient norm."""
    device = mesh.device()
    registry.load(job.config.run.plugins)
    mesh.connect(device, timeout_s=job.config.engine.timeout_s)
    engine = engines.build_for(job.task, job.config, layout=job.layout, plan=job.plan, device=device, initial=True)
    gradients, parameters = Differences(), Differences()

    def compare_gradients(named: Iterable[tuple[str, Any]]) -> None:
        floor = GRADIENT_FLOOR * reference_norm
        relative = lambda ours, theirs: float((ours - theirs).norm() / theirs.norm().clamp(min=floor))  # noqa: E731
        _compare(named, Path(job.folder) / "gradients.safetensors", gradients, relative)

    engine.on_gradients(compare_gradients)
    tokens = _tokens(job, dp_rank=engine.mesh.dp_rank, dp_size=job.layout.dp, collate=engine.task.collate)
    steps = Steps()
    for step in range(job.steps):
        _record(steps, engine.train_step(tokens.micro_batches(step), lr=job.config.optim.lr))
    _compare(engine.weights(), Path(job.folder) / "parameters.safetensors", parameters, lambda ours, theirs: float((ours - theirs).abs().max()))
    engine.close()
    return Measurement(steps, gradients, parameters)


def _record(steps: Steps, result: StepResult) -> None:
    steps.losses.append(float(result.loss))
    steps.grad_norms.append(float(result.grad_norm))
    steps.skipped += int(result.skipped)


def _compare(named: Iterable[tuple[str, Any]], path: Path, largest: Differences, difference: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """Gather each tensor whole (collective over its mesh) and add its difference to `largest`."""
    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        for name, tensor in named:
            ours = whole(tensor)
            largest.add(name, difference(ours, file.get_tensor(name)) if name in known else float("nan"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor or DTensor, fp32, on the CPU (collective over its mesh)."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().float().cpu()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> set[str]:
    """Write tensors to a file in fp32; returns their names."""
    save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return set(tensors)


def _tokens(job: LayoutJob, *, dp_rank: int, dp_size: int, collate: Collate) -> Tokens:
    seed = job.config.run.seed
    if job.data or job.config.data.named:
        data = job.data or data_of(job.config, timeout_s=0)
        return Loader(data, plan=job.plan, dp_rank=dp_rank, dp_size=dp_size, seed=seed, vocab=job.vocab, collate=collate)
    return Synthetic(
        vocab=job.vocab, plan=job.plan, dp_rank=dp_rank, dp_size=dp_size, seed=seed, labels=len(facts_of(job.config.model).labels), collate=collate
    )
