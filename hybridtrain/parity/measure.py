"""What the ranks run: train a few steps and compare every gradient and parameter with the reference.

The reference writes its gradients of the first step and its last parameters to files. A rank gathers its own
tensors whole, one at a time, and returns only the differences.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hybridtrain import engine as engines
from hybridtrain import reference, registry, tasks
from hybridtrain.analysis.facts import facts_of
from hybridtrain.config.schema import Config, PrecisionConfig
from hybridtrain.data.blend import Blend, data_of
from hybridtrain.data.compatibility import own_rows
from hybridtrain.data.loader import Collate, Loader
from hybridtrain.data.synthetic import Synthetic, Tokens
from hybridtrain.models.build import hf_config
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from hybridtrain.optim.shards import like, local, wide
from hybridtrain.parallel import mesh
from hybridtrain.parity.verdict import GRADIENT_FLOOR
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.precision.policy import policy
from hybridtrain.precision.rules import names_of
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch, StepResult

_BF16_STEP = 2**-7
"""Largest step between two bf16 numbers, as a share of them."""


@dataclass(frozen=True)
class LayoutJob:
    """What a rank trains; sent to it pickled."""

    config: Config
    layout: ParallelLayout
    plan: BatchPlan
    steps: int
    vocab: int
    folder: str
    """Folder of the reference's tensors."""
    task: Task | None
    """A program's own task; None: that of task.kind."""
    data: Blend | None
    """A program's own rows; None: the data of the config."""


@dataclass
class Steps:
    """Loss and gradient norm of each optimizer step; the same on every rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0


@dataclass
class Differences:
    """The largest difference over this rank's tensors, the tensor that has it, and all tensors compared."""

    largest: float = 0.0
    name: str = ""
    compared: set[str] = field(default_factory=set)

    def add(self, name: str, value: float) -> None:
        self.compared.add(name)
        if not (value <= self.largest or math.isnan(self.largest)):  # NaN counts as larger than anything
            self.largest, self.name = value, name


@dataclass(frozen=True)
class ReferenceResult:
    """The steps of the reference, and the names of the tensors in its two files."""

    steps: Steps
    moved: float
    """Largest change of an element of a parameter. Not measured (0) for AdamW: about the
    learning rate per step."""
    noise: float
    """Largest relative difference of a gradient to what it is without formats of linear layers."""
    gradients: set[str]
    parameters: set[str]


@dataclass(frozen=True)
class Measurement:
    """The result of one rank."""

    steps: Steps
    gradients: Differences
    parameters: Differences


def train_reference(job: LayoutJob) -> ReferenceResult:
    """Train in one plain process; write gradients.safetensors and parameters.safetensors
    into the job's folder.
    """
    device, config = mesh.device(), job.config
    registry.load(config.run.plugins)
    plain = _plain(job, config.precision, device=device)
    tokens = _tokens(job, dp_rank=0, dp_size=1, collate=plain.task.collate)
    first = (
        {}
        if config.optim.kind == "adamw"
        else {name: value.clone() for name, value in plain.parameters().items()}
    )
    steps = Steps()
    for step in range(job.steps):
        batches = [batch.to(device) for batch in tokens.micro_batches(step)]
        with device:  # the reference allocates its accumulators on the default device
            result = plain.step(batches, lr=config.optim.lr)
        steps.losses.append(result.loss)
        steps.grad_norms.append(result.grad_norm)
        if step == 0:
            gradients = _write(result.gradients, Path(job.folder) / "gradients.safetensors")
            noise = _noise(job, result, batches=batches, device=device)
        del result
    moved = max(
        (float((value - first[name]).abs().max()) for name, value in plain.parameters().items() if first),
        default=0.0,
    )
    return ReferenceResult(
        steps,
        moved,
        noise,
        gradients,
        _write(plain.parameters(), Path(job.folder) / "parameters.safetensors"),
    )


def _plain(job: LayoutJob, precision: PrecisionConfig, *, device: torch.device) -> reference.Reference:
    """The plain process, before its first step."""
    config, facts = job.config, facts_of(job.config.model)
    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    plain = reference.Reference(
        built,
        source=initial(config.model, built, seed=config.run.seed),
        settings=config.optim,
        precision=precision,
        seed=config.run.seed,
        freeze=config.model.freeze,
        adapters=config.adapters,
        task=job.task or tasks.of(config, labels=len(facts.labels), vocab=facts.vocab, encoder=facts.encoder),
    )
    plain.loss_scale = precision.static_scale or 1.0
    for model in {plain.master, plain.worker}:
        model.to(device)
    return plain


def _noise(
    job: LayoutJob, result: reference.ReferenceStep, *, batches: Sequence[Batch], device: torch.device
) -> float:
    """ReferenceResult.noise, of the first step."""
    precision = job.config.precision
    if not names_of(precision):
        return 0.0
    exact = _plain(job, dataclasses.replace(precision, compute="", rules=[], emulate=False), device=device)
    with device:
        gradients = exact.step(batches, lr=job.config.optim.lr).gradients
    floor = GRADIENT_FLOOR * result.grad_norm
    return max(
        float((value - gradients[name]).norm() / value.norm().clamp(min=floor))
        for name, value in result.gradients.items()
    )


def train_layout(job: LayoutJob, reference_norm: float) -> Measurement:
    """Train under the job's layout and compare (collective).

    `reference_norm`: the reference's first gradient norm.
    """
    device = mesh.device()
    registry.load(job.config.run.plugins)
    mesh.connect(device, timeout_s=job.config.engine.timeout_s)
    engine = engines.build_for(
        job.task, job.config, layout=job.layout, plan=job.plan, device=device, initial=True
    )
    gradients, parameters = Differences(), Differences()

    def compare_gradients(named: Iterable[tuple[str, Any]]) -> None:
        compute = policy(job.config.precision).compute
        relative = partial(_of_gradient, whole_norm=reference_norm, compute=compute)
        _compare(named, Path(job.folder) / "gradients.safetensors", gradients, relative)

    engine.on_gradients(compare_gradients)
    tokens = _tokens(job, dp_rank=engine.mesh.dp_rank, dp_size=job.layout.dp, collate=engine.task.collate)
    steps = Steps()
    for step in range(job.steps):
        _record(steps, engine.train_step(tokens.micro_batches(step), lr=job.config.optim.lr))
    # Of two nearly equal numbers, one may be rounded up to bf16 and the other down.
    rounding = _BF16_STEP if policy(job.config.precision).param == torch.bfloat16 else 0.0
    _compare(
        engine.weights(),
        Path(job.folder) / "parameters.safetensors",
        parameters,
        lambda ours, theirs: float(((ours - theirs).abs() - rounding * theirs.abs()).clamp(min=0).max()),
    )
    engine.close()
    return Measurement(steps, gradients, parameters)


def _of_gradient(
    ours: torch.Tensor, theirs: torch.Tensor, *, whole_norm: float, compute: torch.dtype
) -> float:
    """The relative difference of two gradients of a parameter: to the second, or where both are nothing but
    rounding, such as that of a bias of keys, which softmax cancels, to the norm of all gradients.
    """
    size, floor = float(theirs.norm()), GRADIENT_FLOOR * whole_norm
    noise = max(floor, torch.finfo(compute).eps / 64 * whole_norm)  # in bf16 1e-4: measured 1e-5
    rounding = max(size, float(ours.norm())) <= noise
    return float((ours - theirs).norm()) / (whole_norm if rounding else max(size, floor))


def _record(steps: Steps, result: StepResult) -> None:
    steps.losses.append(float(result.loss))
    steps.grad_norms.append(float(result.grad_norm))
    steps.skipped += int(result.skipped)


def _compare(
    named: Iterable[tuple[str, Any]],
    path: Path,
    largest: Differences,
    difference: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    """Gather each tensor whole (collective over its mesh) and add its difference to `largest`."""
    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        for name, tensor in named:
            ours = whole(tensor)
            largest.add(name, difference(ours, file.get_tensor(name)) if name in known else float("nan"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a tensor or DTensor, in fp32 or fp64, on the CPU (collective over its mesh)."""
    if isinstance(tensor, DTensor):  # the device gathers what is offloaded
        part = local(tensor.detach()).to(tensor.device_mesh.device_type)
        tensor = like(part, tensor, shape=tensor.shape)
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return wide(full.detach()).cpu()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> set[str]:
    """Write tensors to a file in fp32 or fp64; returns their names."""
    save_file({name: wide(tensor).cpu().contiguous() for name, tensor in tensors.items()}, path)
    return set(tensors)


def _tokens(job: LayoutJob, *, dp_rank: int, dp_size: int, collate: Collate) -> Tokens:
    seed = job.config.run.seed
    if job.data or job.config.data.named:
        data = job.data or data_of(job.config, timeout_s=0)
        data = own_rows(data, facts=facts_of(job.config.model))
        return Loader(
            data, plan=job.plan, dp_rank=dp_rank, dp_size=dp_size, seed=seed, vocab=job.vocab, collate=collate
        )
    facts = facts_of(job.config.model)
    return Synthetic(
        vocab=job.vocab,
        plan=job.plan,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=seed,
        labels=len(facts.labels),
        head=facts.head,
        collate=collate,
    )
