"""Trackers (wandb, TensorBoard and others) through accelerate's classes.

A tracker never stops, slows or fails a run.

    training thread ── start, log, finish ──> one queue per tracker ──> one daemon thread per tracker
        ──> wandb, TensorBoard ...

Calls that may raise or hang run in the tracker's own thread; an error there is logged as one warning. Only
rank 0 tracks. A new tracker is a row in kinds.py.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

from hybridtrain.run.trackers.kinds import Kind, Place, kind_of

_log = logging.getLogger(__name__)

FINISH_S = 30.0  # seconds that all trackers together may delay the end of the run
FAILED_S = 10.0  # the same after a failure, when the launcher soon ends the other ranks

_NOT_PLOTTED = ("step", "time")  # the x axis, and trackers have their own clocks
# For secrets that were typed into the config. Those from ${oc.env:...} are sent as that reference.
_SECRET_NAME = re.compile(
    r"(^|[_-])(tokens?|api[_-]?keys?|(?<!text_)(?<!messages_)keys?|passw(or)?ds?|passphrases?|pwd?|secrets?|credentials?|auth|authorization|bearer|cookies?)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"://[^/\s]*:[^/\s]*@|^(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abprs]-)[\w-]{8,}|^(AKIA|ASIA)[0-9A-Z]{16}$|^eyJ[\w-]{8,}\.[\w-]+\.|^(Bearer|Basic)\s+\S{6,}",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"\$\{[^${}]*\}")
HIDDEN = "***"
"""Replaces text that looks like a secret."""


class Trackers:
    """The trackers of a run. Before `start`, and on ranks other than 0, `log` and `finish` do nothing."""

    def __init__(self) -> None:
        self._workers: list[_TrackerThread] = []

    def start(
        self, kinds: Sequence[str], *, config: Mapping[str, Mapping[str, Any]], folder: Path, first_step: int
    ) -> None:
        """Open the trackers `kinds` in the background; their files are in `folder`/<kind>.

        `config`: the run's config without secrets from the environment (compose.public). It gives project and
        name, and is stored with the run, flat and masked by `public`. `first_step`: step that the run resumes
        from; values that an earlier attempt logged after it are obsolete.
        """
        if os.environ.get("RANK", "0") != "0" or not kinds:
            return
        values = public(config)
        project = _public_name(str(config["tracker"]["project"]), "tracker.project")
        name = _public_name(str(config["run"]["name"]), "run.name")
        for kind in kinds:
            row, place = kind_of(kind), (folder / kind).resolve()
            try:
                place.mkdir(parents=True, exist_ok=True)
                for variable, value in row.environment(place).items():
                    os.environ.setdefault(variable, value)
                # Import in this thread: concurrent imports with cycles can see partial modules.
                for module in row.modules:
                    importlib.import_module(module)
                if row.modules:
                    _accelerate_state()
            except Exception as error:
                _warn(kind, error)
                continue
            self._workers.append(
                _TrackerThread(
                    kind,
                    row,
                    Place(project=project, name=name, folder=place, first_step=first_step),
                    config=values,
                )
            )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send the finite numbers in `values` to every tracker; returns at once."""
        numbers = {
            key: value
            for key, value in values.items()
            if key not in _NOT_PLOTTED and isinstance(value, int | float) and math.isfinite(value)
        }
        for worker in self._workers:
            worker.log(numbers, step)

    def finish(self, *, failed: bool) -> None:
        """Close the trackers and tell them whether the run failed; takes at most FINISH_S
        (FAILED_S after a failure).
        """
        patience = FAILED_S if failed else FINISH_S
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.close(failed=failed)
        for worker in self._workers:
            worker.join(deadline, patience_s=patience)
        self._workers = []


class _TrackerThread:
    """A tracker's own daemon thread, which ends at the first error."""

    def __init__(self, kind: str, row: Kind, place: Place, *, config: dict[str, Any]) -> None:
        self._kind = kind
        self._queue: SimpleQueue[tuple[dict[str, Any], int] | bool] = SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(
            target=self._work, args=(row, place, config), name=f"tracker-{kind}", daemon=True
        )
        self._thread.start()

    def _work(self, row: Kind, place: Place, config: dict[str, Any]) -> None:
        try:
            tracker = row.open(place)
            tracker.start()
            tracker.store_init_configuration(config)
            while not isinstance(entry := self._queue.get(), bool):
                values, step = entry
                tracker.log(values, step=step)
            (row.fail if entry else _finish)(tracker)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            _warn(self._kind, error)

    def log(self, values: dict[str, Any], step: int) -> None:
        if not self._failed:
            self._queue.put((values, step))

    def close(self, *, failed: bool) -> None:
        self._queue.put(failed)

    def join(self, deadline: float, *, patience_s: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(TimeoutError(f"not finished after {patience_s:.0f} s"))


def _finish(tracker: Any) -> None:
    tracker.finish()


def _public_name(text: str, field: str) -> str:
    """A project's or run's name for trackers.

    A value from an environment variable may be a secret: its name is sent instead.
    """
    if "${" not in text:
        return text
    name = re.sub(r"[^\w.-]+", "-", text).strip("-") or "run"
    _log.warning(
        (
            "%s=%s: sent to trackers as %s, since values from the environment may be secrets; "
            "write it out to have it sent"
        ),
        field,
        text,
        name,
    )
    return name


def _warn(kind: str, error: Exception) -> None:
    cause = " ".join(str(error).split()) or "no message"
    _log.warning(
        "tracker %s gave up (%s: %s); training goes on, metrics.jsonl has every value",
        kind,
        type(error).__name__,
        cause[:300],
    )


def _accelerate_state() -> None:
    """Create accelerate's PartialState, which its trackers ask for the rank, without
    initializing a process group.

    In a launched process (LOCAL_RANK set) with GPUs, PartialState would initialize a process group if
    there is none. With an empty environment it assumes a single process, which is right here, since
    only rank 0 tracks.
    """
    from accelerate import PartialState
    from accelerate.utils import clear_environment

    with contextlib.nullcontext() if dist.is_initialized() else clear_environment():
        PartialState()


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` flat, with dotted keys, and HIDDEN for what looks like a secret: text under names that end in
    token, key, password ..., URLs with a password, known formats of keys.

    Values are bool, int, float or str (others as JSON), which every tracker can store; None is left out.

    >>> public({"optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "hub_token": "abc"})
    {'optim.lr': 0.1, 'optim.betas': '[0.9, 0.95]', 'hub_token': '***'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and not _SECRET_NAME.search(str(key)):
            flat |= {f"{key}.{name}": inner for name, inner in public(value).items()}
            continue
        shown = _mask(str(key), value)
        if isinstance(shown, bool | int | float | str):
            flat[str(key)] = shown
        elif shown is not None:
            flat[str(key)] = json.dumps(shown, default=str)
    return flat


def _mask(key: str, value: Any) -> Any:
    """`value` with HIDDEN in place of text that looks like a secret or whose key does; numbers are kept."""
    if isinstance(value, Mapping):
        return {
            name: _mask(key if _SECRET_NAME.search(key) else str(name), item) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mask(key, item) for item in value]
    if (
        isinstance(value, str)
        and value
        and not _REFERENCE.fullmatch(value)
        and (_SECRET_NAME.search(key) or _SECRET_VALUE.search(value))
    ):
        return HIDDEN
    return value
