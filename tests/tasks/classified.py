"""Small encoders that classify texts: their data, and steps on real ranks and by transformers' own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybridtrain import engine as engines
from hybridtrain.config import schema
from hybridtrain.config.compose import train_config
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.models.build import hf_config
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from hybridtrain.reference import Reference
from hybridtrain.training.job import Job, resolve
from hybridtrain.types import IGNORE_INDEX
from tests.tasks.masked import Outcome, batches_of, trained

SEQ, VOCAB, LABELS = 16, 300, ["low", "middle", "high"]
NO_DROPOUT = "hidden_dropout_prob:0.0,attention_probs_dropout_prob:0.0"
SIZES = (
    f"vocab_size:{VOCAB},hidden_size:32,num_hidden_layers:3,num_attention_heads:4,intermediate_size:48,"
    f"max_position_embeddings:24,initializer_range:0.1,{NO_DROPOUT}"
)
MODELS = {
    "bert": f"++model.config={{model_type:bert,{SIZES}}}",
    "roberta": f"++model.config={{model_type:roberta,pad_token_id:0,{SIZES}}}",
}
STEPS, LR = 2, 1e-3


def records(count: int) -> list[dict[str, str]]:
    """Texts of different lengths, whose last number tells the class; some are longer than a row."""
    return [
        {
            "text": " ".join(f"row {n % 5}" for n in range(number % 4 + 20 * (number % 20 == 9)))
            + f" it is {number % 3}",
            "label": LABELS[number % 3],
        }
        for number in range(count)
    ]


def corpus(folder: Path, *, encoder: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({**each, "text": f"{number}{each['text']}"}) for number, each in enumerate(records(120))
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    data = schema.DataConfig(
        path=str(folder / "data"), source=[str(folder / "texts.jsonl")], vocab_size=VOCAB, eval_fraction=0.2
    )
    data.format, data.labels, data.seq_len, data.encoder_tokens = "labelled", LABELS, SEQ, encoder
    return prepare(data, options=schema.PrepareConfig())


def words(name: str, folder: Path, *more: str) -> list[str]:
    """A command line of training."""
    return [
        "task=classification",
        MODELS[name],
        f"data.path={folder}",
        f"data.seq_len={SEQ}",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=2",
        "schedule=constant",
        f"optim.lr={LR}",
        "optim.eps=1e-6",
        *([] if any(word.startswith("train.steps") for word in more) else [f"train.steps={STEPS}"]),
        *more,
    ]


def batches(job: Job, task: Any, *, dp_rank: int, dp: int) -> tuple[list[Any], list[Any]]:
    """(of each step, of an evaluation). The second half of the last step's rows have no label."""
    train, evaluated = batches_of(job, task, dp_rank=dp_rank, dp=dp)
    for place, batch in enumerate(train[-1]):
        if 2 * (dp_rank * len(train[-1]) + place) >= dp * len(train[-1]):
            batch.labels_BT.fill_(IGNORE_INDEX)
    return train, evaluated


def on_rank(argv: list[str], ranks: int) -> Outcome:
    """Train two steps, and evaluate."""
    return trained(argv, ranks, batches=batches)


ByHand = Callable[[Any, list[Any]], tuple[list[float], int]]


def in_one_process(argv: list[str]) -> Outcome:
    return by_transformers(argv, encoder=True, by_hand=by_hand)


def by_transformers(argv: list[str], *, encoder: bool, by_hand: ByHand) -> Outcome:
    """The same by transformers' own model; the sums without dropout, with its own loss, `by_hand`."""
    job = resolve(train_config(argv), world_size=1, here=False, data=None, task=None)
    config = job.config
    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    task: Any = engines.tasks.of(config, labels=len(LABELS), vocab=job.facts.vocab, encoder=encoder)
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
    outcome = Outcome([], [], [], [], {}, 0)

    def note(each: list[Any]) -> None:
        sums, count = by_hand(plain.worker, each)
        outcome.sums.append(sums)
        outcome.counts.append([count, count])

    for each in train:
        note(each)
        step = plain.step(each, lr=LR)
        outcome.losses.append(step.loss)
        outcome.norms.append(step.grad_norm)
        outcome.gradients = outcome.gradients or step.gradients
    note([batch for each in evaluated for batch in each])
    return outcome


@torch.no_grad()
def by_hand(model: Any, batches: list[Any]) -> tuple[list[float], int]:
    """([losses, right predictions], labels) by transformers, each text alone and without padding."""
    loss = right = count = 0.0
    model.eval()
    for batch in batches:
        for ids, labels, places in zip(
            batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, strict=True
        ):
            label, starts = labels[:1], (places == 0).nonzero().flatten().tolist()
            if int(label) != IGNORE_INDEX:
                length = starts[1] if len(starts) > 1 else len(ids)
                out = model(input_ids=ids[None, :length], labels=label)
                loss, right = loss + float(out.loss), right + float(out.logits.argmax(-1) == label)
                count += 1
    model.train()
    return [loss, right], int(count)
