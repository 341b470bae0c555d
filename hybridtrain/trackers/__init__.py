"""Trackers (wandb, TensorBoard and others) through accelerate's tracker classes. A tracker never stops, slows or fails a training run.

    training thread ── start, log, finish ──> one queue per tracker ──> one daemon thread per tracker ──> wandb, TensorBoard ...

Whatever may raise or hang happens on the tracker's own thread; what goes wrong there costs one warning. Only rank 0 tracks.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

from hybridtrain.trackers.kinds import KINDS

_log = logging.getLogger(__name__)

FINISH_S = 30.0  # all trackers together may hold up the end of the run for so long

_NOT_PLOTTED = ("step", "time")  # the x axis, and the trackers have clocks of their own
_SECRET_NAME = re.compile(r"(^|_)(token|key|password|passwd|passphrase|secret|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/\s]*:[^/\s]*@|^(hf_|sk-|ghp_|github_pat_)\w{8,}")


class Trackers:
    """The trackers of a run. Without `start`, or on another rank than 0, `log` and `finish` do nothing."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def start(self, kinds: Sequence[str], *, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Open the trackers called `kinds` in the background; their files go to `folder`/<kind>.

        `config` may be nested; it is stored with the run, flat and without what looks like a secret.
        """
        if os.environ.get("RANK", "0") != "0" or not kinds:
            return
        values = public(config)
        for kind in kinds:
            row, place = KINDS[kind], (folder / kind).resolve()
            try:
                place.mkdir(parents=True, exist_ok=True)
                for variable, value in row.environment(place).items():
                    os.environ.setdefault(variable, value)
                # Imported here: two threads inside one import with cycles can see half a module.
                for module in ("accelerate.tracking", *row.modules):
                    importlib.import_module(module)
                _accelerate_state()
            except Exception as error:
                _warn(kind, error)
                continue
            self._workers.append(_Worker(kind, row.open, project=project, name=name, folder=place, config=values))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Hand the numbers of `values` over to every tracker; returns at once. What is None or not finite is left out."""
        numbers = {key: value for key, value in values.items() if key not in _NOT_PLOTTED and isinstance(value, int | float) and math.isfinite(value)}
        for worker in self._workers:
            worker.log(numbers, step)

    def finish(self) -> None:
        """Write out what was logged; takes FINISH_S at most."""
        deadline = time.monotonic() + FINISH_S
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join(deadline)
        self._workers = []


class _Worker:
    """One tracker on its own daemon thread, which ends at the first failure."""

    def __init__(self, kind: str, open_tracker: Callable[..., Any], *, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        self._kind = kind
        self._queue: SimpleQueue[tuple[dict[str, Any], int] | None] = SimpleQueue()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, args=(open_tracker, project, name, folder, config), name=f"tracker-{kind}", daemon=True)
        self._thread.start()

    def _work(self, open_tracker: Callable[..., Any], project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        try:
            tracker = open_tracker(project, name=name, folder=folder)
            tracker.start()
            tracker.store_init_configuration(config)
            while (row := self._queue.get()) is not None:
                values, step = row
                tracker.log(values, step=step)
            tracker.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._given_up:
            self._given_up = True
            _warn(self._kind, error)

    def log(self, values: dict[str, Any], step: int) -> None:
        if not self._given_up:
            self._queue.put((values, step))

    def close(self) -> None:
        self._queue.put(None)

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(TimeoutError(f"not finished after {FINISH_S:.0f} s"))


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
    """`config` flat, with dotted keys, without secrets: names ending in token, key, password ..., URLs with a password, known key forms.

    Values are bool, int, float or str (other values as JSON), which every tracker can store; None is left out.

    >>> public({"optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "hub_token": "abc"})
    {'optim.lr': 0.1, 'optim.betas': '[0.9, 0.95]'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if _SECRET_NAME.search(str(key)):
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in public(value).items()}
        elif isinstance(value, bool | int | float | str):
            flat[str(key)] = value
        elif value is not None:
            flat[str(key)] = json.dumps(value, default=str)
    return {key: value for key, value in flat.items() if not (isinstance(value, str) and _SECRET_VALUE.search(value))}
