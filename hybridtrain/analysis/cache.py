"""Results of analyses, kept in the user's cache folder: JSON objects by what they depend on, the code and the
versions of what computed them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hybridtrain.errors import UserError
from hybridtrain.runtime import host, log
from hybridtrain.runtime.files import read_object, write_json

_log = log.get("model")
_EXAMINERS = ("analysis", "models", "tasks")
"""Packages whose code decides what is found."""


def cached(
    question: object, *, compute: Callable[[], Mapping[str, Any]], valid: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any]:
    """The answer to a question, JSON, from the folder or computed and kept.

    `valid`: whether an answer that is there can be read; another version may have written it.
    """
    file = _file(question)
    with _alone(file):  # the ranks of a host ask at the same time
        with suppress(UserError):
            if file.exists() and valid(known := read_object(file, field="XDG_CACHE_HOME")):
                return known
        answer = compute()
        try:
            write_json(file, answer)
        except OSError as error:
            _log.warning("the analysis of the model is not kept in %s: %s", file, error)
    return answer


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time; without a folder that can be written, each for itself."""
    with ExitStack() as stack:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _code() -> str:
    """A digest of the code that examines models."""
    files = sorted(file for name in _EXAMINERS for file in (host.PACKAGE / name).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _file(question: object) -> Path:
    versions = [version(name) for name in ("torch", "transformers")]
    content = json.dumps([_code(), versions, question], sort_keys=True, default=str)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "hybridtrain" / "analysis" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"
