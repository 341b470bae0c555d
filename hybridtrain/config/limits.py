"""Limits on the size, depth and aliases of a YAML file, checked before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hybridtrain.errors import UserError, refusal

_MOST_BYTES = 1 << 20
_MOST_NODES = 100_000
_MOST_DEPTH = 64
"""Far above what we write, and far below what takes noticeable time or memory."""


def unfit(path: Path, problem: str) -> UserError:
    """The refusal of a config.yaml, with its folder as run.dir."""
    return refusal(
        "run.dir",
        path.parent,
        f"{path.name} {problem}",
        allowed="the folder of a run",
        instead="run.dir=runs/<name>",
    )


def read(path: Path) -> str:
    """The text of a YAML file. Raises UserError if it cannot be read or exceeds the limits."""
    try:
        size, data = path.stat().st_size, path.open("rb").read(_MOST_BYTES + 1)
    except OSError as error:
        raise unfit(path, f"cannot be read: {error.strerror or error}") from error
    if size > _MOST_BYTES:
        raise unfit(path, f"has {size:,} bytes, too many for a configuration")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise unfit(path, f"is not UTF-8 (byte {error.start})") from error
    if (
        "&" in text
        or text.count("[") + text.count("{") + text.count("- -") > _MOST_DEPTH
        or "\n" + " " * 2 * _MOST_DEPTH in text
    ):
        _check_size(path, text)
    return text


def _check_size(path: Path, text: str) -> None:
    """Refuse deep nesting, and aliases that expand to many nodes (raises UserError)."""
    sizes: dict[str, int] = {}
    open_: list[list[Any]] = []  # [anchor, nodes so far] of each enclosing collection
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append([event.anchor, 1])
        elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent | yaml.CollectionEndEvent):
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, count = open_.pop()
            else:
                anchor, count = (
                    (event.anchor, 1)
                    if isinstance(event, yaml.ScalarEvent)
                    else (None, sizes.get(event.anchor, 1))
                )
            if anchor:
                sizes[anchor] = count
            if open_:
                open_[-1][1] += count
            if count > _MOST_NODES:
                raise unfit(path, "becomes too large through its aliases")
        if len(open_) > _MOST_DEPTH:
            raise unfit(path, f"is nested more than {_MOST_DEPTH} deep")
