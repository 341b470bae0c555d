"""The folder that `prepare` writes: its own files in it, a lock, and cleanup after a refusal.

The user chooses the folder, so it may contain other files. Only files in the record
of `prepare` are replaced.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from hybridtrain.data.prepare.progress import say
from hybridtrain.data.prepare.statistics import SPEED
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import files

FIELD = "data.path"
CORPUS = "corpus.json"
TOKENIZER = "tokenizer"
PARTIAL, PLAN = ".partial", "plan.json"
RECORD = ".prepare.json"
"""Record of the files that `prepare` wrote. Not in folders of version 0.1."""
SPLITS = ("train", "eval")
_LOCK = ".lock"
_PARTS = (
    *("bin", "idx", "loss.bin", "loss.idx", "rows.npy", "row_starts.npy"),
    *("sentences.bin", "sentences.idx", "pairs.npy"),
)
NAMES = (CORPUS, SPEED, *(f"{split}.{part}" for split in SPLITS for part in _PARTS))
_TOKENIZER_NAMES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    ),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""Files of a tokenizer that transformers saves."""
_WAIT_NOTICE_S = 3.0


def is_ours(record: Any) -> bool:
    """Whether the content of a corpus.json is that of `prepare`."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("fingerprint"), str)
        and isinstance(record.get("settings"), dict)
    )


def _own(folder: Path) -> set[str]:
    """Files of the folder that `prepare` wrote and may replace."""
    own = {
        name
        for name in files.read_record(folder, record=RECORD)
        if name in NAMES or name.startswith(f"{TOKENIZER}/")
    }
    if not own and (folder / CORPUS).is_file():
        with suppress(UserError):
            if is_ours(files.read_json(folder / CORPUS, field=FIELD)):
                own = {*NAMES, *(f"{TOKENIZER}/{name}" for name in _TOKENIZER_NAMES)}
    return own


def check_free(folder: Path, *, read: Iterable[str]) -> None:
    """Refuse a folder with files of our names that `prepare` did not write, or with files to
    be read (raises UserError).
    """
    if folder.exists() and not folder.is_dir():
        raise refusal(FIELD, folder, "it is a file", allowed="a folder", instead="data.path=data/mine")
    root = folder.resolve()
    inside = next((path for path in read if root in Path(path).resolve().parents), None)
    if inside is not None:
        allowed = "a folder apart from what is read"
        raise refusal(
            FIELD,
            folder,
            f"{inside}, which is to be read, is in the folder to be written",
            allowed=allowed,
            instead="data.path=data/mine",
        )
    own, tokenizer = _own(folder), folder / TOKENIZER
    names = (
        [path.relative_to(folder).as_posix() for path in tokenizer.rglob("*") if not path.is_dir()]
        if tokenizer.is_dir() and not tokenizer.is_symlink()
        else [TOKENIZER]
    )
    partial = folder / PARTIAL
    strange = (
        partial.exists()
        and not (partial / PLAN).is_file()
        and not all(files.is_temporary(path.name, of=PLAN) for path in partial.iterdir())
    )
    work = [PARTIAL] if strange else []
    files.check_replaceable(
        folder,
        [name for name in (*NAMES, *sorted(names), *work) if name not in own],
        record=RECORD,
        field=FIELD,
    )


@contextmanager
def reserved(folder: Path, *, wait_s: float) -> Iterator[None]:
    """Create the folder and lock it against other `prepare` processes, for which it waits at most `wait_s`.

    The system releases the lock when the process ends for any reason. After a UserError, new
    empty folders are removed.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    had_lock = (folder / _LOCK).exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder, wait_s=wait_s)
    try:
        yield
    except UserError:
        if not had_lock and not (folder / PARTIAL).exists() and not (folder / CORPUS).exists():
            with suppress(OSError):
                (folder / _LOCK).unlink()
                for path in new_folders:
                    path.rmdir()
        raise
    finally:
        lock.close()


def _lock(folder: Path, *, wait_s: float) -> TextIO:
    start, noticed = time.monotonic(), False
    while True:
        lock = (folder / _LOCK).open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # another `prepare` may have removed it before it was locked
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / _LOCK)):
                    return lock
        except BlockingIOError:
            spent = time.monotonic() - start
            if spent >= wait_s:
                lock.close()
                words, instead = "another prepare is writing here", "wait for it, or another data.path"
                raise refusal(
                    FIELD, folder, words, allowed="one prepare per folder", instead=instead
                ) from None
            if spent > _WAIT_NOTICE_S and not noticed:
                say(f"waiting for the prepare that is writing {folder}")
                noticed = True
            time.sleep(0.1)
        except BaseException:
            lock.close()
            raise
        lock.close()
        folder.mkdir(parents=True, exist_ok=True)


def replace(folder: Path) -> list[str]:
    """Move the completed files from the partial folder to their final place, replacing earlier
    ones; returns their names.

    The record of our files is written first, so that it is complete even after a kill.
    """
    partial, own = folder / PARTIAL, _own(folder)
    new = [path for split in SPLITS for path in sorted(partial.glob(f"{split}.*"))]
    tokenizer_files = [path for path in sorted((partial / TOKENIZER).rglob("*")) if path.is_file()]
    names = [CORPUS, SPEED, *(path.relative_to(partial).as_posix() for path in (*new, *tokenizer_files))]
    files.check_replaceable(folder, [name for name in names if name not in own], record=RECORD, field=FIELD)
    files.write_record(folder, {*own, *names}, record=RECORD)
    (folder / CORPUS).unlink(missing_ok=True)
    for name in own - set(names):
        (folder / name).unlink(missing_ok=True)
    for path in new:
        path.replace(folder / path.name)
    for path in tokenizer_files:  # copied, so that after a kill they are still in the partial folder
        place = folder / path.relative_to(partial)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.partial")
        shutil.copyfile(path, temporary)
        temporary.replace(place)
    return names
