"""The tokenizer of a corpus: made on the spot or loaded, kept as a folder, and turned into the function that encodes documents."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare import chat, labelled, template
from hybridtrain.data.prepare.chat import Encoded
from hybridtrain.data.prepare.cuts import CHUNK_CHARS, Cutter
from hybridtrain.data.prepare.documents import Counts, documents
from hybridtrain.data.prepare.pieces import Encode, Piece
from hybridtrain.data.prepare.progress import say
from hybridtrain.data.prepare.recipe import Recipe
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import network
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer, read_object, write_atomically

_GAP = re.compile(r"[^\W\d_] [^\W\d_]")  # letter, space, letter
END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB = 257  # 256 bytes and END_OF_TEXT
TRAINING_BYTES = 100 << 20  # text that a tokenizer is trained on; more changes few merges and costs minutes
MAX_INFLATION = 4  # times TRAINING_BYTES, where files held more text than their size told
MIN_SAMPLE_BYTES = 1 << 16  # least text taken of a unit, unless it has less
GROUP_CHARS = 1 << 18  # in one call of the tokenizer: bounds memory, keeps the cores busy
FOLDER = "tokenizer"
FIELD = "data.tokenizer"


def make(data: DataConfig, *, partial: Path, sample: Iterable[str]) -> dict[str, Any]:
    """Write the tokenizer into `<partial>/tokenizer` unless it is there: the one of `data.tokenizer`, or one trained on `sample`.

    Returns {vocab_size, eos_id} and, for conversations, {template: see template.facts}. Raises UserError for one that cannot be loaded, or that has no chat template where one is needed.
    """
    folder, record = partial / FOLDER, partial / "tokenizer.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer = _train(data, sample=sample) if data.tokenizer == "train" else load(data.tokenizer, field=FIELD)
        if data.format == "chat":
            template.set_template(tokenizer, choice=data.chat_template)
        _save(tokenizer, folder)
        known = {"template": template.facts(tokenizer)} if data.format == "chat" else {}
        write_atomically(record, json.dumps({"vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id, **known}))
    return json.loads(record.read_text())


def sample(pieces: list[Piece], *, recipe: Recipe) -> Iterator[str]:
    """Text of documents that are not held out, about TRAINING_BYTES at most, from all over the corpus: the same for the same corpus.

    Of a larger corpus each unit gives the beginning of its text in proportion to its size; small units wait until a share has gathered.
    """
    total = sum(piece.size for piece in pieces)
    part = TRAINING_BYTES / total if total > TRAINING_BYTES else math.inf
    say(f"training a tokenizer on {min(total, TRAINING_BYTES) / 1e6:.1f} MB of text")
    taken, credit = 0, 0.0
    for unit in (unit for piece in pieces for unit in piece.units if not unit.source.held_out):
        credit += unit.size * part
        if credit < min(unit.size, MIN_SAMPLE_BYTES):
            continue
        for document in documents(unit, recipe=recipe, counts=Counts.none()):
            if not document.held_out:
                text = document.value.text if recipe.fitted else document.value
                yield from _parts(text if credit == math.inf else text[: math.ceil(credit)])
                credit -= min(document.size, credit)
                taken += document.size
            if credit <= 0 or taken > MAX_INFLATION * TRAINING_BYTES:
                break


def encoder(partial: Path, recipe: Recipe) -> Encode:
    """The function that encodes documents with the tokenizer of `<partial>/tokenizer`; text without special tokens around it."""
    folder = partial / FOLDER
    if recipe.chat:
        tokenizer = load(str(folder), field=FIELD)
        return _whole(functools.partial(chat.encode, template=template.Template(tokenizer, name=recipe.chat.tokenizer), turns=recipe.chat.turns))
    if recipe.labels:
        return _whole(functools.partial(labelled.encode, tokenizer=load(str(folder), field=FIELD), recipe=recipe.labels))
    if not (folder / "tokenizer.json").exists():  # a tokenizer written in Python: transformers runs it
        slow = load(str(folder), field=FIELD)
        return _whole(lambda texts: [Encoded.text(np.array(ids, dtype=np.int32)) for ids in slow(texts, add_special_tokens=False)["input_ids"]])
    from tokenizers import Tokenizer

    with _guarded(FIELD, str(folder), instead="prepare.overwrite=true"):
        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    cutter = Cutter(lambda text: fast.encode(text, add_special_tokens=False).ids)

    def encode(texts: list[str]) -> list[Encoded]:
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(texts, cutter=cutter):
            encoded = fast.encode_batch_fast([part for _, part in group], add_special_tokens=False)
            for (number, _), one in zip(group, encoded, strict=True):
                found[number].append(np.array(one.ids, dtype=np.int32))
        found.reverse()
        return [Encoded.text(np.concatenate(found.pop())) for _ in texts]  # one by one: a long document is not held twice

    return _whole(encode)


def _groups(texts: list[str], *, cutter: Cutter) -> Iterator[list[tuple[int, str]]]:
    """The parts of all texts, each with the number of its text, in groups for one call of the tokenizer."""
    group: list[tuple[int, str]] = []
    chars = 0
    for number, text in enumerate(texts):
        for part in cutter.parts(text):
            group.append((number, part))
            chars += len(part)
            if chars >= GROUP_CHARS:
                yield group
                group, chars = [], 0
    if group:
        yield group


def control_ids(partial: Path) -> list[int]:
    """Ids of the tokenizer's special tokens, which a document that spells them out would contain."""
    file = partial / FOLDER / "tokenizer.json"
    if not file.is_file():
        return sorted(load(str(partial / FOLDER), field=FIELD).all_special_ids)
    added = read_object(file, field=FIELD).get("added_tokens") or []
    return sorted({token["id"] for token in added if token.get("special")})


def _whole(encode: Encode) -> Encode:
    """The same, refusing what the tokenizer cannot encode: Rust raises bare Exceptions and panics, which are no Exceptions."""

    def guarded(documents: list[Any]) -> list[Encoded]:
        try:
            return encode(documents)
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            words, allowed = f"it fails on a document ({type(error).__name__}: {str(error).strip()[:200]})", "a tokenizer that takes every text"
            raise refusal(FIELD, "of the corpus", words, allowed=allowed, instead="another data.tokenizer") from error

    return guarded


def _save(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the Rust side raises bare Exceptions; give a full disk its name back
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise


def _train(data: DataConfig, *, sample: Iterable[str]) -> Any:
    """A byte-level BPE. The same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(sample, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def load(name: str, *, field: str) -> Any:
    """The tokenizer of a folder, a tokenizer.json or a hub id. Raises UserError that names `field` for whatever cannot be loaded."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    for file in _files(path):
        if is_lfs_pointer(file):
            raise lfs_pointer(field, file)
    if path.is_file() and path.suffix != ".json":
        allowed, instead = "a folder with tokenizer files, a tokenizer.json, or a hub id", f"{field}={path.parent}"
        raise refusal(field, name, "it is a file of one part of a tokenizer", allowed=allowed, instead=instead)
    with _guarded(field, name, instead=f"{field}=FOLDER of a whole tokenizer"):
        if path.is_file() and path.name != "tokenizer.json":
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            place = path.parent if path.is_file() else path
            here = place.exists()
            local = not (here or network.hub_resolves())
            tokenizer = AutoTokenizer.from_pretrained(str(place) if here else name, trust_remote_code=False, local_files_only=local)
        len(tokenizer)
    if tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "BPE":  # its text has all its spaces; transformers warns where it is asked for
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    return tokenizer


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / name for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt")]
    return [path]


@contextmanager
def _guarded(field: str, name: str, *, instead: str) -> Iterator[None]:
    """Whatever a damaged or hostile tokenizer makes the libraries raise becomes a refusal; Rust's panics are no Exceptions."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        words = (str(error).strip().splitlines() or ["no reason given"])[0]
        allowed = "'train', a folder with tokenizer files, a tokenizer.json, or a hub id that can be reached"
        raise refusal(field, name, f"it cannot be loaded ({type(error).__name__}: {words})", allowed=allowed, instead=instead) from error


def _parts(text: str) -> list[str]:
    """A text for the training of a tokenizer, cut before a space between two words: in one piece it takes much memory."""
    parts, start = [], 0
    while gap := _GAP.search(text, start + CHUNK_CHARS):
        parts.append(text[start : gap.start() + 1])
        start = gap.start() + 1
    return [*parts, text[start:]]
