"""Text to token files: what `hybridtrain prepare` does.

    <data.path>/tokenizer/                 an AutoTokenizer folder
    <data.path>/{train,eval}.{bin,idx}     token files; a split without documents has none
    <data.path>/corpus.json                what the folder holds; written last, so its presence means complete

Work in progress lies in <data.path>/.partial: the tokenizer, then pieces of the corpus, each renamed into place when it
is complete. Killed at any moment, the same command again keeps what is complete and ends with the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridtrain.config.schema import DataConfig, PrepareRoot
from hybridtrain.data import corpus, pieces
from hybridtrain.data.indexed import file_pair, token_dtype
from hybridtrain.data.pieces import Encode
from hybridtrain.types import refusal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GAP = re.compile(r"[^\W\d_] [^\W\d_]")  # letter, space, letter
SPLITS = ("train", "eval")
END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB = 257  # 256 bytes and END_OF_TEXT
TRAINING_BYTES = 100 << 20  # text that a tokenizer is trained on; more changes few merges and costs minutes
CHUNK_CHARS = 1 << 16  # a longer document is encoded in parts of about this size, see `_parts`
PARTS_AT_ONCE = 1 << 8  # texts in one call of the tokenizer: bounds memory, keeps every core busy


def run(config: PrepareRoot) -> int:
    """The `hybridtrain prepare` command: prepare, then say what the folder holds."""
    start = time.perf_counter()
    folder = prepare(config.data, overwrite=config.prepare.overwrite)
    facts = json.loads((folder / "corpus.json").read_text())
    for split in SPLITS:
        counts = facts["splits"][split]
        print(f"{split:<11} {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    tokens = sum(counts["tokens"] for counts in facts["splits"].values())
    print(f"vocabulary  {facts['vocab_size']:,} (largest id used {facts['largest_id']:,})")
    print(f"time        {time.perf_counter() - start:.1f} s for {tokens:,} tokens")
    print(f"folder      {folder}")
    return 0


def prepare(data: DataConfig, *, overwrite: bool) -> Path:
    """Write the token files of `data.source` into `data.path`; return that folder.

    Does nothing when they are there with the same settings. Raises UserError for what is missing or does not fit, for a
    folder prepared with other settings (unless `overwrite`), for one that another process is writing, and for a full disk.
    """
    _check(data)
    folder, settings = Path(data.path).expanduser(), _settings(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if overwrite or not _is_prepared(folder, settings):
                _write(data, folder=folder, settings=settings)
            shutil.rmtree(folder / ".partial", ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise refusal(
                "data.path", folder, f"the disk is full ({error.strerror})", allowed="a disk with room", instead="the same command again; it goes on from here"
            ) from error
        if isinstance(error, (FileExistsError, NotADirectoryError, PermissionError)):
            raise refusal("data.path", folder, str(error), allowed="a folder that can be written", instead="data.path=data/mine") from error
        raise
    return folder


def _check(data: DataConfig) -> None:
    if not data.path:
        raise refusal("data.path", "''", "no folder for the token files", allowed="a folder", instead="data.path=data/mine")
    if not data.source:
        raise refusal("data.source", "[]", "nothing to read", allowed=f"files, folders, patterns or {corpus.STDLIB}", instead=f"data.source=[{corpus.STDLIB}]")
    if not 0 <= data.eval_fraction < 1:
        raise refusal("data.eval_fraction", data.eval_fraction, "not a share of the documents", allowed="0 to below 1", instead="data.eval_fraction=0.02")
    if data.tokenizer == "train" and data.vocab_size < MIN_VOCAB:
        raise refusal(
            "data.vocab_size", data.vocab_size, "too small for a byte-level tokenizer", allowed=f"{MIN_VOCAB} or more", instead="data.vocab_size=4096"
        )


def _settings(data: DataConfig) -> dict[str, Any]:
    """What determines the token files, apart from the text itself."""
    settings: dict[str, Any] = {"source": list(data.source), "pattern": data.pattern, "tokenizer": data.tokenizer}
    if data.tokenizer == "train":
        settings["vocab_size"] = data.vocab_size
    return settings | {"eval_fraction": data.eval_fraction, "append_eos": data.append_eos}


def _is_prepared(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder is complete with these settings; raises UserError when it is complete with others."""
    try:
        found = json.loads((folder / "corpus.json").read_text())["settings"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise refusal(
            "data.path",
            folder,
            "its corpus.json is not one that prepare wrote",
            allowed="an empty or prepared folder",
            instead="prepare.overwrite=true, or another data.path",
        ) from error
    if found == settings:
        pieces.say(f"{folder} is prepared already (prepare.overwrite=true writes it again)")
        return True
    name = next(name for name in settings | found if settings.get(name) != found.get(name))
    raise refusal(
        f"data.{name}",
        settings.get(name),
        f"{folder} was prepared with {found.get(name)}",
        allowed="the settings it was prepared with",
        instead="another data.path, or prepare.overwrite=true",
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second `prepare` out of the folder; the system drops the lock when the process ends, however it ends."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal(
                "data.path", folder, "another prepare is writing here", allowed="one prepare per folder", instead="wait for it, or another data.path"
            ) from None
        yield


def _write(data: DataConfig, *, folder: Path, settings: dict[str, Any]) -> None:
    documents = corpus.documents(data)
    partial = folder / ".partial"
    _begin(partial, settings=settings, documents=documents)
    facts = _tokenizer(data, partial=partial, documents=documents)
    if data.append_eos and facts["eos_id"] is None:
        raise refusal(
            "data.append_eos", True, f"{data.tokenizer} has no end-of-text token", allowed="false with this tokenizer", instead="data.append_eos=false"
        )
    encode, eos = _encoder(partial / "tokenizer"), [facts["eos_id"]] if data.append_eos else []
    made = pieces.tokenise(documents, folder=partial, encode=encode, eos=eos, dtype=token_dtype(facts["vocab_size"]))
    _publish(folder, made=made, facts=facts, settings=settings)


def _begin(partial: Path, *, settings: dict[str, Any], documents: list[corpus.Document]) -> None:
    """Keep the partial folder if the same settings over the same files left it, else start with an empty one."""
    listing = hashlib.sha256()
    for document in documents:
        listing.update(f"{document.name}\0{document.size}\0{document.path.stat().st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    plan = json.dumps({"format": corpus.FORMAT, "settings": settings, "documents": listing.hexdigest()})
    mark = partial / "plan.json"
    if mark.exists() and mark.read_text() == plan:
        pieces.say("going on from an interrupted prepare")
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    pieces.write_text(mark, plan)


def _tokenizer(data: DataConfig, *, partial: Path, documents: list[corpus.Document]) -> dict[str, Any]:
    """Make the tokenizer folder unless it is there; return {vocab_size, eos_id}."""
    folder = partial / "tokenizer"
    record = partial / "tokenizer.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer = _train_tokenizer(data, documents) if data.tokenizer == "train" else _load_tokenizer(data.tokenizer)
        _save(tokenizer, folder)
        pieces.write_text(record, json.dumps({"vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id}))
    return json.loads(record.read_text())


def _save(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the Rust side raises bare Exceptions; give a full disk its name back
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise


def _train_tokenizer(data: DataConfig, documents: list[corpus.Document]) -> Any:
    """A byte-level BPE trained on the documents that are not held out. The same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    chosen = [document for document in documents if not document.held_out]
    chosen = chosen[:: 1 + sum(document.size for document in chosen) // TRAINING_BYTES]
    pieces.say(f"training a tokenizer on {sum(document.size for document in chosen) / 1e6:.1f} MB of text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((part for document in chosen for part in _parts(document.text())), trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise refusal(
            "data.tokenizer",
            name,
            f"transformers cannot load it ({str(error).strip().splitlines()[0]})",
            allowed="'train', a folder with tokenizer files, or a hub id that can be reached",
            instead="data.tokenizer=train",
        ) from error


def _encoder(folder: Path) -> Encode:
    """Texts to token ids without special tokens, in parallel over the cores."""
    if not (folder / "tokenizer.json").exists():  # a tokenizer written in Python: transformers runs it
        slow = _load_tokenizer(str(folder))
        return lambda texts: [np.array(ids, dtype=np.int32) for ids in slow(texts, add_special_tokens=False)["input_ids"]]
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    parts = _parts if _adds_up_at_gaps(fast) else (lambda text: [text])

    def encode(texts: list[str]) -> list[np.ndarray]:
        cut = [parts(text) for text in texts]
        flat = [part for text in cut for part in text]
        ids: list[np.ndarray] = []
        for first in range(0, len(flat), PARTS_AT_ONCE):
            ids += (np.array(one.ids, dtype=np.int32) for one in fast.encode_batch_fast(flat[first : first + PARTS_AT_ONCE], add_special_tokens=False))
        ends = itertools.accumulate(len(text) for text in cut)
        return [np.concatenate(ids[end - len(text) : end]) for text, end in zip(cut, ends, strict=True)]

    return encode


def _parts(text: str) -> list[str]:
    """Cut a long text before a space between two words, where tokenizers do not join.

    One text is encoded on one core with some 100 bytes of memory per character: a file of 100 MB took 9 GB.
    """
    parts, start = [], 0
    while gap := _GAP.search(text, start + CHUNK_CHARS):
        parts.append(text[start : gap.start() + 1])
        start = gap.start() + 1
    return [*parts, text[start:]]


def _adds_up_at_gaps(tokenizer: Tokenizer) -> bool:
    """Whether a text cut as `_parts` does gives the tokens of the whole (not so where each text gets a prefix space, for one)."""
    samples = [("a", " b c"), ("x = 1)\ndef", " function():\n"), ("end. The", " end\n\n"), ("1  é", " ßx"), ("return", " x")]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return all(ids(head + tail) == ids(head) + ids(tail) for head, tail in samples)


def _publish(folder: Path, *, made: list[Path], facts: dict[str, Any], settings: dict[str, Any]) -> None:
    """Join the pieces, move all into place, and write corpus.json as the mark of completeness."""
    partial = folder / ".partial"
    identity = hashlib.sha256(json.dumps([facts, settings["append_eos"]]).encode())
    joined = {split: pieces.join(made, split=split, out=partial / split, dtype=token_dtype(facts["vocab_size"]), identity=identity) for split in SPLITS}
    if not joined["train"].tokens:
        raise refusal("data.source", settings["source"], "no tokens to train on", allowed="documents with text", instead="another data.source")
    (folder / "corpus.json").unlink(missing_ok=True)
    for split in SPLITS:
        for source, target in zip(file_pair(partial / split), file_pair(folder / split), strict=True):
            if joined[split].tokens:
                source.replace(target)
            else:
                target.unlink(missing_ok=True)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    shutil.copytree(partial / "tokenizer", folder / "tokenizer")
    record = {
        "format": corpus.FORMAT,
        **facts,
        "largest_id": max(joined[split].largest_id for split in SPLITS),
        "splits": {split: {"documents": joined[split].documents, "tokens": joined[split].tokens} for split in SPLITS},
        "fingerprint": identity.hexdigest(),
        "settings": settings,
    }
    pieces.write_text(folder / "corpus.json", json.dumps(record, indent=2) + "\n")
