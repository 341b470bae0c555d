"""Which layout wrote a checkpoint, from the events of its run: version 0.1 kept a loss scale that depended on it."""

from __future__ import annotations

import json
from pathlib import Path

from hybridtrain.errors import UserError
from hybridtrain.plan import notation
from hybridtrain.runtime import log

_log = log.get("checkpoint")


def data_ranks(path: Path) -> int:
    """Data ranks of the run that wrote the checkpoint at `path`; 1 where its events do not say: a scale that is too small grows, a large one overflows."""
    written = ""
    for event in _events(path.parent.parent / "events.jsonl"):
        kind, detail = event.get("kind"), str(event.get("detail", ""))
        if f"from {path.name}" in detail or (kind == "checkpoint" and detail == path.name):
            break
        if kind in ("started", "resumed"):
            written = detail.partition(" ")[0]
    try:
        degrees = notation.parse(written)
    except UserError:
        degrees = {}
    if not written or not degrees:
        _log.warning("%s does not say which layout wrote it: its loss scale is taken as one of a single data rank", path)
    return int(degrees.get("dp_replicate", 1)) * int(degrees.get("dp_shard", 1))


def _events(file: Path) -> list[dict]:
    """The lines that can be read, in their order."""
    events = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
