"""Ends a rank whose step takes too long, with the stacks of all its threads in a file.

The rank that hangs and those that wait for it run out of time together; `failure.first` tells them apart by their stacks. Python's
faulthandler does it from a C thread, which needs neither the main thread nor the interpreter lock.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path

from hybridtrain.files import unwritable


class Watchdog:
    """`beat` starts the clock anew. `limit_s` 0: never."""

    def __init__(self, file: Path, *, limit_s: float):
        self.limit_s = limit_s
        self._file = None
        if limit_s:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._file = file.open("w")  # stays open: the C thread writes to its descriptor
            except OSError as error:
                raise unwritable("run.dir", file.parent, error) from error

    def beat(self) -> None:
        """Something ended; the next thing may take limit_s."""
        if self._file:
            faulthandler.dump_traceback_later(self.limit_s, exit=True, file=self._file)

    def close(self) -> None:
        """Stop watching."""
        if self._file:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
