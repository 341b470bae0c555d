"""Small models that classify the words of texts: their data, and steps on real ranks and by transformers' own
model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.types import IGNORE_INDEX, TokenBatch
from tests.tasks import classified, encoders
from tests.tasks.encoders import Outcome

SEQ, VOCAB, LABELS = 24, 300, ["other", "number", "name"]
SIZES = f"vocab_size:{VOCAB},hidden_size:32,num_hidden_layers:3,num_attention_heads:4,intermediate_size:48"
MODELS = {
    **{name: words.replace("embeddings:24", "embeddings:32") for name, words in classified.MODELS.items()},
    "llama": f"++model.config={{model_type:llama,num_key_value_heads:2,{SIZES},max_position_embeddings:32,"
    "initializer_range:0.1,classifier_dropout:0.0}",
    "gpt2": f"++model.config={{model_type:gpt2,vocab_size:{VOCAB},n_embd:32,n_layer:3,n_head:4,"
    "n_positions:32,resid_pdrop:0.0,embd_pdrop:0.0,attn_pdrop:0.0,classifier_dropout:0.0,initializer_range:0.1}",
}


def records(count: int) -> list[dict[str, list[Any]]]:
    """Words of which the class follows from themselves and the word before; labels are names or numbers."""
    found = []
    for number in range(count):
        words = ["Row"] + [
            f"{number * place % 97}" for place in range(1, number % 6 + 1 + 20 * (number % 20 == 9))
        ]
        tags = [0] + [1] * (len(words) - 1)
        words += ["of", f"Name{number % 5}"]
        tags += [0, 2]
        label = [LABELS[tag] if number % 2 else tag for tag in tags]
        found.append({"text": words, "label": label})
    return found


def corpus(folder: Path, *, encoder: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records(120)))
    data = schema.DataConfig(
        path=str(folder / "data"), source=[str(folder / "words.jsonl")], vocab_size=VOCAB, eval_fraction=0.2
    )
    data.format, data.labels, data.seq_len, data.encoder_tokens = "labelled_words", LABELS, SEQ, encoder
    return prepare(data, options=schema.PrepareConfig())


def words(name: str, folder: Path, *more: str) -> list[str]:
    """A command line of training."""
    return [
        "task=token_classification",
        MODELS[name],
        *[
            each
            for each in classified.words("bert", folder, *more)
            if not each.startswith(("task=", "++model", "data.seq_len"))
        ],
        *([] if any(word.startswith("data.seq_len") for word in more) else [f"data.seq_len={SEQ}"]),
    ]


def in_one_process(argv: list[str], *, encoder: bool) -> Outcome:
    return encoders.in_one_process(argv, encoder=encoder, batches=classified.batches, by_hand=_by_hand)


@torch.no_grad()
def _by_hand(model: Any, batches: list[Any]) -> tuple[list[float], list[int]]:
    """([losses, right predictions], labels for both) by transformers, each text alone and without padding."""
    loss = right = count = 0.0
    model.eval()
    for batch in batches:
        for ids, labels, places in zip(
            batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT, strict=True
        ):
            bounds = [*(places == 0).nonzero().flatten().tolist(), len(ids)]
            texts = bounds[:2] if isinstance(batch, TokenBatch) else bounds  # what follows is padding
            for start, stop in itertools.pairwise(texts):
                here = labels[start:stop]
                some = int((here != IGNORE_INDEX).sum())
                if some:
                    out = model(input_ids=ids[None, start:stop], labels=here[None])
                    loss += float(out.loss) * some
                    right += float((out.logits.argmax(-1) == here).sum())
                    count += some
    model.train()
    return [loss, right], [int(count)] * 2
