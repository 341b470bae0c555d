"""Progress of `prepare`, on stderr; the result of the command is on stdout."""

from __future__ import annotations

import sys
import time


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


class ProgressMeter:
    """The progress line: rewritten in place on a terminal, else a new line every 10 s, and one at the end."""

    def __init__(self, total: int) -> None:
        self.tokens = 0
        """Tokens written by this call."""
        self.size = 0
        """Bytes of their text."""
        self._total, self._skipped, self._done = total, 0, 0
        self._under_way: dict[int, int] = {}
        self._start = time.perf_counter()
        self._shown = self._start
        self._terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def skip(self, size: int) -> None:
        """Record that an earlier call processed `size` bytes of text."""
        self._skipped += size

    def advance(self, piece: int, size: int, tokens: int) -> None:
        """Record that `size` more bytes of a piece became `tokens` tokens; print the progress line
        from time to time.
        """
        self._under_way[piece] = self._under_way.get(piece, 0) + size
        self.size += size
        self.tokens += tokens
        if time.perf_counter() - self._shown > (0.2 if self._terminal else 10):
            self._show(end="" if self._terminal else "\n")

    def complete(self, piece: int, planned: int) -> None:
        """Record that a piece of `planned` bytes is done."""
        self._under_way.pop(piece, None)
        self._done += planned

    def end(self) -> None:
        """Print the last line, with the actual number of bytes; earlier lines have estimates,
        e.g. for compressed files.
        """
        line = f"tokenized {self.size / 1e6:.1f} MB of text in {self.seconds:.1f} s" + (
            ", the rest by an earlier call" if self._skipped else ""
        )
        print(f"\r\x1b[K{line}" if self._terminal else line, file=sys.stderr, flush=True)

    def _show(self, *, end: str) -> None:
        self._shown = time.perf_counter()
        spent = max(self.seconds, 1e-9)
        fresh = min(self._done + sum(self._under_way.values()), self._total - self._skipped)
        have, rate = fresh + self._skipped, fresh / spent
        left = (self._total - have) / rate if rate else 0
        line = (
            f"tokenizing {100 * have / self._total:3.0f}%  "
            f"{have / 1e6:.1f} of about {self._total / 1e6:.1f} MB  "
            f"{self.tokens / spent:,.0f} tokens/s  {left:.0f} s left"
        )
        print(f"\r\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)
