"""A small BERT, a corpus with sentences, and steps of both on real ranks and in one plain process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hybridtrain import engine as engines
from hybridtrain.config import schema
from hybridtrain.config.compose import train_config
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.models.build import hf_config
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from hybridtrain.parallel.mesh import connect
from hybridtrain.reference import Reference
from hybridtrain.tasks.masked_lm import MaskedLM
from hybridtrain.training.job import Job, resolve
from tests.cases import whole

SEQ, VOCAB = 32, 320
NO_DROPOUT = "hidden_dropout_prob:0.0,attention_probs_dropout_prob:0.0"
SIZES = (
    f"vocab_size:{VOCAB},hidden_size:32,num_hidden_layers:3,num_attention_heads:4,intermediate_size:48,"
    f"max_position_embeddings:34,initializer_range:0.1,{NO_DROPOUT}"
)
MODELS = {
    "bert": f"++model.config={{model_type:bert,architectures:[BertForPreTraining],{SIZES}}}",
    "masked": f"++model.config={{model_type:bert,architectures:[BertForMaskedLM],{SIZES}}}",
    "roberta": "++model.config={model_type:roberta,architectures:[RobertaForMaskedLM],pad_token_id:0,"
    f"{SIZES}}}",
}
SHARDED = ["parallel.dp_replicate=1", "parallel.dp_shard=2", "parallel.zero_stage=3"]
LAYOUTS = {
    "dp2": ["parallel.dp_replicate=2"],
    "zero1": ["parallel.dp_replicate=1", "parallel.dp_shard=2", "parallel.zero_stage=1"],
    "zero2": ["parallel.dp_replicate=1", "parallel.dp_shard=2", "parallel.zero_stage=2"],
    "zero3": SHARDED,
    "deepspeed": ["engine=deepspeed", *SHARDED],
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
    "pp2-tp2": ["parallel.pp=2", "parallel.tp=2"],
}
STEPS, LR = 2, 1e-3


def sentence(number: int) -> str:
    return f"Number {number} times {number % 7} is {number * (number % 7)}, says row {number % 11}."


def corpus(folder: Path, *, each: int) -> Path:
    """Sixteen documents of `each` sentences, some held out."""
    text = folder / "text"
    text.mkdir(parents=True)
    for number in range(16):
        words = [sentence(number * 100 + place) for place in range(each)]
        (text / f"{number}.txt").write_text(" ".join(words))
    data = schema.DataConfig(
        path=str(folder / "data"), source=[str(text)], vocab_size=VOCAB, eval_fraction=0.3
    )
    data.encoder_tokens = data.sentences = True
    data.seq_len = SEQ
    return prepare(data, options=schema.PrepareConfig())


def words(name: str, folder: Path, *more: str) -> list[str]:
    """A command line of training."""
    return [
        "task=masked_lm",
        MODELS[name],
        f"data.path={folder}",
        f"data.seq_len={SEQ}",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=2",
        "schedule=constant",
        f"optim.lr={LR}",
        "optim.eps=1e-6",
        *([] if any(word.startswith("train.steps") for word in more) else ["train.steps=2"]),
        *(["task.next_sentence=true"] if name == "bert" else []),
        *more,
    ]


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    sums: list[list[float]]
    """Of each step, and of an evaluation."""
    counts: list[list[int]]
    gradients: dict[str, torch.Tensor]
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


def on_rank(argv: list[str], ranks: int) -> Outcome:
    """Train two steps, and evaluate."""
    return trained(argv, ranks, batches=batches_of)


def trained(argv: list[str], ranks: int, *, batches: Batches) -> Outcome:
    """`on_rank` with these batches, see `batches_of`."""
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
        min(labels),
    )


def in_one_process(argv: list[str]) -> Outcome:
    """The same by transformers' own model; the sums without dropout, with its own loss: the mean of masked
    tokens, and that of rows.
    """
    job = resolve(train_config(argv), world_size=1, here=False, data=None, task=None)
    config = job.config
    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    task = engines.tasks.of(config, labels=0, vocab=job.facts.vocab, encoder=True)
    assert isinstance(task, MaskedLM)
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
    train, evaluated = batches_of(job, task, dp_rank=0, dp=1)
    outcome = Outcome([], [], [], [], {}, 0)
    for batches in train:
        sums, counts = _by_hand(plain.worker, batches)
        outcome.sums.append(sums)
        outcome.counts.append(counts)
        step = plain.step(batches, lr=LR)
        outcome.losses.append(step.loss)
        outcome.norms.append(step.grad_norm)
        outcome.gradients = outcome.gradients or step.gradients
    sums, counts = _by_hand(plain.worker, [batch for batches in evaluated for batch in batches])
    outcome.sums.append(sums)
    outcome.counts.append(counts)
    return outcome


@torch.no_grad()
def _by_hand(model: Any, batches: list[Any]) -> tuple[list[float], list[int]]:
    """(sums, counts): losses and right predictions of masked tokens, and of rows if there are pairs."""
    sums, counts = [0.0] * 4, [0] * 4
    model.eval()
    for batch in batches:
        real = (batch.position_ids_BT == 0).cumsum(1) == 1
        given = {"input_ids": batch.input_ids_BT, "attention_mask": real.long(), "labels": batch.labels_BT}
        masked = batch.labels_BT != -100
        if not hasattr(batch, "unrelated_B"):
            out = model(**given)
            logits, pairs, rows = out.logits, None, torch.zeros(0)
        else:
            rows = batch.unrelated_B != -100
            out = model(**given, **batch.arguments(), next_sentence_label=batch.unrelated_B)
            logits, pairs = out.prediction_logits, out.seq_relationship_logits
        n, m = int(masked.sum()), int(rows.sum())
        if pairs is not None and m:
            of_pairs = torch.nn.functional.cross_entropy(pairs[rows], batch.unrelated_B[rows])
            sums[2] += float(of_pairs) * m
            sums[3] += int((pairs.argmax(-1) == batch.unrelated_B).sum())
            out.loss = out.loss - of_pairs
        sums[0] += float(out.loss) * n if n else 0.0
        sums[1] += int((logits.argmax(-1) == batch.labels_BT).sum())
        counts = [counts[0] + n, counts[1] + n, counts[2] + m, counts[3] + m]
    model.train()
    return (sums, counts) if counts[2] else (sums[:2], counts[:2])
