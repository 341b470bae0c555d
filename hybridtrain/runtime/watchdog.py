"""Ends a rank whose step takes too long, and writes the stacks of all its threads to a file.

The rank that hangs and the ranks that wait for it time out together; `failure.root_cause` tells them apart by
their stacks. A Python thread does this, so that it can also write the reason. If that thread cannot run,
Python's faulthandler does it a little later from C, which needs neither the main thread nor the GIL.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hybridtrain.runtime.files import unwritable

_FALLBACK_S = 30.0
"""Seconds after the limit at which faulthandler ends the process."""


class Watchdog:
    """Ends the process `limit_s` seconds after the last `beat` (0: never).

    `hung` is called in a thread before, with the stacks written.
    """

    def __init__(self, file: Path, *, limit_s: float, hung: Callable[[], None]):
        self.limit_s, self._hung, self._until = limit_s, hung, float("inf")
        self._closed = threading.Event()
        self._file = None
        if limit_s:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._file = file.open("w")  # opened now: later the disk may be full or the mount lost
            except OSError as error:
                raise unwritable("run.dir", file.parent, error) from error
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Restart the clock."""
        if self._file:
            self._until = time.monotonic() + self.limit_s
            faulthandler.dump_traceback_later(self.limit_s + _FALLBACK_S, exit=True, file=self._file)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._file:
            self._until = float("inf")
            faulthandler.cancel_dump_traceback_later()
            self._file.close()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, max(0.02, self._until - time.monotonic()))):
            if time.monotonic() >= self._until:
                assert self._file is not None
                faulthandler.dump_traceback(file=self._file, all_threads=True)
                try:
                    self._hung()
                finally:
                    os._exit(1)
