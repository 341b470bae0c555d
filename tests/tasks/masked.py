"""A small BERT, a corpus with sentences, and steps of both on real ranks and in one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from tests.tasks import encoders
from tests.tasks.encoders import LR, NO_DROPOUT, STEPS, Outcome, batches_of, trained

SEQ, VOCAB = 32, 320
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
        *([] if any(word.startswith("train.steps") for word in more) else [f"train.steps={STEPS}"]),
        *(["task.next_sentence=true"] if name == "bert" else []),
        *more,
    ]


def on_rank(argv: list[str], ranks: int) -> Outcome:
    """Train, and evaluate."""
    return trained(argv, ranks, batches=batches_of)


def in_one_process(argv: list[str]) -> Outcome:
    """The same by transformers' own model: the mean of masked tokens, and that of rows."""
    return encoders.in_one_process(argv, encoder=True, batches=batches_of, by_hand=_by_hand)


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
