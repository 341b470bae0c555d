"""The wish to stop: a signal, or the coming end of the job's time, sets a flag on which all ranks agree between two steps.

    first signal       the step is finished, a checkpoint written, the run ends as `preempted` or `interrupted`, exit code 0
    a second signal    this process ends at once

A thread reads the signals, so that the second one works while the main thread waits in a collective. Nothing is saved inside a
handler: a signal reaches ranks in different steps, and some ranks not at all.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from hybridtrain.runtime import launch

TOGETHER_S = 2.0
"""Signals this close to each other are one: a scheduler signals every process, and the launcher passes it on once more."""
_TIME_IS_UP = 1000  # above every signal number


class Stop:
    """Installs the handlers while it is entered. `signals`: names such as "USR1"; `before_s`: how long before the deadline to stop."""

    def __init__(self, signals: list[str], *, before_s: float):
        self.numbers = [getattr(signal, f"SIG{name}") for name in signals]
        self.deadline = launch.deadline() - before_s
        self.reason = ""
        """Why the ranks have agreed to stop; empty: they have not."""
        self.status = ""
        """interrupted: by a person; preempted: by the scheduler, or whoever wants the machine for a while."""
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._end, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        for number in self.numbers:
            self._before[number] = signal.signal(number, _noted_by_the_thread)
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._theirs.close()  # the thread reads the end of file and leaves

    def _read(self) -> None:
        first = 0.0
        while heard := self._end.recv(1):
            if heard[0] not in self.numbers:
                continue
            if not first:
                first, self._signal = time.monotonic(), heard[0]
            elif time.monotonic() - first > TOGETHER_S:
                os._exit(128 + heard[0])

    def agreed(self) -> str:
        """Why to stop after this step, the same on every rank; empty: go on (collective)."""
        code = torch.tensor(self._signal or (_TIME_IS_UP if time.time() > self.deadline else 0))
        if dist.is_initialized():
            dist.all_reduce(code, op=dist.ReduceOp.MAX)
        if number := int(code):
            self.status = "interrupted" if number == signal.SIGINT or (number == signal.SIGTERM and not os.environ.get("SLURM_JOB_ID")) else "preempted"
            self.reason = "the job's time is nearly up" if number == _TIME_IS_UP else f"{signal.Signals(number).name} received"
            if number == signal.SIGINT:
                self.reason = "stopped by Ctrl-C (SIGINT received)"
        return self.reason


def _noted_by_the_thread(number: int, frame: object) -> None:
    """In place of the default, which would end the process; the byte that Python writes for the thread is what counts."""
