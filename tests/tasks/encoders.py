"""Encoders in tests of tasks: steps on real ranks and by transformers' own model in one plain process, what
must agree, and a run that stops and goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain import engine as engines
from hybridtrain.cli.main import main
from hybridtrain.config.compose import train_config
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.models.build import hf_config
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from hybridtrain.parallel.mesh import connect
from hybridtrain.reference import Reference
from hybridtrain.training.job import Job, resolve
from tests import runs
from tests.cases import whole

NO_DROPOUT = "hidden_dropout_prob:0.0,attention_probs_dropout_prob:0.0"
DROPOUT = [
    "model.config.hidden_dropout_prob=0.1",
    "model.config.attention_probs_dropout_prob=0.1",
    "model.attention=eager",
]


def sharded(stage: int) -> list[str]:
    return ["parallel.dp_replicate=1", "parallel.dp_shard=2", f"parallel.zero_stage={stage}"]


LAYOUTS = {
    "dp2": ["parallel.dp_replicate=2"],
    **{f"zero{stage}": sharded(stage) for stage in (1, 2, 3)},
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "pp2-tp2": ["parallel.pp=2", "parallel.tp=2"],
    **{f"deepspeed-zero{stage}": ["engine=deepspeed", *sharded(stage)] for stage in (1, 2, 3)},
    "deepspeed-pp2-tp2": ["engine=deepspeed", "parallel.pp=2", "parallel.tp=2"],
}
STEPS, LR = 3, 1e-3


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    sums: list[list[float]]
    """Of each step, and of an evaluation."""
    counts: list[list[int]]
    gradients: dict[str, torch.Tensor]
    """Of the first step."""
    parameters: dict[str, torch.Tensor]
    """After the last step."""
    fewest: int
    """Labels of this rank in the step with the fewest."""


def batches_of(job: Job, task: Any, *, dp_rank: int, dp: int) -> tuple[list[Any], list[Any]]:
    """(of each step, of an evaluation)."""
    options = {"plan": job.plan, "dp_rank": dp_rank, "dp_size": dp, "vocab": job.facts.vocab}
    loader = Loader(job.data, **options, seed=job.config.run.seed, collate=task.collate)
    evaluated = eval_batches(
        job.data, **options, rows=5, micro_batches_per_step=job.plan.grad_accum, collate=task.collate
    )
    return [loader.micro_batches(step) for step in range(STEPS)], evaluated


Batches = Callable[..., tuple[list[Any], list[Any]]]
ByHand = Callable[[Any, list[Any]], tuple[list[float], list[int]]]
"""(sums, counts) of batches by transformers' own model."""


def trained(argv: list[str], ranks: int, *, batches: Batches) -> Outcome:
    """Train with these batches, see `batches_of`, and evaluate."""
    torch.manual_seed(0)
    job = resolve(train_config(argv), world_size=ranks, here=False, data=None, task=None)
    device = torch.device("cpu")
    connect(device, timeout_s=240)
    engine = engines.build(job.config, layout=job.layout, plan=job.plan, device=device)
    gradients: dict[str, torch.Tensor] = {}

    def keep(named: Iterator[tuple[str, Any]]) -> None:
        gradients.update({name: whole(gradient) for name, gradient in named})

    engine.on_gradients(keep)
    train, evaluated = batches(job, engine.task, dp_rank=engine.mesh.dp_rank, dp=job.layout.dp)
    results = [engine.train_step(each, lr=LR) for each in train]
    found = sum((engine.eval_step(each) for each in evaluated[1:]), engine.eval_step(evaluated[0]))
    labels = [sum(int(engine.task.counts(batch)["loss"]) for batch in each) for each in train]
    return Outcome(
        [float(result.loss) for result in results],
        [float(result.grad_norm) for result in results],
        [*(result.sums.tolist() for result in results), list(found.values.values())],
        [*(result.counts.tolist() for result in results), list(found.counts.values())],
        gradients,
        {name: whole(tensor) for name, tensor in engine.weights()},
        min(labels),
    )


def in_one_process(argv: list[str], *, encoder: bool, batches: Batches, by_hand: ByHand) -> Outcome:
    """The same by transformers' own model; the sums without dropout, with its own loss."""
    job = resolve(train_config(argv), world_size=1, here=False, data=None, task=None)
    config = job.config
    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    task = engines.tasks.of(config, labels=len(job.facts.labels), vocab=job.facts.vocab, encoder=encoder)
    plain = Reference(
        built,
        source=initial(config.model, built, seed=config.run.seed),
        settings=config.optim,
        precision=config.precision,
        seed=config.run.seed,
        freeze=(),
        adapters=config.adapters,
        task=task,
    )
    train, evaluated = batches(job, task, dp_rank=0, dp=1)
    outcome = Outcome([], [], [], [], {}, {}, 0)

    def note(some: list[Any]) -> None:
        sums, counts = by_hand(plain.worker, some)
        outcome.sums.append(sums)
        outcome.counts.append(counts)

    for some in train:
        note(some)
        step = plain.step(some, lr=LR)
        outcome.losses.append(step.loss)
        outcome.norms.append(step.grad_norm)
        outcome.gradients = outcome.gradients or step.gradients
    outcome.parameters = plain.parameters()
    note([batch for some in evaluated for batch in some])
    return outcome


def agree(found: list[Outcome], expected: Outcome) -> None:
    """All ranks' outcomes with that of one process."""
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=1e-5)
        assert rank.norms == pytest.approx(expected.norms, rel=1e-5)
        assert rank.counts == expected.counts
        for ours, theirs in zip(rank.sums, expected.sums, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    gradients = {name: gradient for rank in found for name, gradient in rank.gradients.items()}
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = float((gradients[name] - gradient).norm())
        assert difference <= 1e-5 * max(float(gradient.norm()), 1e-3 * expected.norms[0]), name
    parameters = {name: tensor for rank in found for name, tensor in rank.parameters.items()}
    assert parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        assert float((parameters[name] - parameter).abs().max()) <= 0.02 * STEPS * LR, name


def agree_with_dropout(found: list[Outcome], expected: Outcome) -> None:
    """`expected` has the sums of training without dropout, and evaluations are without it."""
    agree(found, dataclasses.replace(expected, sums=[*found[0].sums[:-1], expected.sums[-1]]))


def goes_on(
    folder: Path, ranks: int, words: Callable[..., list[str]], *, names: list[str]
) -> tuple[Path, dict[str, Any]]:
    """(a run that stops half way and goes on bit for bit, what `evaluate` finds of its export).

    `words`: its command line with further options. `names`: what the training and `evaluate` measure alike.
    """
    more = ["train.log_every=1", "train.eval_every=2", "checkpoint.every=2"]
    for name, steps in (("whole", 4), ("cut", 2), ("cut", 4)):
        runs.finished(ranks, words(*more, f"train.steps={steps}", f"run.dir={folder / name}"))
    run = folder / "cut"
    assert runs.rows(run) == runs.rows(folder / "whole")
    assert main(["export", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads((run / "evaluation.json").read_text())
    for name in names:
        assert found[name] == pytest.approx(last[f"eval_{name}"], rel=1e-5)
    return run, found
