"""Small encoders that classify texts: their data, and steps on real ranks and by transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.training.job import Job
from hybridtrain.types import IGNORE_INDEX
from tests.tasks import encoders
from tests.tasks.encoders import LR, NO_DROPOUT, STEPS, Outcome, batches_of, trained

SEQ, VOCAB, LABELS = 16, 300, ["low", "middle", "high"]
SIZES = (
    f"vocab_size:{VOCAB},hidden_size:32,num_hidden_layers:3,num_attention_heads:4,intermediate_size:48,"
    f"max_position_embeddings:24,initializer_range:0.1,{NO_DROPOUT}"
)
MODELS = {
    "bert": f"++model.config={{model_type:bert,{SIZES}}}",
    "roberta": f"++model.config={{model_type:roberta,pad_token_id:0,{SIZES}}}",
}


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
    """Train, and evaluate."""
    return trained(argv, ranks, batches=batches)


def in_one_process(argv: list[str]) -> Outcome:
    """The same by transformers' own model."""
    return encoders.in_one_process(argv, encoder=True, batches=batches, by_hand=_by_hand)


@torch.no_grad()
def _by_hand(model: Any, batches: list[Any]) -> tuple[list[float], list[int]]:
    """([losses, right predictions], labels for both) by transformers, each text alone and without padding."""
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
    return [loss, right], [int(count)] * 2
