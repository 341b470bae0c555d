"""Worker processes of `prepare`: each tokenizes pieces one after the other, in one thread, and writes them.

    this process                         worker
      Piece  ------------------------->    write_piece
             <-------------------------    (bytes, tokens) after each batch, then PieceDone, or the exception

Workers are spawned, not forked, because of this process's threads. A worker fails at its next report if this
process has ended; if a worker ends, so do the others. Complete pieces stay.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from hybridtrain.data.prepare.pieces import Encode, Piece, write_piece
from hybridtrain.data.prepare.progress import ProgressMeter
from hybridtrain.data.prepare.recipe import Recipe
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import host

SMALL_BYTES = 32 << 20  # with less text, starting processes takes longer than they save


@dataclass(frozen=True)
class PieceDone:
    """Message of a worker: its piece is complete."""


@dataclass(frozen=True)
class Work:
    """Settings of a worker."""

    partial: Path
    recipe: Recipe
    encoder: Callable[[Path, Recipe], Encode]
    """Creates the encoder in the worker process; a module-level function, so that it can be pickled."""


def tokenize(pieces: list[Piece], *, work: Work, processes: int) -> ProgressMeter:
    """Write all pieces that do not exist yet, and print progress.

    `processes`: number of workers; 0: one per core, or for a small corpus no additional process.
    """
    meter = ProgressMeter(sum(piece.size for piece in pieces))
    missing = []
    for piece in pieces:
        if piece.folder(work.partial).exists():
            meter.skip(piece.size)
        else:
            missing.append(piece)
    size = sum(piece.size for piece in missing)
    if missing and processes == 0 and (size < SMALL_BYTES or host.cores() == 1):
        _in_this_process(missing, work=work, meter=meter)
    elif missing:
        _Pool(missing, work=work, meter=meter, processes=min(processes or host.cores(), len(missing))).run()
    meter.end()
    return meter


def _in_this_process(pieces: list[Piece], *, work: Work, meter: ProgressMeter) -> None:
    encode = work.encoder(work.partial, work.recipe)
    for piece in pieces:
        write_piece(
            piece,
            partial=work.partial,
            recipe=work.recipe,
            encode=encode,
            report=partial(meter.advance, piece.number),
        )
        meter.complete(piece.number, piece.size)


class _Worker:
    """A worker process, and the piece that it is working on."""

    def __init__(self, work: Work) -> None:
        context = get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, work), daemon=True)
        self.process.start()
        child_pipe.close()  # so that the end of the process ends the pipe
        self.piece: Piece | None = None

    def give(self, piece: Piece) -> None:
        self.piece = piece
        with suppress(BrokenPipeError):  # it has ended: the next read of its pipe reports that
            self.pipe.send(piece)


class _Pool:
    """Gives each worker a piece as it becomes free."""

    def __init__(self, pieces: list[Piece], *, work: Work, meter: ProgressMeter, processes: int) -> None:
        self._waiting = deque(pieces)
        self._meter = meter
        self._workers = [_Worker(work) for _ in range(processes)]

    def run(self) -> None:
        """Work until all pieces are complete. Raises the exception of a worker.

        Ends all workers in any case.
        """
        try:
            for worker in self._workers:
                worker.give(self._waiting.popleft())
            while busy := {worker.pipe: worker for worker in self._workers if worker.piece}:
                for pipe in wait(list(busy)):
                    self._receive(busy[pipe])  # type: ignore[index]
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()

    def _receive(self, worker: _Worker) -> None:
        assert worker.piece is not None
        try:
            message = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise _lost_worker(worker, processes=len(self._workers)) from None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, PieceDone):
            self._meter.complete(worker.piece.number, worker.piece.size)
            worker.piece = None
            if self._waiting:
                worker.give(self._waiting.popleft())
        else:
            self._meter.advance(worker.piece.number, *message)


def _lost_worker(worker: _Worker, *, processes: int) -> UserError:
    worker.process.join()
    assert worker.piece is not None
    units = worker.piece.units
    code = worker.process.exitcode or 0
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return refusal(
        "prepare.workers",
        processes,
        f"one of the processes ended {how} while it read {units[0].source.path}"
        + (f" to {units[-1].source.path}" if len(units) > 1 else ""),
        allowed="processes with enough memory for their text",
        instead=(
            "the same command again, which continues from here; with fewer prepare.workers if memory ran out"
        ),
    )


def _serve(pipe: Connection, work: Work) -> None:
    """The worker process."""
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    with suppress(BrokenPipeError, EOFError):
        try:
            encode = work.encoder(work.partial, work.recipe)
            while True:
                piece = pipe.recv()
                write_piece(
                    piece,
                    partial=work.partial,
                    recipe=work.recipe,
                    encode=encode,
                    report=lambda size, tokens: pipe.send((size, tokens)),
                )
                pipe.send(PieceDone())
        except (BrokenPipeError, EOFError):
            raise
        except (UserError, OSError) as error:
            pipe.send(error)
        except Exception as error:
            pipe.send(RuntimeError(f"a worker failed\n{''.join(traceback.format_exception(error))}"))
