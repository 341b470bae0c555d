"""Blends by weight, token files of other makers, and rows that know their documents."""

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain.config import schema
from hybridtrain.config.checks import check
from hybridtrain.data.blend import (
    BLOCK,
    Blend,
    largest_remainder,
    open_data,
    order_fingerprint,
    sample_to_row,
)
from hybridtrain.data.compatibility import check_vocab
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.errors import UserError
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch
from tests import runs

SEQ = 8
DTYPES = {"<u1": 1, "<i4": 4, "<i8": 5, "<u2": 8}


def foreign(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], *, dtype: str) -> Path:
    """Token files as Megatron lays them out, by struct alone: documents of sequences of ids."""
    sequences = [sequence for document in documents for sequence in document]
    sizes = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    width = np.dtype(dtype).itemsize
    pointers = (np.cumsum(sizes, dtype="<i8") - sizes) * width
    firsts = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".bin").write_bytes(
        b"".join(np.array(sequence, dtype=dtype).tobytes() for sequence in sequences)
    )
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, DTYPES[dtype], len(sequences), len(firsts))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        head + sizes.tobytes() + pointers.tobytes() + firsts.tobytes()
    )
    return prefix


def constant(prefix: Path, token: int, *, rows: int) -> Path:
    """A corpus of so many rows of SEQ, all of one token."""
    return foreign(prefix, [[[token] * (rows * SEQ + 1)]], dtype="<u2")


def plan(*, size: int, dp: int = 1) -> BatchPlan:
    return BatchPlan(micro_batch_size=1, seq_len=SEQ, grad_accum=size // dp, global_batch_size=size)


def loader(data: Blend, *, size: int, dp_rank: int = 0, dp: int = 1, vocab: int = 300) -> Loader:
    return Loader(
        data,
        plan=plan(size=size, dp=dp),
        dp_rank=dp_rank,
        dp_size=dp,
        seed=3,
        vocab=vocab,
        collate=CausalLM().collate,
    )


def opened(tmp_path: Path, **weights: float) -> Blend:
    return open_data(
        schema.DataConfig(blend={str(tmp_path / name): weight for name, weight in weights.items()}),
        timeout_s=0,
    )


# -- blends --------------------------------------------------------------------------------------------------


def test_ten_thousand_rows_hold_each_corpus_by_its_weight(tmp_path):
    weights, rows = {"a": 6.0, "b": 3.0, "c": 1.23456}, {"a": 700, "b": 50, "c": 5000}
    for token, name in enumerate(weights, start=1):
        constant(tmp_path / name, token, rows=rows[name])
    reading = loader(opened(tmp_path, **weights), size=1000)
    drawn_tokens = np.concatenate(
        [[int(batch.input_ids_BT[0, 0]) for batch in reading.micro_batches(step)] for step in range(20)]
    )
    for start in (0, BLOCK):
        counts = np.bincount(drawn_tokens[start : start + BLOCK], minlength=4)[1:]
        exact = np.array(list(weights.values())) / sum(weights.values()) * BLOCK
        assert np.abs(counts - exact).max() < 1
    halves = [
        np.bincount(drawn_tokens[start : start + 1000], minlength=4)[1] for start in range(0, 2 * BLOCK, 1000)
    ]
    # spread like random draws within a block
    assert max(abs(count - 586) for count in halves) < 5 * np.sqrt(1000 * 0.586 * 0.414)
    assert len(set(halves)) > 1


def test_each_corpus_runs_through_epochs_of_its_own():
    quotas, rows = np.array([7000, 3000]), [450, 2100]
    samples = sample_to_row(np.arange(4 * BLOCK), quotas=quotas, rows=rows, seed=1)
    for corpus, count in enumerate(rows):
        seen = samples[samples[:, 0] == corpus, 1]
        visits = np.bincount(seen, minlength=count)
        epochs = 4 * int(quotas[corpus]) / count
        assert visits.max() - visits.min() <= (1 if epochs != int(epochs) else 0)
        assert np.mean(seen[:-1] + 1 == seen[1:]) < 0.05  # shuffled
    assert np.array_equal(
        sample_to_row(np.arange(12345, 12400), quotas=quotas, rows=rows, seed=1), samples[12345:12400]
    )
    assert not np.array_equal(sample_to_row(np.arange(100), quotas=quotas, rows=rows, seed=2), samples[:100])


def test_cost_does_not_depend_on_the_sample():
    ids = sample_to_row(
        np.arange(10**15, 10**15 + 4096), quotas=np.array([9999, 1]), rows=[10**12, 10**13], seed=0
    )
    assert (ids[:, 1] < np.array([10**12, 10**13])[ids[:, 0]]).all()


def test_every_layout_and_a_resume_draw_the_same_rows(tmp_path):
    for token, name in enumerate("ab", start=1):
        constant(tmp_path / name, token, rows=40)
    data = opened(tmp_path, a=1.0, b=2.0)
    whole = loader(data, size=12)
    steps = [whole.row_ids(step) for step in range(5)]
    for dp in (2, 4):
        parts = [loader(data, size=12, dp_rank=rank, dp=dp).row_ids(4) for rank in range(dp)]
        assert np.array_equal(np.concatenate(parts), steps[4])
    ran = [torch.cat([batch.input_ids_BT for batch in whole.micro_batches(step)]) for step in range(5)]
    fresh = loader(data, size=12)
    assert torch.equal(torch.cat([batch.input_ids_BT for batch in fresh.micro_batches(4)]), ran[4])
    assert sum(len(rows) for rows in data.rows("train", seq_len=SEQ, vocab=300)) == 80


@pytest.mark.parametrize("seed", range(5))
def test_largest_remainder(seed):
    generator = np.random.default_rng(seed)
    weights = (generator.random(generator.integers(1, 12)) + 1e-3).tolist()
    total = int(generator.integers(1, 10_000))
    parts = largest_remainder(total, weights)
    assert sum(parts) == total
    assert (
        max(abs(part - total * weight / sum(weights)) for part, weight in zip(parts, weights, strict=True))
        < 1
    )
    assert largest_remainder(total, [8 * weight for weight in weights]) == parts


def test_fingerprint_is_of_tokens_and_shares_not_of_places(tmp_path):
    def fingerprint(folder: Path, a: float, b: float) -> str:
        return order_fingerprint(opened(folder, a=a, b=b), plan=plan(size=4), seed=0)

    for folder in (tmp_path / "here", tmp_path / "there"):
        constant(folder / "a", 1, rows=10)
        constant(folder / "b", 2, rows=30)
    base = fingerprint(tmp_path / "here", 1.0, 3.0)
    assert fingerprint(tmp_path / "there", 0.25, 0.75) == base
    assert fingerprint(tmp_path / "here", 1.0, 3.1) != base
    constant(tmp_path / "there" / "a", 3, rows=10)
    assert fingerprint(tmp_path / "there", 1.0, 3.0) != base


def test_a_weight_below_a_row_of_a_block_is_refused(tmp_path):
    for token, name in enumerate("ab", start=1):
        constant(tmp_path / name, token, rows=10)
    with pytest.raises(
        UserError,
        match=r"data\.blend=.*/b:1e-05: less than a row of 10,000\n  allowed: weights of 0\.00010.* or more",
    ):
        opened(tmp_path, a=1.0, b=1e-5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (schema.DataConfig(path="x", blend={"a": 1.0}), r"data\.path=x: data\.blend is set too"),
        (schema.DataConfig(blend={"a": 1.0, "b": 0.0}), r"data\.blend\.b=0\.0: out of range"),
        (schema.DataConfig(blend={"a": float("nan")}), r"data\.blend\.a=nan"),
    ],
)
def test_blends_that_mean_nothing_are_refused(data, words):
    config = schema.Config(data=data)
    config.train.steps = 1
    with pytest.raises(UserError, match=words):
        check(config)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("prepared"))


def test_corpora_of_different_tokenizers_are_refused(tmp_path, prepared):
    shutil.copytree(prepared, tmp_path / "same")
    both = schema.DataConfig(blend={str(prepared): 1.0, str(tmp_path / "same"): 1.0})
    assert open_data(both, timeout_s=0).count("train", seq_len=32) == 2 * open_data(
        schema.DataConfig(path=str(prepared)), timeout_s=0
    ).count("train", seq_len=32)
    tokenizer = tmp_path / "same" / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"ignore_merges"', '"ignore_merges "'))
    with pytest.raises(UserError, match=r"data\.blend=.*same: it was prepared with another tokenizer than"):
        open_data(both, timeout_s=0)


def test_evaluation_rows_come_from_all_corpora_in_proportion(tmp_path, prepared):
    shutil.copytree(prepared, tmp_path / "b")
    constant(tmp_path / "c", 9, rows=500)  # has no held-out rows
    data = open_data(
        schema.DataConfig(blend={str(prepared): 3.0, str(tmp_path / "b"): 1.0, str(tmp_path / "c"): 5.0}),
        timeout_s=0,
    )
    have = data.corpora[0].count("eval", seq_len=SEQ)
    steps = eval_batches(
        data,
        plan=plan(size=1),
        rows=40,
        dp_rank=0,
        dp_size=1,
        micro_batches_per_step=1,
        vocab=300,
        collate=CausalLM().collate,
    )
    got = torch.cat([batches[0].input_ids_BT for batches in steps]).numpy()
    tokens = np.fromfile(prepared / "eval.bin", dtype="<u2")
    expected = [
        tokens[row * SEQ : row * SEQ + SEQ] for count in (30, 10) for row in np.arange(count) * have // count
    ]
    assert np.array_equal(got, np.stack(expected))


def test_a_blend_trains_and_resumes(tmp_path, prepared):
    more = foreign(tmp_path / "more", [[list(range(1, 200))] for _ in range(20)], dtype="<i4")
    argv = runs.arguments(
        tmp_path / "whole",
        prepared,
        data__path="''",
        data__blend=f"{{{prepared}:0.7,{more}:0.3}}",
        train__eval_every=4,
    )
    runs.finished(2, argv)
    half = [word.replace("/whole", "/half") for word in argv]
    runs.finished(2, [*half, "train.steps=4"])
    runs.finished(2, half)
    assert runs.rows(tmp_path / "half") == runs.rows(tmp_path / "whole")
    assert "eval_loss" in runs.rows(tmp_path / "whole")[-1]
    from hybridtrain.cli.main import main

    assert main(["export", str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole" / "export" / "tokenizer.json").is_file()
    assert main(["evaluate", str(tmp_path / "whole"), "evaluate.rows=5"]) == 0
    assert json.loads((tmp_path / "whole" / "evaluation.json").read_text())["rows"] == 5


# -- token files of other makers -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_every_type_train_as_they_are(tmp_path, dtype):
    ids = np.arange(100).tolist()
    data = open_data(
        schema.DataConfig(path=str(foreign(tmp_path / "x.y", [[ids[:40]], [ids[40:]]], dtype=dtype))),
        timeout_s=0,
    )
    assert data.count("train", seq_len=SEQ) == 12
    reading = loader(data, size=12)
    rows = np.concatenate([batch.input_ids_BT.numpy() for batch in reading.micro_batches(0)])
    assert np.array_equal(np.sort(rows.reshape(-1)), np.arange(96))
    check_vocab(data, vocab=10)  # not known before the rows are read


@pytest.mark.parametrize(("token", "dtype"), [(300, "<u2"), (-1, "<i4")])
def test_ids_beyond_the_vocabulary_are_refused_before_they_are_used(tmp_path, token, dtype):
    ids = [5] * 200
    ids[150] = token
    data = open_data(
        schema.DataConfig(path=str(foreign(tmp_path / "mine", [[ids]], dtype=dtype))), timeout_s=0
    )
    with pytest.raises(
        UserError, match=rf"model\.config\.vocab_size=300: .*mine\.bin holds token id {token}"
    ):
        loader(data, size=24).micro_batches(0)


def test_a_run_on_foreign_files_with_others_to_evaluate_on(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, size=4000).tolist()
    train, held_out = (
        foreign(tmp_path / "train", [[ids]], dtype="<u2"),
        foreign(tmp_path / "test", [[ids[:500]]], dtype="<u2"),
    )
    ended = runs.on_ranks(1, runs.arguments(tmp_path / "none", train, train__eval_every=2, train__steps=2))
    assert "holds no held-out row" in runs.four_parts(ended.err, "train.eval_every")
    runs.finished(
        1,
        runs.arguments(
            tmp_path / "run", train, data__eval_path=held_out, train__eval_every=2, train__steps=2
        ),
    )
    assert "eval_loss" in runs.rows(tmp_path / "run")[-1]
    ended = runs.on_ranks(
        1, runs.arguments(tmp_path / "small", train, model__config__vocab_size=256, train__steps=8)
    )
    assert "holds token id" in runs.four_parts(ended.err, "model.config.vocab_size")


def test_the_fingerprint_of_foreign_files(tmp_path):
    def fingerprint(path: Path) -> str:
        return open_data(schema.DataConfig(path=str(path)), timeout_s=0).fingerprint

    first = constant(tmp_path / "a", 1, rows=10_000)
    base = fingerprint(first)
    assert fingerprint(constant(tmp_path / "moved" / "b", 1, rows=10_000)) == base
    assert fingerprint(constant(tmp_path / "c", 2, rows=10_000)) != base
    assert fingerprint(constant(tmp_path / "d", 1, rows=10_001)) != base


def test_a_prefix_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such pair of token files"):
        open_data(schema.DataConfig(path=str(tmp_path / "x")), timeout_s=0)
    (constant(tmp_path / "x", 1, rows=4)).with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"x\.bin: there is no such file"):
        open_data(schema.DataConfig(path=str(tmp_path / "x")), timeout_s=0)


# -- documents -----------------------------------------------------------------------------------------------


def expected_batch(tokens: np.ndarray, starts: set[int], row: int) -> tuple[list[int], list[int]]:
    """Positions and labels of a row, one token at a time."""
    positions, labels = [], []
    for at in range(row * SEQ, row * SEQ + SEQ):
        positions.append(0 if at in starts or at == row * SEQ else positions[-1] + 1)
        labels.append(IGNORE_INDEX if at + 1 in starts else int(tokens[at + 1]))
    return positions, labels


def test_positions_and_labels_follow_the_documents(tmp_path):
    """Documents of several sequences, an empty one, one that ends with a row and one that ends with
    a row's last label."""
    lengths = [[3], [2, 6], [5], [], [1], [7, 4, 1], [11], [0, 9], [8], [20]]
    count = iter(range(10**6))
    documents = [[[next(count) for _ in range(length)] for length in document] for document in lengths]
    path = foreign(tmp_path / "docs", documents, dtype="<i4")
    starts = set(np.cumsum([0, *(sum(document) for document in lengths)]).tolist())
    tokens = np.arange(sum(map(sum, lengths)))
    data = open_data(schema.DataConfig(path=str(path), document_mask=True), timeout_s=0)
    reading = loader(data, size=3)
    rows = reading.row_ids(0)[:, 1]
    for batch, row in zip(reading.micro_batches(0), rows, strict=True):
        positions, labels = expected_batch(tokens, starts, int(row))
        assert batch.packed
        assert batch.position_ids_BT[0].tolist() == positions
        assert batch.labels_BT[0].tolist() == labels
        assert batch.input_ids_BT[0].tolist() == tokens[row * SEQ : row * SEQ + SEQ].tolist()
    plain = loader(open_data(schema.DataConfig(path=str(path)), timeout_s=0), size=3).micro_batches(0)
    assert not any(batch.packed or (batch.labels_BT == IGNORE_INDEX).any() for batch in plain)


def test_every_token_but_the_first_of_a_document_or_row_is_predicted_once(tmp_path):
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 30, size=60)
    path = foreign(
        tmp_path / "docs",
        [[generator.integers(0, 250, size=length).tolist()] for length in lengths],
        dtype="<u2",
    )
    data = open_data(schema.DataConfig(path=str(path), document_mask=True), timeout_s=0)
    rows = data.count("train", seq_len=SEQ)
    batches: list[Batch] = [loader(data, size=1).micro_batches(step)[0] for step in range(rows)]
    labels = sum(int((batch.labels_BT != IGNORE_INDEX).sum()) for batch in batches)
    starts = np.cumsum(lengths)
    assert labels == rows * SEQ - int((starts <= rows * SEQ).sum())


def test_training_and_plain_transformers_evaluate_masked_rows_alike(tmp_path):
    """`evaluate` leaves it to transformers to find the documents in the positions."""
    from hybridtrain.cli.main import main

    documents = [
        [np.random.default_rng(number).integers(0, 300, size=5 + number).tolist()] for number in range(40)
    ]
    train, held_out = (
        foreign(tmp_path / "train", documents, dtype="<u2"),
        foreign(tmp_path / "test", documents[:20], dtype="<u2"),
    )
    options = {"data__eval_path": held_out, "train__eval_every": 2, "train__steps": 2, "parallel": "tp2"}
    runs.finished(2, runs.arguments(tmp_path / "run", train, data__document_mask="true", **options))
    assert main(["export", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    masked = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert masked["tokens"] == masked["rows"] * 32 - sum(
        end <= masked["rows"] * 32 for end in np.cumsum([len(d[0]) for d in documents[:20]])
    )
    assert masked["loss"] == pytest.approx(runs.rows(tmp_path / "run")[-1]["eval_loss"], rel=1e-5)
