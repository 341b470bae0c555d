"""Statistics of a prepared corpus: for corpus.json, which does not depend on restarts of `prepare`,
and as a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridtrain.data.prepare.documents import Counts
from hybridtrain.data.prepare.join import Joined
from hybridtrain.data.prepare.packing import PackedRows
from hybridtrain.data.prepare.progress import ProgressMeter
from hybridtrain.data.prepare.sources import ANSWERS, LABELLED_WORDS
from hybridtrain.errors import UserError
from hybridtrain.runtime.files import one_line, read_object, write_atomically

MOST_FIELDS = 8  # unread fields that the table names
SPEED = "speed.json"  # of the call that completed the folder; not in corpus.json, since it varies


def of_split(joined: Joined, *, rows: PackedRows | None) -> dict[str, Any]:
    """Statistics of one split; with `rows` (packed corpora) also targets and packing."""
    figures: dict[str, Any] = {
        "documents": joined.documents,
        "tokens": joined.tokens,
        "lengths": joined.lengths,
    }
    if rows:
        figures |= {
            "loss_tokens": rows.targets,
            "kept_tokens": rows.tokens,
            "rows": rows.rows,
            "cut": rows.cut,
            "fill": round(rows.fill, 4),
        }
    return figures


def of_text(counts: Counts) -> dict[str, Any]:
    """Statistics of the text, for corpus.json."""
    return {
        "text_bytes": counts.text_bytes,
        "bytes_per_token": round(counts.text_bytes / max(1, counts.tokens), 2),
        "bad_records": counts.bad,
        "first_bad": counts.first_bad,
        "damaged_documents": counts.damaged,
        "first_damaged": counts.first_damaged,
        "documents_with_control_tokens": counts.controls,
        "first_with_control_tokens": counts.first_control,
        "notes": counts.notes,
    }


def of_conversations(counts: Counts) -> dict[str, Any]:
    """Statistics of conversations, for corpus.json: {conversations, forms, unread}."""
    return {"conversations": counts.conversations, "forms": counts.forms, "unread": counts.unread}


def write_speed(folder: Path, *, meter: ProgressMeter) -> None:
    """Write the speed of this call (without the work of earlier calls):
    {seconds, tokens, tokens_per_s, mb_per_s}.
    """
    seconds = max(meter.seconds, 1e-9)
    speed = {
        "seconds": round(seconds, 3),
        "tokens": meter.tokens,
        "tokens_per_s": round(meter.tokens / seconds),
        "mb_per_s": round(meter.size / seconds / 1e6, 2),
    }
    write_atomically(folder / SPEED, json.dumps(speed) + "\n")


def table(folder: Path) -> str:
    """The statistics of a prepared folder as a table; a message if corpus.json is damaged."""
    try:
        return "\n".join([*_lines(read_object(folder / "corpus.json", field="data.path")), *_speed(folder)])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        return (
            "figures    cannot be shown, corpus.json is damaged "
            f"({type(error).__name__}: {one_line(str(error))[:80]})"
        )


def _speed(folder: Path) -> list[str]:
    if not (folder / SPEED).exists():
        return []
    try:
        speed = read_object(folder / SPEED, field="data.path")
        return (
            [f"speed      {speed['tokens_per_s']:,} tokens/s, {speed['mb_per_s']:,} MB/s"]
            if speed["tokens"]
            else []
        )
    except (UserError, KeyError, TypeError, ValueError) as error:
        return [f"speed      cannot be shown, {SPEED} is damaged ({one_line(str(error))[:80]})"]


def _lines(facts: Mapping[str, Any]) -> list[str]:
    splits = {
        split: [f"{value:,}" for value in (one["documents"], one["tokens"], *one.get("lengths", {}).values())]
        for split, one in facts["splits"].items()
    }
    names = [
        "documents",
        "tokens",
        *next((one["lengths"] for one in facts["splits"].values() if one.get("lengths")), {}),
    ]
    widths = [
        max(least, *(len(row[place]) + 2 for row in splits.values() if place < len(row)), 0)
        for place, least in enumerate([13, 17] + [9] * 6)
    ]
    lines = [
        f"{'':11}"
        + "".join(name.rjust(width) for name, width in zip(names, widths, strict=False))
        + "   tokens per document"
    ]
    for split, figures in facts["splits"].items():
        lines.append(
            f"{split:11}"
            + "".join(value.rjust(width) for value, width in zip(splits[split], widths, strict=False))
        )
        if "rows" in figures:
            share = figures["loss_tokens"] / figures.get("kept_tokens", figures["tokens"])
            packed = (
                f"{figures['rows']:,} rows of {facts['seq_len']}, "
                f"{figures['fill']:.1%} full, {figures['cut']:,} documents cut"
            )
            # Marks of answers are more than targets.
            loss = "" if facts.get("kind") == ANSWERS else f"; {share:.1%} of the tokens carry loss"
            lines.append(f"{'':11}{packed}{loss}")
    requested, held_out = facts["settings"].get("eval_fraction", 0), facts["splits"]["eval"]["tokens"]
    share = held_out / max(1, held_out + facts["splits"]["train"]["tokens"])
    lines.append(f"held out   {share:.1%} of the tokens, {requested:.1%} were asked for (data.eval_fraction)")
    if size := facts.get("text_bytes"):
        lines.append(f"text       {size / 1e6:,.1f} MB read, {facts['bytes_per_token']} bytes per token")
    lines.append(f"vocabulary {facts['vocab_size']:,} (largest id used {facts['largest_id']:,})")
    for name, first, words in (
        ("duplicates", "", "identical documents left out"),
        ("bad_records", "first_bad", "records left out"),
        ("damaged_documents", "first_damaged", "documents with U+FFFD or bytes that are no text"),
        (
            "documents_with_control_tokens",
            "first_with_control_tokens",
            "documents that spell out special tokens, and now contain them",
        ),
    ):
        if count := facts.get(name):
            lines.append(
                f"{'':11}{count:,} {words}" + (f", first {facts[first]}" if facts.get(first) else "")
            )
    if left_out := facts.get("left_out"):
        lines.append(
            f"{'':11}left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        )
    return lines + _records(facts)


def _records(facts: Mapping[str, Any]) -> list[str]:
    """Lines of the table about records and the chat template."""
    what = "words" if facts.get("kind") == LABELLED_WORDS else "records"
    lines = [f"{what:11}{form}: {count:,}" for form, count in facts.get("forms", {}).items()]
    if rows := facts.get("pairs"):
        counted = ", ".join(f"{split} {count:,}" for split, count in rows.items())
        lines.append(
            f"pairs      {counted} rows of {facts['seq_len']}; a sentence alone in a row is left out"
        )
    if unread := facts.get("unread"):
        most = sorted(unread.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} ({count:,})" for name, count in most[:MOST_FIELDS]) + (
            " ..." if most[MOST_FIELDS:] else ""
        )
        lines.append(f"{'':11}fields that are not read: {shown}")
    lines += [
        f"{'':11}{count:,} {words}, first {first}" for words, (count, first) in facts.get("notes", {}).items()
    ]
    template = facts.get("template", {})
    if (end := template.get("end_of_turn")) != (eos := template.get("eos")):
        turns = f"answers end with {end}" if end else "answers end with text, not with a control token"
        stop = (
            "exports end a text with either"
            if end
            else "text generation must stop at the end of an answer by itself"
        )
        lines.append(f"{'':11}{turns}; the tokenizer's end of text is {eos}: {stop}")
    if template.get("dated"):
        lines.append(f"{'':11}the chat template writes the date, which is that of this preparation")
    return lines
