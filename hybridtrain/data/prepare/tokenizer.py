"""The tokenizer of a corpus: trained or loaded, saved as a folder, and used to encode documents."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare import answers, chat, labelled, sentences, template, words
from hybridtrain.data.prepare.chat import Encoded
from hybridtrain.data.prepare.cuts import CHUNK_CHARS, Cutter
from hybridtrain.data.prepare.documents import Counts, documents
from hybridtrain.data.prepare.pieces import Encode, Piece
from hybridtrain.data.prepare.progress import say
from hybridtrain.data.prepare.recipe import Recipe
from hybridtrain.data.prepare.sources import ANSWERS, LABELLED
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import network
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer, read_object, write_atomically

_GAP = re.compile(r"[^\W\d_] [^\W\d_]")  # letter, space, letter
END_OF_TEXT = "<|endoftext|>"
OF_ENCODERS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""Special tokens of an encoder's tokenizer that is trained here (data.encoder_tokens)."""
TRAINING_BYTES = 100 << 20  # text to train a tokenizer on; more changes few merges and takes minutes
MAX_INFLATION = 4  # times TRAINING_BYTES at most, if files hold more text than their size suggests
MIN_SAMPLE_BYTES = 1 << 16  # smallest sample of a unit
GROUP_CHARS = 1 << 18  # per call of the tokenizer: limits memory, and keeps the cores busy
FOLDER = "tokenizer"
FIELD = "data.tokenizer"


def least_vocab(data: DataConfig) -> int:
    """The smallest vocabulary that can be trained: 256 bytes and the special tokens."""
    return 256 + (len(OF_ENCODERS) if data.encoder_tokens else 1)


def build(data: DataConfig, *, partial: Path, sample: Iterable[str]) -> dict[str, Any]:
    """Save the tokenizer to `<partial>/tokenizer` unless it exists: that of `data.tokenizer`, or
    one trained on `sample`.

    Returns {vocab_size, eos_id} and, for conversations, {template: see template.facts}. Raises UserError for
    one that cannot be loaded, or lacks a chat template that is needed.
    """
    folder, record = partial / FOLDER, partial / "tokenizer.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer = (
            _train(data, sample=sample) if data.tokenizer == "train" else load(data.tokenizer, field=FIELD)
        )
        if data.format == "chat":
            template.set_template(tokenizer, choice=data.chat_template)
        _save(tokenizer, folder)
        chat_facts = {"template": template.facts(tokenizer)} if data.format == "chat" else {}
        # Tokenizers of encoders end a text with their separator.
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        write_atomically(record, json.dumps({"vocab_size": len(tokenizer), "eos_id": end, **chat_facts}))
    return json.loads(record.read_text())


def sample(pieces: list[Piece], *, recipe: Recipe) -> Iterator[str]:
    """About TRAINING_BYTES of training text from all over the corpus; deterministic.

    If the corpus is larger, the beginning of each unit is taken, in proportion to its size; the shares of
    small units are accumulated until they reach MIN_SAMPLE_BYTES.
    """
    total = sum(piece.size for piece in pieces)
    fraction = TRAINING_BYTES / total if total > TRAINING_BYTES else math.inf
    say(f"training a tokenizer on {min(total, TRAINING_BYTES) / 1e6:.1f} MB of text")
    taken, credit = 0, 0.0
    for unit in (unit for piece in pieces for unit in piece.units if not unit.source.held_out):
        credit += unit.size * fraction
        if credit < min(unit.size, MIN_SAMPLE_BYTES):
            continue
        for document in documents(unit, recipe=recipe, counts=Counts.zero()):
            if not document.held_out:
                text = document.value.text if recipe.packed else document.value
                yield from _chunks(text if credit == math.inf else text[: math.ceil(credit)])
                credit -= min(document.size, credit)
                taken += document.size
            if credit <= 0 or taken > MAX_INFLATION * TRAINING_BYTES:
                break


def encoder(partial: Path, recipe: Recipe) -> Encode:
    """The function that encodes documents with the tokenizer in `<partial>/tokenizer`; it adds no
    special tokens to text.
    """
    if recipe.sentences:
        whole = encoder(partial, replace(recipe, sentences=False))
        return functools.partial(sentences.encode, encode=whole)
    folder = partial / FOLDER
    if recipe.chat:
        tokenizer = load(str(folder), field=FIELD)
        return _refusing(
            functools.partial(
                chat.encode,
                template=template.Template(tokenizer, name=recipe.chat.tokenizer),
                turns=recipe.chat.turns,
            )
        )
    if recipe.labels:
        tokenizer = load(str(folder), field=FIELD)
        encode_labelled: Any = labelled.encode
        if recipe.labels.form != LABELLED:
            _check_fast(tokenizer)
            encode_labelled = words.encode
        if recipe.labels.form == ANSWERS:
            answers.check(tokenizer)
            encode_labelled = answers.encode
        return _refusing(functools.partial(encode_labelled, tokenizer=tokenizer, recipe=recipe.labels))
    if not (folder / "tokenizer.json").exists():  # a slow tokenizer, which is written in Python
        slow = load(str(folder), field=FIELD)
        return _refusing(
            lambda texts: [
                Encoded.text(np.array(ids, dtype=np.int32))
                for ids in slow(texts, add_special_tokens=False)["input_ids"]
            ]
        )
    from tokenizers import Tokenizer

    with _loading(FIELD, str(folder), instead="prepare.overwrite=true"):
        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    cutter = Cutter(lambda text: fast.encode(text, add_special_tokens=False).ids)

    def encode(texts: list[str]) -> list[Encoded]:
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(texts, cutter=cutter):
            encoded = fast.encode_batch_fast([part for _, part in group], add_special_tokens=False)
            for (number, _), one in zip(group, encoded, strict=True):
                ids[number].append(np.array(one.ids, dtype=np.int32))
        ids.reverse()
        return [Encoded.text(np.concatenate(ids.pop())) for _ in texts]  # pop frees memory of long documents

    return _refusing(encode)


def _check_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not tell where in the text its tokens are (raises UserError)."""
    if not tokenizer.is_fast:
        problem = "it is a slow tokenizer, which does not tell to which words its tokens belong"
        allowed, instead = "a tokenizer with a tokenizer.json", "data.tokenizer=FOLDER of one"
        raise refusal(FIELD, "of the corpus", problem, allowed=allowed, instead=instead)


def _groups(texts: list[str], *, cutter: Cutter) -> Iterator[list[tuple[int, str]]]:
    """(number of the text, part) for the parts of all texts, in groups for one call of the tokenizer each."""
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


def special_ids(partial: Path) -> list[int]:
    """Ids of the tokenizer's special tokens.

    A document whose text contains such a token is encoded with its id.
    """
    file = partial / FOLDER / "tokenizer.json"
    if not file.is_file():
        return sorted(load(str(partial / FOLDER), field=FIELD).all_special_ids)
    added = read_object(file, field=FIELD).get("added_tokens") or []
    return sorted({token["id"] for token in added if token.get("special")})


def _refusing(encode: Encode) -> Encode:
    """`encode` that raises UserError for what the tokenizer cannot encode.

    Rust raises a bare Exception, or panics as BaseException.
    """

    def checked(documents: list[Any]) -> list[Encoded]:
        try:
            return encode(documents)
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            problem = f"it fails on a document ({type(error).__name__}: {str(error).strip()[:200]})"
            allowed = "a tokenizer that takes every text"
            raise refusal(
                FIELD, "of the corpus", problem, allowed=allowed, instead="another data.tokenizer"
            ) from error

    return checked


def _save(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # Rust raises a bare Exception; turn a full disk into an OSError
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise


def _train(data: DataConfig, *, sample: Iterable[str]) -> Any:
    """Train a byte-level BPE; deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=list(OF_ENCODERS.values()) if data.encoder_tokens else [END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(sample, trainer=trainer)
    if data.encoder_tokens:
        cls, sep = OF_ENCODERS["cls_token"], OF_ENCODERS["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **OF_ENCODERS
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load(name: str, *, field: str) -> Any:
    """The tokenizer of a folder, a tokenizer.json or a hub id.

    Raises UserError, naming `field`, if it cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    for file in _files(path):
        if is_lfs_pointer(file):
            raise lfs_pointer(field, file)
    if path.is_file() and path.suffix != ".json":
        allowed, instead = (
            "a folder with tokenizer files, a tokenizer.json, or a hub id",
            f"{field}={path.parent}",
        )
        raise refusal(
            field, name, "it is one file of a tokenizer, not all of it", allowed=allowed, instead=instead
        )
    with _loading(field, name, instead=f"{field}=FOLDER of a complete tokenizer"):
        if path.is_file() and path.name != "tokenizer.json":
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            folder = path.parent if path.is_file() else path
            exists = folder.exists()
            offline = not (exists or network.hub_resolves())
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if exists else name, trust_remote_code=False, local_files_only=offline
            )
        len(tokenizer)  # raises for a damaged vocabulary
    if tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        # BPE decodes spaces exactly; transformers warns about the option.
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    return tokenizer


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [
            path / name
            for name in (
                "tokenizer.json",
                "tokenizer_config.json",
                "tokenizer.model",
                "spiece.model",
                "vocab.json",
                "merges.txt",
            )
        ]
    return [path]


@contextmanager
def _loading(field: str, name: str, *, instead: str) -> Iterator[None]:
    """Raise UserError for whatever the libraries raise over a damaged or hostile tokenizer;
    Rust panics as BaseException.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        allowed = "'train', a folder with tokenizer files, a tokenizer.json, or a hub id that can be reached"
        raise refusal(
            field,
            name,
            f"it cannot be loaded ({type(error).__name__}: {reason})",
            allowed=allowed,
            instead=instead,
        ) from error


def _chunks(text: str) -> list[str]:
    """A text to train a tokenizer on, split before a space between two words: a long
    text takes much memory."""
    chunks, start = [], 0
    while gap := _GAP.search(text, start + CHUNK_CHARS):
        chunks.append(text[start : gap.start() + 1])
        start = gap.start() + 1
    return [*chunks, text[start:]]
