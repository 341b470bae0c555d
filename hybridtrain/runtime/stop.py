"""Requests to stop.

A signal or the job's time limit raises a flag (runtime/flags.py), which all ranks see after the same step.

    first signal     the current step and the next one (on a GPU two) are finished, a checkpoint is written,
                     and the run ends as `preempted` or `interrupted`, with exit code 0
    second signal    this process ends at once

A thread reads the signals, so that the second one works while the main thread waits in a collective. Nothing
is saved inside a signal handler: a signal reaches ranks in different steps, and some ranks not at all.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from hybridtrain.runtime import launch, log

_log = log.get("train")

TOGETHER_S = 2.0
"""Seconds within which several signals count as one: a scheduler signals every process, and the launcher
forwards it once more."""
STOPPED = "HYBRIDTRAIN_STOPPED"
"""Variable with a file that the job script creates when it is told to stop: the signal may come before ranks
take signals."""
_DEADLINE, _REQUESTED = "deadline", "requested"


class Stop:
    """A context manager that installs the handlers.

    `signals`: names such as "USR1", first that of a scheduler; `before_s`: seconds before the deadline to
    stop.
    """

    def __init__(self, signals: list[str], *, before_s: float):
        numbers = [getattr(signal, f"SIG{name}") for name in signals]
        self.first, self.numbers = numbers[0], sorted(set(numbers), reverse=True)
        self.flags = (_DEADLINE, *(number.name for number in self.numbers), _REQUESTED)
        """Reasons to stop, in the order of their priority where ranks have different ones."""
        self.deadline = launch.deadline() - before_s
        self.reason = ""
        """Why all ranks stop, for people; empty: they do not."""
        self.status = ""
        """interrupted: by a person; preempted: by the scheduler or a signal; finished: by the program."""
        self._signal = 0
        self._requested = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._handles_signals = threading.current_thread() is threading.main_thread()
        if not self._handles_signals:
            _log.warning(
                "training runs in a thread of its own: "
                "Python gives signals to the main thread, and none stops this run with a checkpoint"
            )
            return self
        self._read_end, self._write_end = socket.socketpair()
        self._write_end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        for number in self.numbers:
            self._before[number] = signal.signal(number, _leave_to_thread)
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        if (file := os.environ.get(STOPPED)) and os.path.exists(file):
            self._signal = self._signal or self.first
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._handles_signals:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write_end.close()  # the thread reads end of file and returns

    def _read(self) -> None:
        first = 0.0
        while received := self._read_end.recv(1):
            if received[0] not in self.numbers:
                continue
            if not first:
                first, self._signal = time.monotonic(), received[0]
            elif time.monotonic() - first > TOGETHER_S:
                os._exit(128 + received[0])

    def ask(self, reason: str) -> None:
        """Have all ranks stop after the next step. Only this rank knows `reason`."""
        self._requested = reason or "a callback asked for it"

    def reason_here(self) -> str | None:
        """This rank's reason to stop, one of `flags`."""
        if self._signal:
            return signal.Signals(self._signal).name
        return _DEADLINE if time.time() > self.deadline else _REQUESTED if self._requested else None

    def agree(self, counts: Mapping[str, int]) -> bool:
        """Whether to stop after this step; sets `status` and `reason`.

        `counts`: flag -> ranks that raised it, the same on every rank.
        """
        flag = next((flag for flag in self.flags if counts.get(flag)), None)
        if flag is not None:
            self.status, self.reason = self._meaning(flag)
        return flag is not None

    def _meaning(self, flag: str) -> tuple[str, str]:
        """Status and reason that belong to a flag."""
        if flag == _REQUESTED:
            return "finished", self._requested or "a callback of another rank asked for it"
        by_a_person = flag == "SIGINT" or (flag == "SIGTERM" and not os.environ.get("SLURM_JOB_ID"))
        words = {_DEADLINE: "the job's time is nearly up", "SIGINT": "stopped by Ctrl-C (SIGINT received)"}
        return "interrupted" if by_a_person else "preempted", words.get(flag, f"{flag} received")


def _leave_to_thread(number: int, frame: object) -> None:
    """Does nothing, unlike the default, which ends the process: Python writes the signal's number to the pipe
    that the thread reads.
    """
