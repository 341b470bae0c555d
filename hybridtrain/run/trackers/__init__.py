"""Trackers (wandb, TensorBoard and others) through accelerate's tracker classes. A tracker never stops, slows or fails a training run.

    training thread ── start, log, finish ──> one queue per tracker ──> one daemon thread per tracker ──> wandb, TensorBoard ...

Calls that may raise or hang run in the tracker's own thread; an error there only logs one warning. Only rank 0 tracks.
A new tracker is a row in kinds.py.
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

FINISH_S = 30.0  # all trackers together may hold up the end of the run for so long
FAILED_S = 10.0  # the same after a failure: the launcher ends what is left of the run soon

_NOT_PLOTTED = ("step", "time")  # the x axis, and the trackers have clocks of their own
# A second line of defence, for secrets that were typed: what comes through ${oc.env:...} is sent as that reference.
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
"""In place of what looks like a secret."""


class Trackers:
    """The trackers of a run. Without `start`, or on another rank than 0, `log` and `finish` do nothing."""

    def __init__(self) -> None:
        self._workers: list[_TrackerThread] = []

    def start(self, kinds: Sequence[str], *, config: Mapping[str, Mapping[str, Any]], folder: Path, first_step: int) -> None:
        """Open the trackers called `kinds` in the background; their files go to `folder`/<kind>.

        `config` is the public form of the run's configuration (compose.plain), which gives project and name too; it is stored with the
        run, flat and without what looks like a secret. `first_step`: steps done before; what was logged after them is out of date.
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
                # Imported here: two threads inside one import with cycles can see half a module.
                for module in row.modules:
                    importlib.import_module(module)
                if row.modules:
                    _accelerate_state()
            except Exception as error:
                _warn(kind, error)
                continue
            self._workers.append(_TrackerThread(kind, row, Place(project=project, name=name, folder=place, first_step=first_step), config=values))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Hand the numbers of `values` over to every tracker; returns at once. What is None or not finite is left out."""
        numbers = {key: value for key, value in values.items() if key not in _NOT_PLOTTED and isinstance(value, int | float) and math.isfinite(value)}
        for worker in self._workers:
            worker.log(numbers, step)

    def finish(self, *, failed: bool) -> None:
        """Write out what was logged, and whether the run failed; takes FINISH_S at most (FAILED_S for one that failed)."""
        patience = FAILED_S if failed else FINISH_S
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.close(failed=failed)
        for worker in self._workers:
            worker.join(deadline, patience_s=patience)
        self._workers = []


class _TrackerThread:
    """One tracker on its own daemon thread, which ends at the first failure."""

    def __init__(self, kind: str, row: Kind, place: Place, *, config: dict[str, Any]) -> None:
        self._kind = kind
        self._queue: SimpleQueue[tuple[dict[str, Any], int] | bool] = SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, args=(row, place, config), name=f"tracker-{kind}", daemon=True)
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
    """The name of a project or run that is sent to trackers. A value from an environment variable may be a secret: the variable's name is sent instead."""
    if "${" not in text:
        return text
    name = re.sub(r"[^\w.-]+", "-", text).strip("-") or "run"
    _log.warning("%s=%s: trackers call it %s, for what comes from the environment may be a secret; write it out to have it sent", field, text, name)
    return name


def _warn(kind: str, error: Exception) -> None:
    cause = " ".join(str(error).split()) or "no message"
    _log.warning("tracker %s gave up (%s: %s); training goes on, metrics.jsonl has every value", kind, type(error).__name__, cause[:300])


def _accelerate_state() -> None:
    """Set up the state that accelerate's trackers ask for the rank, without letting it touch process groups.

    In a launched process (LOCAL_RANK set) with GPUs, PartialState would initialise a process group if there is none
    yet; with an empty environment it takes the process for a single one, which is right on rank 0, the one that tracks.
    """
    from accelerate import PartialState
    from accelerate.utils import clear_environment

    with contextlib.nullcontext() if dist.is_initialized() else clear_environment():
        PartialState()


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` flat, with dotted keys; what looks like a secret is HIDDEN: text under names ending in token, key, password ..., URLs with a
    password, known forms of keys.

    Values are bool, int, float or str (other values as JSON), which every tracker can store; None is left out.

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
    """`value` with HIDDEN in place of text that is a secret by its own form or by its key; numbers are none."""
    if isinstance(value, Mapping):
        return {name: _mask(key if _SECRET_NAME.search(key) else str(name), item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(key, item) for item in value]
    if isinstance(value, str) and value and not _REFERENCE.fullmatch(value) and (_SECRET_NAME.search(key) or _SECRET_VALUE.search(value)):
        return HIDDEN
    return value
