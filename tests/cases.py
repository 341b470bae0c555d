"""Train the same synthetic tokens under a layout (on gloo ranks) and in the plain reference;
compare what they did."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from hybridtrain import engine as engines
from hybridtrain.config import schema
from hybridtrain.models.build import hf_config
from hybridtrain.models.init import draw, fill, reset_buffers
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from hybridtrain.models.stage import Stage
from hybridtrain.parallel.mesh import connect
from hybridtrain.parity import measure
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import notation
from hybridtrain.plan.batch import plan_batch
from hybridtrain.precision.rules import has_loss_scale
from hybridtrain.reference import Reference
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.tasks.head import Head
from hybridtrain.types import IGNORE_INDEX, Batch
from tests.ranks import run_ranks

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def model(model_type: str = "llama", **fields: Any) -> dict[str, Any]:
    extra = {"head_dim": 8} if model_type == "qwen3" else {}
    return {"model_type": model_type, **SIZES, **extra, **fields}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained and how; everything a rank needs, so that it pickles."""

    layout: str = "single"
    fields: dict[str, Any] = dataclasses.field(default_factory=model)
    precision: str = "fp32"
    steps: int = 2
    global_batch_size: int = 8
    micro_batch_size: int = 2
    seq_len: int = 16
    lr: float = 1e-3
    freeze: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()
    """('section.field', value) pairs."""
    uneven: bool = True
    """Mask a different number of labels in each row."""
    blank_rows: tuple[int, ...] = ()
    """Rows of the global batch without any label."""
    device: str = "cpu"
    """cpu, or cuda: each rank on the GPU of its number."""

    def config(self) -> schema.Config:
        config = schema.Config()
        config.model.config = self.fields
        config.model.freeze = list(self.freeze)
        config.parallel = schema.ParallelConfig(**notation.parse(self.layout))
        config.batch = schema.BatchConfig(self.global_batch_size, self.micro_batch_size)
        config.data.seq_len = self.seq_len
        config.precision.kind = self.precision
        # a larger eps: Adam magnifies noise where |g| is near it
        config.optim.lr, config.optim.clip, config.optim.eps = self.lr, 0.5, 1e-6
        config.run.seed = 7
        for path, value in self.overrides:
            section, field = path.split(".")
            setattr(getattr(config, section), field, value)
        return config

    @property
    def world_size(self) -> int:
        degrees = notation.parse(self.layout)
        world = 1
        for axis in layouts.AXES:
            world *= degrees.get(axis, 1)
        return world

    def rows(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input ids and labels of the step's global batch."""
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(
            0, self.fields["vocab_size"], (self.global_batch_size, self.seq_len + 1), generator=generator
        )
        labels = tokens[:, 1:].clone()
        if self.uneven:
            for row in range(self.global_batch_size):
                labels[row, : (row * 5) % (self.seq_len - 2)] = IGNORE_INDEX
        labels[list(self.blank_rows)] = IGNORE_INDEX
        return tokens[:, :-1].contiguous(), labels

    def batches(self, step: int, *, dp_rank: int, dp: int) -> list[Batch]:
        ids, labels = self.rows(step)
        share = self.global_batch_size // dp
        positions = torch.arange(self.seq_len).repeat(self.micro_batch_size, 1)
        starts = range(dp_rank * share, (dp_rank + 1) * share, self.micro_batch_size)
        return [
            Batch(ids[s : s + self.micro_batch_size], labels[s : s + self.micro_batch_size], positions)
            for s in starts
        ]


def deepspeed(
    layout: str,
    fields: dict[str, Any] | None = None,
    *,
    precision: str = "fp32",
    overrides: tuple[tuple[str, Any], ...] = (),
) -> Case:
    """A case for engine=deepspeed."""
    return Case(
        layout, fields or model(), precision=precision, overrides=(("engine.kind", "deepspeed"), *overrides)
    )


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, whole, before clipping."""
    parameters: dict[str, torch.Tensor]
    """After the last step, whole."""


def reference(case: Case) -> Outcome:
    config = case.config()
    built = hf_config(read_config(config.model), chosen={}, attention=config.model.attention)
    source, task = initial(config.model, built, seed=config.run.seed), CausalLM()
    plain = Reference(
        built,
        source=source,
        settings=config.optim,
        precision=config.precision,
        seed=config.run.seed,
        freeze=case.freeze,
        task=task,
    )
    plain.loss_scale = config.precision.init_scale if has_loss_scale(config.precision) else 1.0
    steps = [plain.step(case.batches(step, dp_rank=0, dp=1), lr=case.lr) for step in range(case.steps)]
    return Outcome(
        [s.loss for s in steps],
        [s.grad_norm for s in steps],
        steps[0].gradients if steps else {},
        {k: wide(v) for k, v in plain.parameters().items()},
    )


def open_fp16_gate() -> None:
    """DeepSpeed refuses fp16 on CPUs whose oneDNN has no kernels for it; torch computes it all the same,
    slowly, which will do for tests."""
    from hybridtrain.engine.deepspeed.start import start

    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed_ = start(torch.device("cpu"))
    type(deepspeed_.get_accelerator()).is_fp16_supported = lambda self: True  # noqa: ARG005


def start(case: Case) -> Any:
    """The engine of a case, on this rank."""
    config = case.config()
    layout = layouts.resolve(config.parallel, world_size=case.world_size)
    plan = plan_batch(config.batch, layout=layout, seq_len=case.seq_len)
    device = (
        torch.device("cpu")
        if case.device == "cpu"
        else torch.device(case.device, int(os.environ["LOCAL_RANK"]))
    )
    connect(device, timeout_s=120)
    if case.precision == "fp16_mixed" and config.engine.kind == "deepspeed" and case.device == "cpu":
        open_fp16_gate()
    return engines.build(config, layout=layout, plan=plan, device=device)


def train(case: Case) -> Outcome:
    """Runs on every rank; whole parameters are returned by each rank for the stages it has."""
    torch.manual_seed(0)
    engine = start(case)
    gradients: dict[str, torch.Tensor] = {}

    def keep(named: Iterator[tuple[str, Any]]) -> None:
        for name, gradient in named:
            gradients.setdefault(name, whole(gradient))  # the first of two copies of a tied matrix

    engine.on_gradients(keep)
    results = [
        engine.train_step(case.batches(step, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr)
        for step in range(case.steps)
    ]
    parameters = {name: whole(parameter) for name, parameter in engine.weights()}
    return Outcome(
        [float(r.loss) for r in results], [float(r.grad_norm) for r in results], gradients, parameters
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return measure.whole(tensor).clone()


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(torch.float32, tensor.dtype))


def on_ranks(case: Case) -> Outcome:
    """Train on real ranks; the ranks must agree, and their stages together must be the model."""
    outcomes = run_ranks(
        case.world_size, train, case, backend="gloo" if case.device == "cpu" else "cpu:gloo,cuda:nccl"
    )
    first = outcomes[0]
    merged = Outcome(first.losses, first.grad_norms, {}, {})
    for outcome in outcomes:
        assert outcome.losses == first.losses, "ranks report different losses"
        assert outcome.grad_norms == first.grad_norms, "ranks report different gradient norms"
        for target, part in ((merged.gradients, outcome.gradients), (merged.parameters, outcome.parameters)):
            for name, value in part.items():
                assert name not in target or torch.equal(target[name], value), f"{name} differs between ranks"
                target[name] = value
    return merged


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Largest relative difference of losses, norms and first-step gradients, and largest
    absolute one of parameters."""
    assert ours.parameters.keys() == theirs.parameters.keys()
    assert ours.gradients.keys() == theirs.gradients.keys()
    return {
        "loss_rel": max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True)),
        "grad_norm_rel": max(
            abs(a - b) / abs(b) for a, b in zip(ours.grad_norms, theirs.grad_norms, strict=True)
        ),
        "grad_rel": max(
            float((ours.gradients[n] - g).norm() / g.norm().clamp(min=1e-12))
            for n, g in theirs.gradients.items()
        ),
        "param_abs": max(float((ours.parameters[n] - p).abs().max()) for n, p in theirs.parameters.items()),
    }


def assert_parity(case: Case) -> dict[str, float]:
    """fp32: 1e-5 relative on loss, norm and gradients; parameters within 0.05 x the sum of learning rates."""
    found = differences(on_ranks(case), reference(case))
    assert found["loss_rel"] < 1e-5, found
    assert found["grad_norm_rel"] < 1e-5, found
    assert found["grad_rel"] < 1e-5, found
    assert found["param_abs"] < 0.05 * case.lr * case.steps, found
    return found


def at_the_head(
    fields: dict[str, Any], ids: torch.Tensor, places: torch.Tensor, *, attention: str, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a whole model as one stage: what its head is given (its own logits exist in chunks only),
    and the head's weight."""
    config = hf_config(fields, chosen={}, attention=attention)
    head = functools.partial(Head, task=CausalLM(), loss_chunk=0)
    stage = (
        Stage(config, layers=range(config.num_hidden_layers), first=True, last=True, head=head)
        .to_empty(device="cpu")
        .eval()
    )
    reset_buffers(stage, device=torch.device("cpu"))
    fill([stage], draw(config, seed=0))
    seen: list[torch.Tensor] = []
    stage.part(stage.structure.after[-1]).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        stage(ids, batch=Batch(ids, torch.zeros_like(ids), places, packed=packed))
    return seen[0], stage.part(stage.structure.head).weight.detach()
