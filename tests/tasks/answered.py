"""Small encoders that find answers in contexts: their data, and what transformers' own model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.models.heads import arguments_of
from hybridtrain.types import IGNORE_INDEX
from tests.tasks import classified, encoders, tagged
from tests.tasks.encoders import Outcome

SEQ, VOCAB = 24, tagged.VOCAB
MODELS = tagged.MODELS


def records(count: int) -> list[dict[str, Any]]:
    """Some contexts are longer than a row; the answer is the number after the name that is asked for."""
    found = []
    for number in range(count):
        names = [f"n{(number + place) % 7}" for place in range(3 + 12 * (number % 10 == 7))]
        context = " ".join(f"{name} {number * place % 89}" for place, name in enumerate(names))
        asked = number % 3
        start = len(" ".join(context.split(" ")[: 2 * asked + 1])) + 1
        answer = context.split(" ")[2 * asked + 1]
        found.append({"question": names[asked], "context": context, "answer": answer, "answer_start": start})
    return found


def corpus(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records(120)))
    data = schema.DataConfig(
        path=str(folder / "data"), source=[str(folder / "answers.jsonl")], vocab_size=VOCAB, eval_fraction=0.2
    )
    data.format, data.seq_len, data.encoder_tokens = "answers", SEQ, True
    return prepare(data, options=schema.PrepareConfig())


def words(name: str, folder: Path, *more: str) -> list[str]:
    """A command line of training."""
    rest = [word for word in tagged.words("bert", folder, *more) if not word.startswith(("task=", "++model"))]
    return ["task=question_answering", MODELS[name], *rest]


@torch.no_grad()
def by_hand(model: Any, batches: list[Any]) -> tuple[list[float], list[int]]:
    """([losses, rows of which both tokens are found], rows) by transformers, each row without its padding."""
    loss = exact = count = 0.0
    model.eval()
    for batch in batches:
        for place, labels in enumerate(batch.labels_BT):
            row = batch.rows(place, place + 1)
            starts = (row.position_ids_BT[0] == 0).nonzero().flatten().tolist()
            length = starts[1] if len(starts) > 1 else len(labels)
            more = {name: value[:, :length] for name, value in arguments_of(model, row).items()}
            first, last = labels[:1], labels[1:2]
            if int(first) != IGNORE_INDEX:
                out = model(
                    input_ids=row.input_ids_BT[:, :length], start_positions=first, end_positions=last, **more
                )
                loss, count = loss + float(out.loss), count + 1
                exact += float((out.start_logits.argmax(-1) == first) & (out.end_logits.argmax(-1) == last))
    model.train()
    return [loss, exact], [int(count)] * 2


def in_one_process(argv: list[str]) -> Outcome:
    return encoders.in_one_process(argv, encoder=True, batches=classified.batches, by_hand=by_hand)
