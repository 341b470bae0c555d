"""Logging that knows its rank (from the launcher's RANK, without torch).

Rank 0 speaks on the console from INFO up; other ranks only when something is wrong, and then they say who they are.
`setup` with a folder adds logs/rank-<r>.log, in which every rank keeps everything, warnings of other libraries included.
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
    """This process's rank as the launcher (torchrun, Slurm through our script) tells it; 0 without one."""
    given = os.environ.get("RANK", "")
    return int(given) if given.isascii() and given.isdecimal() else 0  # `launch.check` has refused what is no number


def get(name: str) -> logging.Logger:
    """The logger of a part, e.g. get("train") -> hybridtrain.train."""
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def setup(logs_dir: Path | None) -> None:
    """Set up the console and, with a folder, this rank's file <logs_dir>/rank-<r>.log (appended to). May be called again."""
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
    # Progress goes to stdout, so that a pipe or a scheduler's file gets it in order with what the command prints.
    handler = _Console(sys.stdout if rank() == 0 else sys.stderr)
    handler.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    handler.setFormatter(_Plain() if rank() == 0 else logging.Formatter(f"[rank {rank()}] %(levelname)s %(name)s: %(message)s"))
    return handler


class _Forgiving(logging.Handler):
    """A console that is closed (`| head`) or a disk without space costs its lines, not a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not _is_of_the_place(sys.exc_info()[1]):
            super().handleError(record)


class _Console(_Forgiving, logging.StreamHandler):
    pass


class _File(_Forgiving, logging.FileHandler):
    pass


def _is_of_the_place(error: BaseException | None) -> bool:
    """Whether a line could not be written because of where it goes; what is wrong with the line itself is our mistake."""
    return isinstance(error, OSError) or (isinstance(error, ValueError) and "closed file" in str(error))


class _Plain(logging.Formatter):
    """INFO as it is; anything above it with its level in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _replace(logger: logging.Logger, handler: logging.Handler) -> None:
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
