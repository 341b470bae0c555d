"""Token files: the bytes are Megatron's, and damaged files are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.data import indexed
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.indexed import IndexedReader, IndexedWriter, file_pair, token_dtype
from hybridtrain.data.rows import TextRows, count_rows
from hybridtrain.errors import UserError

DOCUMENTS = [[5, 6, 7], [65000], [1, 2, 3, 4, 9, 0]]


def write(prefix: Path, documents: list[list[int]], *, vocab_size: int) -> Path:
    with IndexedWriter(prefix, dtype=token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add(np.array(document))
    return prefix


def read_by_the_specification(prefix: Path) -> tuple[np.dtype, list[list[int]]]:
    """A reader of its own, after the layout in Megatron-LM's indexed_dataset.py."""
    idx = prefix.with_name(prefix.name + ".idx").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", idx[9:17])
    assert version == 1
    dtype = np.dtype({4: np.int32, 8: np.uint16}[idx[17]])
    sequences, boundaries = struct.unpack("<QQ", idx[18:34])
    sizes = struct.unpack(f"<{sequences}i", idx[34 : 34 + 4 * sequences])
    pointers = struct.unpack(f"<{sequences}q", idx[34 + 4 * sequences : 34 + 12 * sequences])
    assert struct.unpack(f"<{boundaries}q", idx[34 + 12 * sequences :]) == tuple(range(sequences + 1))
    tokens = prefix.with_name(prefix.name + ".bin").read_bytes()
    return dtype, [
        np.frombuffer(tokens, dtype, size, pointer).tolist()
        for size, pointer in zip(sizes, pointers, strict=True)
    ]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_files_are_megatrons(tmp_path, vocab_size, dtype):
    prefix = write(tmp_path / "train", DOCUMENTS, vocab_size=vocab_size)
    assert read_by_the_specification(prefix) == (np.dtype(dtype), DOCUMENTS)


def test_reads_what_megatron_writes(tmp_path):
    """Two documents of three sequences, with the trailing modes that multimodal files have."""
    tokens = np.arange(10, dtype=np.int64)
    (tmp_path / "m.bin").write_bytes(tokens.tobytes())
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 5, 3, 3)
    idx += (
        struct.pack("<3i", 2, 3, 5)
        + struct.pack("<3q", 0, 16, 40)
        + struct.pack("<3q", 0, 2, 3)
        + b"\x00\x00\x01"
    )
    (tmp_path / "m.idx").write_bytes(idx)
    reader = IndexedReader(tmp_path / "m")
    assert (reader.documents, reader.sequences, reader.tokens) == (2, 3, 10)
    assert reader.read(1, 7).tolist() == [1, 2, 3, 4, 5, 6]


def test_appending_equals_adding(tmp_path):
    whole = write(tmp_path / "whole", DOCUMENTS, vocab_size=65499)
    parts = [
        write(tmp_path / f"part{number}", part, vocab_size=65499)
        for number, part in enumerate((DOCUMENTS[:1], DOCUMENTS[1:]))
    ]
    with IndexedWriter(tmp_path / "joined", dtype=token_dtype(65499)) as writer:
        for part in parts:
            reader = IndexedReader(part)
            writer.append(reader, keep=np.ones(reader.documents, dtype=bool))
    for joined, expected in zip(file_pair(tmp_path / "joined"), file_pair(whole), strict=True):
        assert joined.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("keep", [[1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 0, 0], [0] * 7])
def test_appending_some_equals_adding_those(tmp_path, keep, monkeypatch):
    monkeypatch.setattr(indexed, "COPY_BYTES", 3)  # both the copies and the index are written in many parts
    documents = [[number] * (number % 3 + 1) for number in range(7)]
    whole = IndexedReader(write(tmp_path / "whole", documents, vocab_size=65499))
    expected = write(
        tmp_path / "expected",
        [document for document, kept in zip(documents, keep, strict=True) if kept],
        vocab_size=65499,
    )
    with IndexedWriter(tmp_path / "some", dtype=token_dtype(65499)) as writer:
        writer.append(whole, keep=np.array(keep, dtype=bool))
    for some, wanted in zip(file_pair(tmp_path / "some"), file_pair(expected), strict=True):
        assert some.exists() == wanted.exists() == any(keep)
        assert not any(keep) or some.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")]
)
def test_every_integer_type_of_megatron_is_read(tmp_path, code, dtype):
    """Three documents of two, none and one sequences; where they begin, in any window."""
    (tmp_path / "m.bin").write_bytes(np.arange(9, dtype=dtype).tobytes())
    width = np.dtype(dtype).itemsize
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    idx += (
        struct.pack("<3i", 2, 3, 4)
        + struct.pack("<3q", 0, 2 * width, 5 * width)
        + struct.pack("<4q", 0, 2, 2, 3)
    )
    (tmp_path / "m.idx").write_bytes(idx)
    reader = IndexedReader(tmp_path / "m")
    assert reader.read(0, 9).tolist() == list(range(9))
    starts = {
        start: [int(at) for at in reader.document_starts(start, stop)]
        for start, stop in ((0, 9), (1, 9), (5, 6), (6, 9))
    }
    assert starts == {0: [0, 5], 1: [5], 5: [5], 6: []}


def test_no_documents_leave_no_files(tmp_path):
    write(tmp_path / "none", [], vocab_size=10)
    assert list(tmp_path.iterdir()) == []


def test_an_id_beyond_the_type_is_an_error_and_leaves_no_index(tmp_path):
    with (
        pytest.raises(AssertionError, match="uint16 cannot hold"),
        IndexedWriter(tmp_path / "train", dtype=token_dtype(100)) as writer,
    ):
        writer.add(np.array([65536]))
    assert not (tmp_path / "train.idx").exists()


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


DAMAGE = {
    "missing bin": (lambda p: (p / "train.bin").unlink(), "train.bin: there is no such file"),
    "missing idx": (lambda p: (p / "train.idx").unlink(), "train.idx: there is no such file"),
    "empty bin": (lambda p: (p / "train.bin").write_bytes(b""), "train.bin: the file is empty"),
    "empty idx": (lambda p: (p / "train.idx").write_bytes(b""), "train.idx: the file is empty"),
    "truncated bin": (
        lambda p: truncate(p / "train.bin", 2),
        "train.bin: it has 18 bytes but its index describes 20; it is truncated",
    ),
    "truncated idx": (lambda p: truncate(p / "train.idx", 8), "train.idx: it is truncated: 94 bytes of 102"),
    "truncated header": (
        lambda p: truncate(p / "train.idx", 80),
        "train.idx: it is truncated after 22 bytes",
    ),
    "wrong magic": (
        lambda p: (p / "train.idx").write_bytes(b"PK\x03\x04 a zip, not an index of tokens"),
        "so it is no token index",
    ),
    "wrong version": (lambda p: patch(p / "train.idx", 9, 2), "format version 2"),
    "wrong type": (lambda p: patch(p / "train.idx", 17, 7), "type code 7"),
    "longer bin": (lambda p: (p / "train.bin").write_bytes(bytes(40)), "of another index"),
}


def patch(path: Path, at: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(tmp_path, damage):
    write(tmp_path / "train", DOCUMENTS, vocab_size=65499)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(UserError, match=r"^data\.path=") as error:
        IndexedReader(tmp_path / "train")
    assert message in str(error.value)
    assert "prepare" in str(error.value)


def test_a_file_of_zeros_is_no_text(tmp_path):
    """What a copy with holes in it reads as. Files that `prepare` wrote are held against what it wrote."""
    write(tmp_path / "train", [[5, 6, 7] * 40], vocab_size=300)
    assert Corpus.open(tmp_path / "train").count("train", seq_len=32) == 3
    (tmp_path / "train.bin").write_bytes(bytes((tmp_path / "train.bin").stat().st_size))
    with pytest.raises(
        UserError, match=r"train\.bin: all \d+ tokens of a sample have the id 0: the copy is incomplete"
    ):
        Corpus.open(tmp_path / "train")


def text_rows(reader: IndexedReader, *, seq_len: int) -> TextRows:
    return TextRows(reader, seq_len=seq_len, documents=False, check=lambda _: None)


def test_rows_cover_the_stream_once(tmp_path):
    reader = IndexedReader(write(tmp_path / "train", [list(range(50)), list(range(50, 104))], vocab_size=200))
    rows = text_rows(reader, seq_len=10)
    assert len(rows) == count_rows(104, seq_len=10) == 10  # 103 predictions, of which 100 make whole rows
    got = rows.gather(np.arange(10)).tokens
    assert got.dtype == np.int64
    assert got[:, 1:].reshape(-1).tolist() == list(range(1, 101))
    assert got[:, :-1].reshape(-1).tolist() == list(range(100))
    assert rows.gather(np.array([7, 0])).tokens[:, 0].tolist() == [70, 0]


def test_not_one_row_is_refused(tmp_path):
    reader = IndexedReader(write(tmp_path / "train", [list(range(16))], vocab_size=200))
    assert len(text_rows(reader, seq_len=15)) == 1
    with pytest.raises(UserError, match=r"data\.seq_len=16: .*16 tokens, fewer than one row of 16"):
        text_rows(reader, seq_len=16)
