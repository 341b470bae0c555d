"""Reads a checkpoint that a running training may remove at the same time.

All files are opened first and read through these handles, since an open file stays readable after its name is
removed. Nothing is written beside the checkpoint: its folder may be read-only.
"""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hybridtrain.checkpoint import marker
from hybridtrain.errors import UserError

_HANDLES = Path("/proc/self/fd")
_SPARE = 256  # file handles for other uses


class Removed(Exception):
    """The checkpoint was removed before all of its files were open."""


@contextmanager
def hold_open(path: Path) -> Iterator[Path]:
    """Yield a folder of links to the files of the complete checkpoint `path`, readable in the block even
    if `path` is removed.

    Raises UserError if `path` is no complete checkpoint, Removed if it is removed while it is being opened.
    Without /proc, or with too few file handles, yields `path` itself.
    """
    with ExitStack() as stack:
        try:
            names = [marker.MARKER, *marker.read(path)]
            if not _HANDLES.is_dir() or not _can_open(len(names)):
                yield path
                return
            folder = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridtrain-")))
                / path.resolve().name
            )
            folder.mkdir()
            for name in names:
                if not (path / name).is_file() and path.is_dir() and (path / marker.MARKER).is_file():
                    raise marker.damaged(path, name, "it is missing")
                stream = stack.enter_context((path / name).open("rb"))
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(f"/proc/{os.getpid()}/fd/{stream.fileno()}")
        except UserError:
            if (path / marker.MARKER).is_file() or not _is_being_removed(path):
                raise
            raise Removed(path) from None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                raise Removed(path) from error
            raise marker.damaged(path, "files", str(error)) from error
        try:
            yield folder
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(path))) from error


def _is_being_removed(path: Path) -> bool:
    """Whether the folder of a checkpoint is gone: the manager renames a checkpoint before
    it removes its files.
    """
    return not path.exists() and path.name.startswith("step-")


def _can_open(count: int) -> bool:
    """Whether `count` files can be open at once; raises the soft limit if needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            return False
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return True
