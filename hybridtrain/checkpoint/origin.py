"""The layout that wrote a checkpoint, from the events of its run: the loss scale of version
0.1 depended on it.
"""

from __future__ import annotations

import json
from pathlib import Path

from hybridtrain.errors import UserError
from hybridtrain.plan import notation
from hybridtrain.runtime import log

_log = log.get("checkpoint")


def data_ranks(path: Path) -> int:
    """Number of data ranks that wrote the checkpoint at `path`; 1 if the events do not tell.

    1 is safe: a loss scale that is too small grows, one that is too large overflows.
    """
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
        _log.warning(
            "the layout that wrote %s is not known: its loss scale is taken as that of a single data rank",
            path,
        )
    return int(degrees.get("dp_replicate", 1)) * int(degrees.get("dp_shard", 1))


def _events(file: Path) -> list[dict]:
    """The readable lines of events.jsonl, in order."""
    events = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
