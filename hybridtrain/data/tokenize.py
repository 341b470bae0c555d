"""Text to token files: what `hybridtrain prepare` does.

    sources -> plan -> pieces (many processes) -> join -> publish

    <data.path>/tokenizer/                 an AutoTokenizer folder
    <data.path>/{train,eval}.{bin,idx}     token files; a split without documents has none
    <data.path>/{train,eval}.loss.*        of conversations: which tokens carry loss; and {train,eval}.rows.*: their packing into rows
    <data.path>/corpus.json                what the folder holds; written last, so its presence means complete

Work in progress lies in <data.path>/.partial: the tokenizer, then pieces of the corpus, each renamed into place when it
is complete. Killed at any moment, the same command again keeps what is complete and ends with the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import DataConfig, PrepareConfig, PrepareRoot
from hybridtrain.data import corpus, fit, join, pieces, statistics, tokenizer, workers
from hybridtrain.data.pieces import Counts, Piece, Recipe
from hybridtrain.data.progress import say
from hybridtrain.data.readers import Fields
from hybridtrain.files import write_atomically
from hybridtrain.types import UserError, refusal

SPLITS = ("train", "eval")


def run(config: PrepareRoot) -> int:
    """The `hybridtrain prepare` command: prepare, then say what the folder holds."""
    start = time.perf_counter()
    folder = prepare(config.data, options=config.prepare)
    print(statistics.table(folder))
    print(f"time       {time.perf_counter() - start:.1f} s")
    print(f"folder     {folder}")
    return 0


def prepare(data: DataConfig, *, options: PrepareConfig) -> Path:
    """Write the token files of `data.source` into `data.path`; return that folder.

    Does nothing when they are there with the same settings. Raises UserError for what is missing or does not fit, for a
    folder prepared with other settings (unless `overwrite`), for one that another process is writing, and for a full disk.
    """
    _check(data)
    folder, settings = Path(data.path).expanduser(), _settings(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if options.overwrite or not _is_prepared(folder, settings):
                _write(data, options=options, folder=folder, settings=settings)
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
    if data.tokenizer == "train" and data.vocab_size < tokenizer.MIN_VOCAB:
        raise refusal(
            "data.vocab_size", data.vocab_size, "too small for a byte-level tokenizer", allowed=f"{tokenizer.MIN_VOCAB} or more", instead="data.vocab_size=4096"
        )
    if data.format == "chat" and data.tokenizer == "train" and data.chat_template == "own":
        raise refusal(
            "data.tokenizer",
            data.tokenizer,
            "a tokenizer that is trained here has no chat template of its own",
            allowed="for conversations, the tokenizer of the model to be tuned",
            instead="data.tokenizer=FOLDER or a hub id, or data.chat_template=plain",
        )


def _settings(data: DataConfig) -> dict[str, Any]:
    """What determines the token files, apart from the text itself."""
    names = ["source", "format", "pattern", "tokenizer", "eval_fraction", "deduplicate", "dataset_config", "dataset_split", "encoding"]
    names += ["messages_key", "chat_template", "seq_len"] if data.format == "chat" else ["text_key", "append_eos"]
    names += ["vocab_size"] if data.tokenizer == "train" else []
    return {name: getattr(data, name) for name in names}


def _is_prepared(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder is complete with these settings; raises UserError when it is complete with others."""
    try:
        record = json.loads((folder / "corpus.json").read_text())
        found = record["settings"]
        if record["format"] == 1:
            found = {name: value for name, value in found.items() if name != "pattern"}  # another default, and never read for stdlib
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
    defaults = DataConfig()
    for name in settings | found:  # an option that the folder does not know had its default
        wanted, had = (some.get(name, getattr(defaults, name, None)) for some in (settings, found))
        if wanted != had:
            raise refusal(
                f"data.{name}",
                wanted,
                f"{folder} was prepared with {had}",
                allowed="the settings it was prepared with",
                instead="another data.path, or prepare.overwrite=true",
            )
    say(f"{folder} is prepared already (prepare.overwrite=true writes it again)")
    return True


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


def _write(data: DataConfig, *, options: PrepareConfig, folder: Path, settings: dict[str, Any]) -> None:
    partial = folder / ".partial"
    recipe = Recipe(
        chat=data.format == "chat",
        eval_fraction=data.eval_fraction,
        deduplicate=data.deduplicate,
        skip_bad=options.skip_bad,
        eos=[],
        vocab_size=0,  # both follow from the tokenizer
    )
    planned = pieces.plan(corpus.sources(data), fields=Fields.of(data))
    if not planned:
        raise _no_tokens(data)
    pieces.check_beginnings(planned, recipe=recipe)
    _begin(partial, settings=settings, planned=planned)
    facts = tokenizer.make(data, partial=partial, sample=tokenizer.sample(planned, recipe=recipe))
    eos = [facts["eos_id"]] if data.append_eos and not recipe.chat else []
    if None in eos:
        raise refusal(
            "data.append_eos", True, f"{data.tokenizer} has no end-of-text token", allowed="false with this tokenizer", instead="data.append_eos=false"
        )
    recipe = replace(recipe, eos=eos, vocab_size=facts["vocab_size"])
    meter = workers.tokenise(planned, work=workers.Work(partial=partial, recipe=recipe, encoder=tokenizer.encoder), processes=options.workers)
    _publish(data, folder=folder, planned=planned, recipe=recipe, facts=facts, settings=settings)
    statistics.write_speed(folder, meter=meter)


def _begin(partial: Path, *, settings: dict[str, Any], planned: list[Piece]) -> None:
    """Keep the partial folder if the same settings over the same files left it, else start with an empty one."""
    listing = hashlib.sha256()
    for piece in planned:
        for unit in piece.units:
            line = f"{piece.number}\0{unit.source.name}\0{unit.start}\0{unit.stop}\0{unit.source.size}\0{unit.source.version}\n"
            listing.update(line.encode("utf-8", "surrogateescape"))
    plan = json.dumps({"format": corpus.FORMAT, "settings": settings, "units": listing.hexdigest()})
    mark = partial / "plan.json"
    if mark.exists() and mark.read_text() == plan:
        for aside in partial.glob("piece-*.aside"):
            shutil.rmtree(aside, ignore_errors=True)
        say("going on from an interrupted prepare")
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_atomically(mark, plan)


def _publish(data: DataConfig, *, folder: Path, planned: list[Piece], recipe: Recipe, facts: dict[str, Any], settings: dict[str, Any]) -> None:
    """Join the pieces, move all into place, and write corpus.json as the mark of completeness."""
    partial = folder / ".partial"
    made = [piece.folder(partial) for piece in planned]
    keep = join.first_of_each(made) if recipe.deduplicate else None
    identity = hashlib.sha256(json.dumps([facts, data.append_eos]).encode())
    joined = {split: join.join(made, split=split, out=partial / split, recipe=recipe, keep=keep, identity=identity) for split in SPLITS}
    if not joined["train"].tokens:
        raise _no_tokens(data)
    rows = {split: fit.build(partial, split=split, seq_len=data.seq_len) for split in SPLITS if recipe.chat and joined[split].tokens}
    (folder / "corpus.json").unlink(missing_ok=True)
    for split in SPLITS:
        for old in folder.glob(f"{split}.*"):
            old.unlink()
        for new in partial.glob(f"{split}.*"):
            new.replace(folder / new.name)
    shutil.rmtree(folder / tokenizer.FOLDER, ignore_errors=True)
    shutil.copytree(partial / tokenizer.FOLDER, folder / tokenizer.FOLDER)
    record = {
        "format": corpus.FORMAT,
        "kind": "chat" if recipe.chat else "text",
        **({"seq_len": data.seq_len} if recipe.chat else {}),
        **facts,
        "largest_id": max(joined[split].largest_id for split in SPLITS),
        "splits": {split: statistics.of_split(joined[split], rows=rows.get(split)) for split in SPLITS},
        "duplicates": sum(int((~flags).sum()) for flags in keep or []),
        **statistics.of_text(Counts.of(made)),
        "fingerprint": identity.hexdigest(),
        "settings": settings,
    }
    write_atomically(folder / "corpus.json", json.dumps(record, indent=2) + "\n")


def _no_tokens(data: DataConfig) -> UserError:
    instead = "another data.source, or a smaller data.eval_fraction"
    return refusal("data.source", data.source, "no tokens to train on", allowed="documents with text", instead=instead)
