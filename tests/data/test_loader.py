"""The loader: the same global batch under every layout, exact evaluation rows, and
corpora that are not fit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data import order
from hybridtrain.data.blend import Blend, open_data, order_fingerprint
from hybridtrain.data.compatibility import check_vocab
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.indexed import IndexedReader
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.data.prepare import tokenize
from hybridtrain.errors import UserError
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.runtime import hashing
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch

SEQ = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The json package of the standard library, one file or more of it held out."""
    source = Path(json.__file__).parent
    data = DataConfig(
        path=str(tmp_path_factory.mktemp("json") / "data"),
        source=[str(source)],
        pattern="*.py",
        vocab_size=300,
        eval_fraction=0.2,
    )
    return tokenize.prepare(data, options=PrepareConfig())


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    return Corpus.open(folder)


@pytest.fixture(scope="module")
def data(folder) -> Blend:
    return open_data(DataConfig(path=str(folder)), timeout_s=0)


def plan(*, global_batch_size: int, micro_batch_size: int, dp: int) -> BatchPlan:
    return BatchPlan(
        micro_batch_size=micro_batch_size,
        seq_len=SEQ,
        grad_accum=global_batch_size // micro_batch_size // dp,
        global_batch_size=global_batch_size,
    )


def rows_of(batches: list[Batch]) -> np.ndarray:
    """Inputs and the last label of each row, (n, S + 1), after checking the batches' own consistency."""
    out = []
    for batch in batches:
        assert batch.input_ids_BT.dtype == batch.labels_BT.dtype == batch.position_ids_BT.dtype == torch.int64
        assert torch.equal(batch.labels_BT[:, :-1], batch.input_ids_BT[:, 1:])
        assert torch.equal(batch.position_ids_BT, torch.arange(SEQ).expand(len(batch.input_ids_BT), SEQ))
        assert batch.input_ids_BT.is_contiguous()
        assert batch.labels_BT.is_contiguous()
        out.append(torch.cat([batch.input_ids_BT, batch.labels_BT[:, -1:]], dim=1).numpy())
    return np.concatenate(out)


def expected_rows(corpus: Corpus, split: str, row_ids: np.ndarray) -> np.ndarray:
    """Straight from the file, by numpy alone."""
    tokens = np.fromfile(corpus.path / f"{split}.bin", dtype=np.uint16).astype(np.int64)
    return np.stack([tokens[row * SEQ : row * SEQ + SEQ + 1] for row in row_ids])


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_same_global_batch_under_every_layout(corpus, data, dp, micro_batch_size):
    size = 24
    shape = plan(global_batch_size=size, micro_batch_size=micro_batch_size, dp=dp)
    loaders = [
        Loader(data, plan=shape, dp_rank=rank, dp_size=dp, seed=7, vocab=300, collate=CausalLM().collate)
        for rank in range(dp)
    ]
    rows = corpus.count("train", seq_len=SEQ)
    assert [len(each) for each in data.rows("train", seq_len=SEQ, vocab=300)] == [rows]
    for step in (0, 1, 2, rows // size, 40, 3):  # in order, over the epoch's edge, far on and back
        parts, keys = [], []
        for loader in loaders:
            batches = loader.micro_batches(step)
            assert [batch.input_ids_BT.shape for batch in batches] == [
                (micro_batch_size, SEQ)
            ] * shape.grad_accum
            parts.append(rows_of(batches))
            keys += [batch.keys_B for batch in batches]
        samples = np.arange(step * size, step * size + size)
        expected = hashing.keys(samples, name="hybridtrain samples 7").view(np.int64)
        assert torch.cat(keys).tolist() == expected.tolist()
        ids = order.row_ids(samples, rows=rows, seed=7)
        assert np.array_equal(np.concatenate([loader.row_ids(step)[:, 1] for loader in loaders]), ids)
        assert np.array_equal(np.concatenate(parts), expected_rows(corpus, "train", ids))


def test_what_is_left_out_is_left_out_from_the_next_step_on(corpus, data):
    """Also of batches that are made ahead. A data rank's rows are known by their place in a micro-batch."""
    shape, rows = plan(global_batch_size=8, micro_batch_size=2, dp=2), corpus.count("train", seq_len=SEQ)
    loader = Loader(data, plan=shape, dp_rank=1, dp_size=2, seed=7, vocab=300, collate=CausalLM().collate)
    loader.micro_batches(0)
    loader.leave_out(8)
    ids = order.row_ids(np.arange(2 * 8 + 4, 3 * 8), rows=rows, seed=7)
    assert np.array_equal(rows_of(loader.micro_batches(1)), expected_rows(corpus, "train", ids))
    sizes = corpus.readers["train"].sizes
    starts = np.cumsum(sizes) - sizes
    for place, (name, row, documents) in enumerate(loader.sources(1, micro_batch=1, rows=[0, 1])):
        assert (name, row) == (str(corpus.path), ids[2 + place])
        inside = (starts < (row + 1) * SEQ + 1) & (starts + sizes > row * SEQ)
        assert documents == np.flatnonzero(inside).tolist()


def test_an_epoch_predicts_every_token_once(corpus, data):
    rows = corpus.count("train", seq_len=SEQ)
    loader = Loader(
        data,
        plan=plan(global_batch_size=1, micro_batch_size=1, dp=1),
        dp_rank=0,
        dp_size=1,
        seed=0,
        vocab=300,
        collate=CausalLM().collate,
    )
    labels = torch.cat([loader.micro_batches(step)[0].labels_BT for step in range(rows)])
    tokens = np.fromfile(corpus.path / "train.bin", dtype=np.uint16)[1 : rows * SEQ + 1]
    assert np.array_equal(np.sort(labels.numpy(), axis=None), np.sort(tokens.astype(np.int64)))


def test_fingerprint_names_the_order(data):
    def fingerprint(*, size: int, micro: int, dp: int, seed: int) -> str:
        return order_fingerprint(
            data, plan=plan(global_batch_size=size, micro_batch_size=micro, dp=dp), seed=seed
        )

    base = fingerprint(size=8, micro=1, dp=1, seed=0)
    assert base == fingerprint(size=8, micro=2, dp=4, seed=0)
    assert (
        len({base, fingerprint(size=16, micro=1, dp=1, seed=0), fingerprint(size=8, micro=1, dp=1, seed=1)})
        == 3
    )


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize(("micro_batch_size", "per_step"), [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_evaluation_rows_are_exact(corpus, data, dp, micro_batch_size, per_step, rows):
    shape = plan(global_batch_size=micro_batch_size * dp, micro_batch_size=micro_batch_size, dp=dp)
    have = corpus.count("eval", seq_len=SEQ)
    ranks = [
        eval_batches(
            data,
            plan=shape,
            rows=rows,
            dp_rank=rank,
            dp_size=dp,
            micro_batches_per_step=per_step,
            vocab=300,
            collate=CausalLM().collate,
        )
        for rank in range(dp)
    ]
    assert {len(steps) for steps in ranks} == {-(-rows // (micro_batch_size * per_step * dp))}
    seen = []
    for step in zip(*ranks, strict=True):
        for batches in step:
            assert [batch.labels_BT.shape for batch in batches] == [(micro_batch_size, SEQ)] * per_step
            for batch in batches:
                valid = (batch.labels_BT != IGNORE_INDEX).all(dim=1)
                assert torch.equal(valid, (batch.labels_BT != IGNORE_INDEX).any(dim=1))
                seen.append(torch.cat([batch.input_ids_BT, batch.labels_BT[:, -1:]], dim=1)[valid].numpy())
    assert np.array_equal(np.concatenate(seen), expected_rows(corpus, "eval", np.arange(rows) * have // rows))


def test_evaluation_on_fewer_rows_than_asked(corpus, data):
    have = corpus.count("eval", seq_len=SEQ)
    steps = eval_batches(
        data,
        plan=plan(global_batch_size=4, micro_batch_size=4, dp=1),
        rows=10**6,
        dp_rank=0,
        dp_size=1,
        micro_batches_per_step=2,
        vocab=300,
        collate=CausalLM().collate,
    )
    labels = torch.cat([batch.labels_BT for batches in steps for batch in batches])
    assert int((labels != IGNORE_INDEX).sum()) == have * SEQ
    assert len(steps) == -(-have // 8)


def test_evaluation_without_a_row_is_refused(data):
    long = BatchPlan(micro_batch_size=1, seq_len=10**6, grad_accum=1, global_batch_size=1)
    with pytest.raises(UserError, match=r"train\.eval_rows=8: .*no held-out row of 1000000 tokens"):
        eval_batches(
            data,
            plan=long,
            rows=8,
            dp_rank=0,
            dp_size=1,
            micro_batches_per_step=1,
            vocab=300,
            collate=CausalLM().collate,
        )


def test_rows_longer_than_the_corpus_are_refused(data):
    long = BatchPlan(micro_batch_size=1, seq_len=10**6, grad_accum=1, global_batch_size=1)
    with pytest.raises(UserError, match=r"data\.seq_len=1000000: .*fewer than one row"):
        Loader(data, plan=long, dp_rank=0, dp_size=1, seed=0, vocab=300, collate=CausalLM().collate)


def test_vocabulary_of_the_model(corpus, data):
    check_vocab(data, vocab=corpus.largest_id + 1)
    with pytest.raises(
        UserError,
        match=(
            rf"model\.config\.vocab_size={corpus.largest_id}: .*"
            rf"token id {corpus.largest_id}[\s\S]*vocab_size=300"
        ),
    ):
        check_vocab(data, vocab=corpus.largest_id)


def edit(folder: Path, **changes: object) -> None:
    facts = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(facts | changes))


def swap(folder: Path) -> None:
    for end in ("bin", "idx"):
        shutil.copy(folder / f"eval.{end}", folder / f"train.{end}")


UNFIT = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "not prepared": (
        lambda p: [path.unlink() for path in p.iterdir() if path.is_file()],
        "holds no prepared corpus",
    ),
    "token files only": (
        lambda p: (p / "corpus.json").unlink(),
        "token files from elsewhere are named by their prefix: data.path=",
    ),
    "cut corpus.json": (
        lambda p: (p / "corpus.json").write_text('{"format": 1, "spl'),
        "corpus.json cannot be read",
    ),
    "other corpus.json": (
        lambda p: (p / "corpus.json").write_text('{"name": "mine"}'),
        "corpus.json lacks 'format'",
    ),
    "no counts": (lambda p: edit(p, splits={}), "corpus.json lacks 'train'"),
    "of another version": (lambda p: edit(p, format=99), "it has format 99, this version reads 2"),
    "truncated bin": (
        lambda p: os.truncate(p / "train.bin", 100),
        "train.bin: it has 100 bytes but its index describes",
    ),
    "empty bin": (lambda p: os.truncate(p / "eval.bin", 0), "eval.bin: the file is empty"),
    "missing idx": (lambda p: (p / "eval.idx").unlink(), "eval.idx: there is no such file"),
    "truncated idx": (lambda p: os.truncate(p / "train.idx", 50), "train.idx: it is truncated"),
    "files of another corpus": (swap, "corpus.json says"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_corpora_are_refused(tmp_path, folder, case):
    copy = Path(shutil.copytree(folder, tmp_path / "data"))
    spoil, message = UNFIT[case]
    spoil(copy)
    with pytest.raises(UserError, match=r"^data\.path=") as error:
        Corpus.open(copy)
    assert message in str(error.value)
    assert f"hybridtrain prepare data.path={copy}" in str(error.value)


def test_opening_reads_metadata_only(tmp_path, folder):
    """A sparse .bin of 64 GiB opens at once, and one row of it reads one row."""
    copy = Path(shutil.copytree(folder, tmp_path / "data"))
    tokens = 1 << 30
    idx = bytearray((copy / "train.idx").read_bytes()[:18])
    idx += (32).to_bytes(8, "little") + (33).to_bytes(8, "little") + np.full(32, tokens, "<i4").tobytes()
    idx += (np.arange(32, dtype="<i8") * tokens * 2).tobytes() + np.arange(33, dtype="<i8").tobytes()
    (copy / "train.idx").write_bytes(idx)
    os.truncate(copy / "train.bin", 32 * tokens * 2)
    edit(
        copy,
        splits={"train": {"documents": 32, "tokens": 32 * tokens}, "eval": {"documents": 0, "tokens": 0}},
        digests=None,
    )
    opened = open_data(DataConfig(path=str(copy)), timeout_s=0)
    assert opened.count("train", seq_len=SEQ) == (32 * tokens - 1) // SEQ
    loader = Loader(
        opened,
        plan=plan(global_batch_size=4, micro_batch_size=2, dp=1),
        dp_rank=0,
        dp_size=1,
        seed=0,
        vocab=300,
        collate=CausalLM().collate,
    )
    assert loader.micro_batches(10**6)[1].input_ids_BT.shape == (2, SEQ)


def test_a_corpus_is_checked_without_torch(folder):
    program = f"""
import sys
from hybridtrain.config.schema import DataConfig
from hybridtrain.data.blend import open_data
open_data(DataConfig(path={str(folder)!r}), timeout_s=0)
sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_attributes(corpus, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir)
    assert corpus.vocab_size == len(tokenizer) == 300
    assert corpus.eos_id == tokenizer.eos_token_id
    assert corpus.path == folder
    reader = IndexedReader(folder / "train")
    assert corpus.count("train", seq_len=SEQ) == (reader.tokens - 1) // SEQ
