"""Faults planted into runs: in a callback that changes the modules of some ranks before the first step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import hybridtrain as ht
from hybridtrain.checkpoint.fragments import Fragment
from hybridtrain.data import order
from hybridtrain.data.corpus import Corpus
from hybridtrain.errors import UserError
from hybridtrain.models import attention
from hybridtrain.models.structure import is_stub
from hybridtrain.parallel.grad_norm import local_part
from hybridtrain.runtime import launch
from hybridtrain.training import recovery
from hybridtrain.training.callbacks import Callback, Run
from tests.ranks import run_ranks
from tests.runs import arguments

SEQ_LEN, ROWS, SEED = 32, 8, 0


def sample(data: Path, step: int, place: int) -> tuple[int, list[int], list[int]]:
    """(row, its tokens, numbers of its documents) of a place in the global batch of a step, computed anew."""
    reader = Corpus.open(data).readers["train"]
    rows = (reader.tokens - 1) // SEQ_LEN
    row = int(order.row_ids(np.array([step * ROWS + place]), rows=rows, seed=SEED)[0])
    first, after = row * SEQ_LEN, (row + 1) * SEQ_LEN + 1
    ends = np.cumsum(reader.sizes)
    documents = [n for n, end in enumerate(ends) if end > first and end - reader.sizes[n] < after]
    return row, [int(token) for token in reader.read(first, after - 1)], documents


@dataclasses.dataclass(frozen=True)
class Plant:
    """What goes wrong, on which ranks and in which micro-batch of each step."""

    kind: str
    """weight, activation, backward, row, loss, attention; between: modules; once: in the first step alone."""
    module: str
    ranks: tuple[int, ...] | None = None
    """None: all."""
    micro_batch: int = 0
    micro_batches: int = 4
    """Of a rank in a step."""
    tokens: tuple[int, ...] = ()
    """The row that is spoilt (row, loss)."""


class Planted(Callback):
    """Plants a fault."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant

    def on_start(self, run: Run) -> None:
        plant = self.plant
        if plant.ranks is not None and dist.get_rank() not in plant.ranks:
            return
        modules = dict(run.engine.modules())
        module: Any = modules.get(plant.module)
        if plant.kind == "attention":
            spoil_attention(run.engine, plant)
        elif module is None or is_stub(module):
            return  # on another stage
        elif plant.kind == "weight":
            weight = module.weight.to_local() if hasattr(module.weight, "to_local") else module.weight
            weight.data.view(-1)[-1] = torch.nan
        else:
            spoil(module, plant)


class Recorded(Callback):
    """Writes which rows each step reads, and whether it changes the weights: a line for each call of
    train_step."""

    def on_start(self, run: Run) -> None:
        engine: Any = run.engine
        step, file = engine.train_step, run.dir / f"read-{dist.get_rank()}.jsonl"

        def train_step(batches: Any, **options: Any) -> Any:
            if not getattr(engine, "updates", True):  # a replay of the DeepSpeed engine
                return step(batches, **options)
            before = weights(engine)
            result = step(batches, **options)
            changed = any(not torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
            rows = [row for batch in batches for row in batch.input_ids_BT.tolist()]
            with file.open("a") as stream:
                stream.write(json.dumps({"rows": rows, "changed": changed}) + "\n")
            return result

        engine.train_step = train_step


def weights(engine: Any) -> list[Tensor]:
    """Copies of this rank's."""
    parts = [value for key, value in engine.state().items() if key.startswith("model.")]
    local = [part.values if isinstance(part, Fragment) else local_part(part) for part in parts]
    return [part.detach().clone() for part in local]


def steps_read(folder: Path, data: Path, *, world: int, steps: int) -> list[int]:
    """The numbers of the steps of whose data each call of train_step has read the rows, all of them."""
    number = {
        tuple(sample(data, step, place)[1]): (step, place) for step in range(steps) for place in range(ROWS)
    }
    files = [(folder / f"read-{rank}.jsonl").read_text().splitlines() for rank in range(world)]
    result = []
    for lines in zip(*files, strict=True):
        rows = [number[tuple(row)] for line in lines for row in json.loads(line)["rows"]]
        assert sorted({place for _, place in rows}) == list(range(ROWS))
        [step] = {step for step, _ in rows}
        result.append(step)
    return result


def updates(folder: Path) -> list[bool]:
    """Whether each call of train_step has changed the weights of rank 0."""
    return [json.loads(line)["changed"] for line in (folder / "read-0.jsonl").read_text().splitlines()]


def spoil(module: Any, plant: Plant) -> None:
    forward, calls = module.forward, [0]

    def call(*given: Any) -> Any:
        here = calls[0] % plant.micro_batches == plant.micro_batch
        again = calls[0] >= plant.micro_batches
        calls[0] += 1
        if plant.kind == "row":
            hit = (given[0] == torch.tensor(plant.tokens)).all(1)
            return torch.where(hit[:, None, None], torch.inf, forward(*given))
        if plant.kind == "loss":
            hit = (given[1].input_ids_BT == torch.tensor(plant.tokens)).all(1).any()
            return torch.where(hit, torch.inf, forward(*given))
        out = forward(*given)
        if (plant.kind == "activation" and here) or (plant.kind == "once" and here and not again):
            return out + torch.inf
        return Nan.apply(out) if plant.kind == "backward" and here else out

    if plant.kind == "between":
        module.register_forward_pre_hook(lambda _, given: (given[0] + torch.inf, *given[1:]))
    else:
        module.forward = call


def spoil_attention(engine: Any, plant: Plant) -> None:
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention.registered(engine.model_config)
    function = ALL_ATTENTION_FUNCTIONS[name]
    own = dict(engine.modules())

    def call(module: Any, *given: Any, **options: Any) -> Any:
        out, *others = function(module, *given, **options)
        return (out + torch.nan if module is own.get(plant.module) else out, *others)

    AttentionInterface.register(name, call)


class Nan(torch.autograd.Function):
    """The identity, whose backward pass gives no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        return gradient + torch.nan


def fit_late(argv: list[str], plant: Plant | None) -> str:
    """As `fit`, with numbers of a step that are read as on a GPU, where an event says when they are there."""
    own = recovery._to_host
    recovery._to_host = lambda result: (own(result)[0], Passed())  # type: ignore[assignment,return-value]
    try:
        return fit(argv, plant)
    finally:
        recovery._to_host = own


class Passed:
    """An event that has passed."""

    def synchronize(self) -> None: ...


def fit(argv: list[str], plant: Plant | None) -> str:
    """Train on this rank; returns the message of a UserError, or ""."""
    launch.RANK_0_FIRST_S = launch.AFTER_RANK_0_S = 0.2
    planted = [Planted(plant)] if plant else []
    try:
        ht.Trainer(ht.compose(*argv), callbacks=[*planted, Recorded()]).fit()
    except UserError as error:
        return str(error)
    return ""


def run(
    world_size: int, folder: Path, data: Path, plant: Plant | None, *, late: bool = False, **options: object
) -> str:
    """A run with a fault; all ranks must end alike, with this message. `late`: see fit_late."""
    given = {"batch__micro_batch_size": 2, "batch__global_batch_size": ROWS, **options}
    [message] = set(run_ranks(world_size, fit_late if late else fit, arguments(folder, data, **given), plant))
    return message
