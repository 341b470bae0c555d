"""Logging per rank (the rank is the launcher's RANK; no torch).

On the console rank 0 prints from INFO on, other ranks only errors, with their rank.
`setup` with a folder adds logs/rank-<r>.log with all that a rank logs, also warnings of other libraries.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from hybridtrain.runtime.files import unwritable

ROOT = "hybridtrain"
CHATTY = ("transformers", "torch", "accelerate", "huggingface_hub", "py.warnings")


def rank() -> int:
    """This process's rank as set by the launcher (torchrun, srun); 0 without a launcher."""
    given = os.environ.get("RANK", "")
    return int(given) if given.isascii() and given.isdecimal() else 0  # `launch.check` refuses other values


def get(name: str) -> logging.Logger:
    """The logger hybridtrain.<name>."""
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def setup(logs_dir: Path | None) -> None:
    """Set up the console and, with `logs_dir`, this rank's file <logs_dir>/rank-<r>.log, which is appended
    to. May be called again.

    Raises UserError if the file cannot be written.
    """
    ours = logging.getLogger(ROOT)
    ours.setLevel(logging.DEBUG)
    ours.propagate = False
    _replace(ours, _console())
    logging.captureWarnings(rank() != 0)  # a warning that all ranks raise is printed by rank 0 alone
    if rank() != 0:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name in CHATTY:
            chatty = logging.getLogger(name)
            chatty.setLevel(logging.WARNING)
            chatty.propagate = False
            _replace(chatty, logging.NullHandler())
    for name in CHATTY:  # the file of a run before in the same process
        for old in [handler for handler in logging.getLogger(name).handlers if isinstance(handler, _File)]:
            logging.getLogger(name).removeHandler(old)
            old.close()
    if logs_dir is not None:
        try:
            logs_dir.mkdir(parents=True, exist_ok=True)
            file = _File(logs_dir / f"rank-{rank()}.log", encoding="utf-8")
        except OSError as error:
            raise unwritable("run.dir", logs_dir, error) from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
        for name in (ROOT, *CHATTY):
            logging.getLogger(name).addHandler(file)


def _console() -> logging.Handler:
    # To stdout, so that in a pipe or a job's output file log lines and what the command prints keep their
    # order.
    handler = _Console(sys.stdout if rank() == 0 else sys.stderr)
    handler.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    handler.setFormatter(
        _Plain() if rank() == 0 else logging.Formatter(f"[rank {rank()}] %(levelname)s %(name)s: %(message)s")
    )
    return handler


class _Forgiving(logging.Handler):
    """Drops lines, without tracebacks, when the console is closed (`| head`) or the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not _is_of_the_place(sys.exc_info()[1]):
            super().handleError(record)


class _Console(_Forgiving, logging.StreamHandler):
    pass


class _File(_Forgiving, logging.FileHandler):
    pass


def _is_of_the_place(error: BaseException | None) -> bool:
    """Whether the destination is at fault (closed, disk full), not the log record."""
    return isinstance(error, OSError) or (isinstance(error, ValueError) and "closed file" in str(error))


class _Plain(logging.Formatter):
    """INFO without its level; anything above with it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _replace(logger: logging.Logger, handler: logging.Handler) -> None:
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
