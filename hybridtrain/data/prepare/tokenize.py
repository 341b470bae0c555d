"""`hybridtrain prepare`: from text to token files.

    sources -> plan -> pieces (many processes) -> join -> publish

    <data.path>/tokenizer/                 an AutoTokenizer folder
    <data.path>/{train,eval}.{bin,idx}     token files; a split without documents has none
    <data.path>/{train,eval}.loss.*        conversations and labelled texts: the loss mask
    <data.path>/{train,eval}.rows.*        the same: the packing of documents into rows
    <data.path>/{train,eval}.sentences.*   data.sentences: where sentences begin; .pairs.npy: rows of them
    <data.path>/corpus.json                describes the folder; written last: with it, the folder is complete

Work in progress is in <data.path>/.partial: the tokenizer, then pieces of the corpus, each renamed into
place when it is complete. If the command is killed at any time and run again, it keeps complete pieces and
writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridtrain.config.schema import DataConfig, PrepareConfig, PrepareRoot
from hybridtrain.data import digests, pairs
from hybridtrain.data.prepare import (
    folder,
    join,
    labelled,
    packing,
    pieces,
    sources,
    statistics,
    tokenizer,
    workers,
)
from hybridtrain.data.prepare import words as of_words
from hybridtrain.data.prepare.documents import Counts
from hybridtrain.data.prepare.files import STDLIB
from hybridtrain.data.prepare.folder import PARTIAL, SPLITS
from hybridtrain.data.prepare.pieces import NO_LOSS, NO_TARGET, Piece
from hybridtrain.data.prepare.prepared import is_prepared, settings_of
from hybridtrain.data.prepare.progress import say
from hybridtrain.data.prepare.recipe import ChatRecipe, Recipe, labels_of
from hybridtrain.data.prepare.sources import LABELLED, LABELLED_WORDS, Listing
from hybridtrain.data.prepare.units import Fields
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import discard, unwritable, write_atomically

INTERRUPTED = 130


def run(config: PrepareRoot) -> int:
    """`hybridtrain prepare`: prepare the folder and print its statistics. Returns the exit code."""
    start = time.perf_counter()
    try:
        path = prepare(config.data, options=config.prepare)
    except KeyboardInterrupt:
        say("\ninterrupted; the same command continues from here")
        return INTERRUPTED
    print(statistics.table(path))
    print(f"time       {time.perf_counter() - start:.1f} s")
    print(f"folder     {path}")
    return 0


def prepare(data: DataConfig, *, options: PrepareConfig) -> Path:
    """Write the token files of `data.source` into `data.path`; returns that folder.

    Does nothing if they exist, with the same settings and from the same files. Raises UserError for
    unusable options or sources, for a folder prepared differently (unless `overwrite`), one that holds
    other files or that another process is writing, and for a full disk. After an error, complete pieces
    remain for the next call.
    """
    return prepare_after(data, options=options, wait_s=0)


def prepare_after(data: DataConfig, *, options: PrepareConfig, wait_s: float) -> Path:
    """`prepare`, which waits up to `wait_s` seconds for another process that prepares the folder, and
    then uses its result.
    """
    _check(data)
    path, settings = Path(data.path), settings_of(data)
    try:
        if not options.overwrite and is_prepared(path, data=data, settings=settings):
            if (path / PARTIAL).exists():
                discard(path / PARTIAL)
            return path
        listing = sources.listing(data)
        folder.check_free(path, read=[source.path for source in listing.sources])
        planned = pieces.plan(listing.sources, fields=Fields.of(data))
        with folder.reserved(path, wait_s=wait_s):
            if options.overwrite or not is_prepared(path, data=data, settings=settings):
                folder.check_free(path, read=[])
                _write(data, options=options, path=path, planned=planned, listing=listing, settings=settings)
            discard(path / PARTIAL)
    except OSError as error:
        if error.errno is None:
            raise
        raise unwritable("data.path", path, error) from error
    return path


def _check(data: DataConfig) -> None:
    if not data.path:
        raise refusal(
            "data.path",
            "''",
            "no folder for the token files",
            allowed="a folder",
            instead="data.path=data/mine",
        )
    if not data.source:
        raise refusal(
            "data.source",
            "[]",
            "nothing to read",
            allowed=f"files, folders, patterns or {STDLIB}",
            instead="data.source=[YOUR TEXT]",
        )
    if not 0 <= data.eval_fraction < 1:
        raise refusal(
            "data.eval_fraction",
            data.eval_fraction,
            "out of range",
            allowed="0 or more, below 1",
            instead="data.eval_fraction=0.02",
        )
    if data.format in (LABELLED, LABELLED_WORDS):
        labelled.check(data)
    if data.format == LABELLED_WORDS:
        of_words.check(data)
    if data.sentences:
        _check_sentences(data)
    if data.tokenizer == "train" and data.vocab_size < (least := tokenizer.least_vocab(data)):
        raise refusal(
            "data.vocab_size",
            data.vocab_size,
            "too small for a byte-level tokenizer",
            allowed=f"{least} or more",
            instead="data.vocab_size=4096",
        )
    if data.format == "chat" and data.tokenizer == "train" and data.chat_template == "own":
        raise refusal(
            "data.tokenizer",
            data.tokenizer,
            "a tokenizer that is trained here has no chat template of its own",
            allowed="for conversations, the tokenizer of the model to be tuned",
            instead="data.tokenizer=FOLDER or a hub id, or data.chat_template=plain",
        )


def _check_sentences(data: DataConfig) -> None:
    if data.format in sources.PACKED_FORMATS:
        problem, allowed = f"data.format={data.format} has no running text", "false with it"
        raise refusal("data.sentences", True, problem, allowed=allowed, instead="data.sentences=false")
    if data.seq_len < pairs.SHORTEST:
        problem = "two parts of text and three special tokens do not fit into a row"
        allowed = f"{pairs.SHORTEST} or more with data.sentences"
        raise refusal("data.seq_len", data.seq_len, problem, allowed=allowed, instead="data.seq_len=128")


def _write(
    data: DataConfig,
    *,
    options: PrepareConfig,
    path: Path,
    planned: list[Piece],
    listing: Listing,
    settings: dict[str, Any],
) -> None:
    partial = path / PARTIAL
    recipe = Recipe(
        chat=_chat(data),
        labels=labels_of(data),
        sentences=data.sentences,
        eval_fraction=data.eval_fraction,
        deduplicate=data.deduplicate,
        skip_bad=options.skip_bad,
        total_bytes=sum(piece.size for piece in planned)
        if data.format not in sources.PACKED_FORMATS and data.eval_fraction
        else 0,
        held_out_before=listing.before,
        eos=[],  # these three are set once the tokenizer is known
        special_ids=[],
        vocab_size=0,
    )
    if not planned:
        raise _no_tokens(data, counts=Counts.zero())
    listing.check_share(fraction=data.eval_fraction)
    pieces.check_first_records(planned, recipe=recipe)
    say(listing.summary)
    new = _open_partial(partial, settings=settings, planned=planned)
    try:
        facts = tokenizer.build(data, partial=partial, sample=tokenizer.sample(planned, recipe=recipe))
        eos = [facts["eos_id"]] if data.append_eos and not recipe.marks else []
        if None in eos:
            problem = f"{data.tokenizer} has no end-of-text token"
            raise refusal(
                "data.append_eos",
                True,
                problem,
                allowed="false with this tokenizer",
                instead="data.append_eos=false",
            )
        special_ids = [] if recipe.packed else tokenizer.special_ids(partial)
        recipe = replace(recipe, eos=eos, vocab_size=facts["vocab_size"], special_ids=special_ids)
        meter = workers.tokenize(
            planned,
            work=workers.Work(partial=partial, recipe=recipe, encoder=tokenizer.encoder),
            processes=options.workers,
        )
    except UserError:
        if new and not any(piece.folder(partial).exists() for piece in planned):
            discard(partial)
        raise
    _publish(data, path=path, planned=planned, listing=listing, recipe=recipe, facts=facts, settings=settings)
    statistics.write_speed(path, meter=meter)


def _chat(data: DataConfig) -> ChatRecipe | None:
    name = "data.chat_template=plain" if data.chat_template == "plain" else f"data.tokenizer={data.tokenizer}"
    return (
        ChatRecipe(tokenizer=name, turns=data.chat_turns, seq_len=data.seq_len)
        if data.format == "chat"
        else None
    )


def _open_partial(partial: Path, *, settings: dict[str, Any], planned: list[Piece]) -> bool:
    """Keep the partial folder if it is of the same settings and files, else empty it; returns
    whether it is new.
    """
    listing = hashlib.sha256()
    for piece in planned:
        for unit in piece.units:
            source = unit.source
            line = (
                f"{piece.number}\0{source.name}\0{unit.start}\0{unit.stop}\0{source.size}\0{source.version}\n"
            )
            listing.update(line.encode("utf-8", "surrogateescape"))
    plan = json.dumps({"format": sources.FORMAT, "settings": settings, "units": listing.hexdigest()})
    plan_file = partial / folder.PLAN
    if plan_file.exists() and plan_file.read_text() == plan:
        for incomplete in partial.glob("piece-*.aside"):
            discard(incomplete)
        say("continuing an interrupted prepare")
        return False
    discard(partial)
    partial.mkdir()
    write_atomically(plan_file, plan)
    return True


def _publish(
    data: DataConfig,
    *,
    path: Path,
    planned: list[Piece],
    listing: Listing,
    recipe: Recipe,
    facts: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Join the pieces, move everything into place, and write corpus.json, which marks the
    folder as complete."""
    partial = path / PARTIAL
    chat = {"template": facts.pop("template")} if "template" in facts else {}  # not hashed
    folders = [piece.folder(partial) for piece in planned]
    keep = join.first_of_each(folders) if recipe.deduplicate else None
    identity = hashlib.sha256(json.dumps([facts, data.append_eos]).encode())
    joined = {
        split: join.join(
            folders, split=split, out=partial / split, recipe=recipe, keep=keep, identity=identity
        )
        for split in SPLITS
    }
    counts = Counts.load(folders)
    if not joined["train"].tokens:
        raise _nothing_to_train(data, counts=counts)
    sources.check_share(
        joined["eval"].tokens / sum(joined[split].tokens for split in SPLITS), fraction=data.eval_fraction
    )
    rows = {
        split: packing.build(partial, split=split, seq_len=data.seq_len)
        for split in SPLITS
        if recipe.packed and joined[split].tokens
    }
    pair_rows = _pairs(data, partial, splits=[split for split in SPLITS if joined[split].tokens])
    file_digests = _digests(partial)
    folder.replace(path)
    record = {
        "format": sources.FORMAT,
        "kind": data.format if recipe.packed else "text",
        **({"seq_len": data.seq_len} if recipe.marks else {}),
        **pair_rows,
        **({"labels": recipe.labels.names} if recipe.labels else {}),
        **facts,
        "largest_id": max(joined[split].largest_id for split in SPLITS),
        "splits": {split: statistics.of_split(joined[split], rows=rows.get(split)) for split in SPLITS},
        "duplicates": sum(int((~flags).sum()) for flags in keep or []),
        **statistics.of_text(counts),
        **(statistics.of_conversations(counts) | chat if recipe.chat else {}),
        **({"forms": counts.forms} if recipe.labels and not recipe.chat else {}),
        "left_out": listing.left_out,
        "held_out": listing.held_out(fraction=data.eval_fraction) | counts.held_out,
        "fingerprint": identity.hexdigest(),
        "settings": settings,
        "sources": listing.record(),
        **file_digests,
    }
    write_atomically(path / "corpus.json", json.dumps(record, indent=2) + "\n")


def _digests(partial: Path) -> dict[str, dict[str, Any]]:
    """The digest of each token file, and of each file of the tokenizer."""
    tokens = [file for split in SPLITS for file in sorted(partial.glob(f"{split}.*"))]
    of_tokenizer = [file for file in sorted((partial / folder.TOKENIZER).rglob("*")) if file.is_file()]
    return {
        "digests": {file.name: digests.record(file) for file in tokens},
        "tokenizer_files": {
            file.relative_to(partial).as_posix(): digests.record(file) for file in of_tokenizer
        },
    }


def _nothing_to_train(data: DataConfig, *, counts: Counts) -> UserError:
    if NO_TARGET in counts.notes:
        return _no_targets(data)
    return _no_loss(data) if NO_LOSS in counts.notes else _no_tokens(data, counts=counts)


def _no_targets(data: DataConfig) -> UserError:
    problem = (
        "in no conversation of the train split does an answer begin within this many tokens: "
        "nothing can be learned"
    )
    return refusal(
        "data.seq_len",
        data.seq_len,
        problem,
        allowed="rows in which answers fit",
        instead="a larger data.seq_len",
    )


def _pairs(data: DataConfig, partial: Path, *, splits: list[str]) -> dict[str, Any]:
    """Write the rows of pairs, and return their numbers for corpus.json. Raises UserError without any."""
    if not data.sentences:
        return {}
    rows = {split: pairs.build(partial, split=split, seq_len=data.seq_len) for split in splits}
    if not rows["train"]:
        raise _no_pairs()
    return {"pairs": rows}


def _no_pairs() -> UserError:
    problem = "no two documents have two sentences within a row: there are no pairs to learn from"
    return refusal(
        "data.sentences",
        True,
        problem,
        allowed="documents of several sentences",
        instead="data.sentences=false, whole documents instead of lines, or a larger data.seq_len",
    )


def _no_loss(data: DataConfig) -> UserError:
    problem = (
        "every answer of the train split is excluded from the loss, by a field weight, train or loss of 0"
    )
    allowed = "conversations with an answer that has loss"
    return refusal(
        "data.source", data.source, problem, allowed=allowed, instead="messages without these fields"
    )


def _no_tokens(data: DataConfig, *, counts: Counts) -> UserError:
    problem, instead = "no tokens to train on", "another data.source, or a smaller data.eval_fraction"
    if counts.bad:
        field = "messages_key" if data.format == "chat" else "text_key"
        problem += (
            f": {counts.bad:,} records were left out (prepare.skip_bad=true), the first {counts.first_bad}"
        )
        instead = (
            f"data.{field}=FIELD, the one that holds the {'messages' if data.format == 'chat' else 'text'}"
        )
    problem += "".join(f"; {count:,} {note}" for note, (count, _) in counts.notes.items())
    return refusal("data.source", data.source, problem, allowed="documents with text", instead=instead)
