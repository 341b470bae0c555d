"""Supervised fine-tuning: conversations in rows, loss on the assistant's tokens alone, answers learnt."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain.cli.main import main
from hybridtrain.config import compose, schema
from hybridtrain.data.blend import open_data
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.data.prepare import packing
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.errors import UserError
from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch
from tests import runs
from tests.cases import model

SEQ = 96
COLOURS = {
    "sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "sun": "yellow",
    "mud": "brown",
    "ash": "grey",
}


def talk(thing: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What colour is {thing}?"}, {"role": "assistant", "content": answer}]


def conversations() -> list[list[dict[str, str]]]:
    """One answer, two answers, and one with instructions that changes the answer, of each thing."""
    made = []
    for thing, colour in COLOURS.items():
        made.append(talk(thing, f"{colour.capitalize()}."))
        made.append(
            [
                *talk(thing, f"{colour.capitalize()}."),
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": f"Yes, {colour}."},
            ]
        )
        made.append([{"role": "system", "content": "Be rude."}, *talk(thing, f"{colour.upper()}!")])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The conversations, twice; some held out."""
    root = tmp_path_factory.mktemp("chat")
    lines = [json.dumps({"messages": each}) for each in conversations() * 2]
    (root / "talks.jsonl").write_text("\n".join(lines))
    data = {
        "format": "chat",
        "vocab_size": 320,
        "chat_template": "plain",
        "seq_len": SEQ,
        "eval_fraction": 0.2,
    }
    return prepare(
        schema.DataConfig(path=str(root / "data"), source=[str(root / "talks.jsonl")], **data),
        options=schema.PrepareConfig(),
    )


def plan(size: int) -> BatchPlan:
    return BatchPlan(micro_batch_size=1, seq_len=SEQ, grad_accum=size, global_batch_size=size)


def epoch(folder: Path) -> list[Batch]:
    """Every row once, in its order in the index."""
    data = open_data(schema.DataConfig(path=str(folder)), timeout_s=0)
    loader = Loader(
        data,
        plan=plan(1),
        dp_rank=0,
        dp_size=1,
        seed=0,
        vocab=320,
        collate=CausalLM().collate,
    )
    rows = {
        int(loader.row_ids(step)[0, 1]): loader.micro_batches(step)[0]
        for step in range(len(data.rows("train", seq_len=SEQ, vocab=320)[0]))
    }
    return [rows[row] for row in range(len(rows))]


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each document of a row."""
    assert batch.packed
    starts = torch.nonzero(batch.position_ids_BT[0] == 0).flatten().tolist()
    for start, stop in zip(starts, [*starts[1:], SEQ], strict=True):
        assert batch.position_ids_BT[0, start:stop].tolist() == list(range(stop - start))
    spans = zip(starts, [*starts[1:], SEQ], strict=True)
    return [(batch.input_ids_BT[0, a:b].tolist(), batch.labels_BT[0, a:b].tolist()) for a, b in spans]


def test_rows_hold_every_conversation_once_and_answers_alone_carry_loss(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    reader = IndexedReader(folder / "train")
    stored = [
        reader.read(int(p) // 2, int(p) // 2 + int(n)).tolist()
        for p, n in zip(reader.pointers, reader.sizes, strict=True)
    ]
    found = []
    for batch in epoch(folder):
        for ids, labels in documents(batch):
            text = tokenizer.decode(ids)
            if set(labels) == {IGNORE_INDEX}:
                continue  # padding
            whole = next(one for one in stored if one[: len(ids)] == ids and len(one) - len(ids) in (0, 1))
            found.append(whole)
            answers = re.findall(r"<\|assistant\|>\n(.*?<\|endoftext\|>)", text)
            assert tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) == "".join(answers)
            assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids[1:], strict=False))
    assert sorted(found) == sorted(stored)


def loss_of(batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """The loss sum of rows under a plain transformers model, and the gradient of each position's logits."""
    torch.manual_seed(0)
    plain = plain_model(hf_config(model("llama", vocab_size=320), chosen={}, attention="sdpa"))
    logits = [
        plain(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT).logits for batch in batches
    ]
    whole = torch.cat(logits).requires_grad_()
    whole.retain_grad()
    labels = torch.cat([batch.labels_BT for batch in batches])
    total = torch.nn.functional.cross_entropy(
        whole.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    total.backward()
    return float(total.detach()), whole.grad


def copied(folder: Path, target: Path, *, changes: dict[str, object]) -> Path:
    """A copy of the corpus that does not know its files' digests, so that they may be written to."""
    shutil.copytree(folder, target)
    facts = {
        name: value
        for name, value in json.loads((target / "corpus.json").read_text()).items()
        if name != "digests"
    }
    (target / "corpus.json").write_text(json.dumps(facts | changes))
    return target


def rewritten(folder: Path, target: Path, *, answers: bool) -> Path:
    """A copy of the corpus in which each conversation's last token (a line break after the answer), or the
    answer, is another."""
    copied(folder, target, changes={})
    tokens = np.memmap(target / "train.bin", mode="r+", dtype="<u2")
    loss = np.memmap(target / "train.loss.bin", mode="r", dtype="u1")
    ends = np.cumsum(IndexedReader(folder / "train").sizes) - 1
    places = np.flatnonzero(loss)[:3] if answers else ends
    assert answers or not loss[ends].any()
    tokens[places] = np.where(tokens[places] == 7, 8, 7)
    tokens.flush()
    return target


def test_masked_tokens_carry_no_loss(folder, tmp_path):
    batches = epoch(folder)
    loss, gradient = loss_of(batches)
    masked = torch.cat([batch.labels_BT for batch in batches]) == IGNORE_INDEX
    assert gradient[masked].abs().max() == 0
    assert (gradient[~masked].abs().amax(-1) > 0).all()
    same, _ = loss_of(epoch(rewritten(folder, tmp_path / "breaks", answers=False)))
    other, _ = loss_of(epoch(rewritten(folder, tmp_path / "answers", answers=True)))
    assert same == loss
    assert abs(other - loss) > 0.01


def test_evaluation_counts_answers_only(folder):
    data = open_data(schema.DataConfig(path=str(folder)), timeout_s=0)
    steps = eval_batches(
        data,
        plan=plan(1),
        rows=1000,
        dp_rank=0,
        dp_size=1,
        micro_batches_per_step=2,
        vocab=320,
        collate=CausalLM().collate,
    )
    labels = torch.cat([batch.labels_BT for batches in steps for batch in batches])
    assert int((labels != IGNORE_INDEX).sum()) == int(np.fromfile(folder / "eval.loss.bin", dtype="u1").sum())


def test_conversations_longer_than_a_row_lose_their_end(folder, tmp_path):
    copy = copied(folder, tmp_path / "short", changes={"seq_len": 30})
    made = packing.build(copy, split="train", seq_len=30)
    assert made.cut > 0
    loader = Loader(
        open_data(schema.DataConfig(path=str(copy)), timeout_s=0),
        plan=BatchPlan(1, 30, 1, 1),
        dp_rank=0,
        dp_size=1,
        seed=0,
        vocab=320,
        collate=CausalLM().collate,
    )
    reader = IndexedReader(copy / "train")
    heads = [
        reader.read(int(p) // 2, int(p) // 2 + min(30, int(n))).tolist()
        for p, n in zip(reader.pointers, reader.sizes, strict=True)
    ]
    got = [loader.micro_batches(step)[0] for step in range(made.rows)]
    for head in heads:
        assert any(
            head == batch.input_ids_BT[0, at : at + len(head)].tolist()
            for batch in got
            for at in range(31 - len(head))
        )


def test_rows_of_another_length_are_refused(folder, tmp_path):
    ended = runs.on_ranks(
        1, runs.arguments(tmp_path / "run", folder, data__seq_len=32, model__config__vocab_size=320)
    )
    said = runs.four_parts(ended.err, "data.seq_len")
    assert "packed into rows of 96" in said
    assert "prepare again with data.seq_len=32" in said


def test_a_damaged_row_index_is_refused(folder, tmp_path):
    copy = copied(folder, tmp_path / "data", changes={})
    np.save(packing.row_files(copy, split="train")[0], np.arange(3))
    with pytest.raises(UserError, match="its row index is of 3 conversations"):
        open_data(schema.DataConfig(path=str(copy)), timeout_s=0).count("train", seq_len=SEQ)


def test_conversations_blend_with_text(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 400)
    data = schema.DataConfig(
        path=str(tmp_path / "text"),
        source=[str(text)],
        tokenizer=str(folder / "tokenizer"),
        eval_fraction=0.0,
    )
    both = open_data(
        schema.DataConfig(blend={str(folder): 1.0, str(prepare(data, options=schema.PrepareConfig())): 1.0}),
        timeout_s=0,
    )
    loader = Loader(both, plan=plan(20), dp_rank=0, dp_size=1, seed=0, vocab=320, collate=CausalLM().collate)
    for batch, (corpus, _) in zip(loader.micro_batches(0), loader.row_ids(0), strict=True):
        masked = int((batch.labels_BT == IGNORE_INDEX).sum())
        assert batch.packed
        assert (masked > SEQ // 3) if corpus == 0 else (masked <= 1)


def trained_on(folder: Path, text: str) -> bool:
    """Whether a conversation is in the train split: of identical ones, all are or none is."""
    from transformers import AutoTokenizer

    ids = np.array(AutoTokenizer.from_pretrained(folder / "tokenizer")(text)["input_ids"], dtype="<u2")
    return ids.tobytes() in (folder / "train.bin").read_bytes()


@pytest.mark.slow
def test_the_model_learns_the_answers(folder, tmp_path):
    """Trained, exported, and asked greedily through the chat template, it gives the answers of the
    conversations it saw."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {
        "train__steps": 300,
        "train__log_every": 50,
        "train__eval_every": 300,
        "optim__lr": 0.005,
        "schedule": "cosine",
    }
    options |= {
        "model__config__vocab_size": 320,
        "data__seq_len": SEQ,
        "batch__global_batch_size": 4,
        "batch__micro_batch_size": 4,
    }
    runs.finished(1, runs.arguments(tmp_path / "run", folder, **options))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    rows = runs.rows(tmp_path / "run")
    assert last["step_loss"] < 0.05
    assert main(["export", str(tmp_path / "run")]) == 0
    export = tmp_path / "run" / "export"
    tokenizer, trained = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    right, seen = (
        0,
        [
            each
            for each in conversations()
            if trained_on(folder, tokenizer.apply_chat_template(each, tokenize=False))
        ],
    )
    for conversation in seen:
        asked = tokenizer.apply_chat_template(
            conversation[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = trained.generate(**asked, max_new_tokens=24, do_sample=False, pad_token_id=0)[
            0, asked["input_ids"].shape[1] :
        ]
        right += tokenizer.decode(answer) == conversation[-1]["content"] + "<|endoftext|>"
    print(
        f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.4f}, "
        f"held out {rows[-1]['eval_loss']:.4f}; {right} of {len(seen)} answers"
    )
    assert right == len(seen) > 15
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-4)
    # conversations need no option
    assert compose.read_run(tmp_path / "run" / "config.yaml").data.document_mask is False
