"""Reading a checkpoint that a running training may remove meanwhile.

The files are opened first, and read through these handles: removing a file takes its name, not what is held open. Nothing is
written beside the checkpoint, so it may lie in somebody else's folder, or on a read-only disk.
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
_SPARE = 256  # handles for everything else


class Removed(Exception):
    """The checkpoint was removed before all of its files were open."""


@contextmanager
def hold_open(path: Path) -> Iterator[Path]:
    """Yield a folder that reads as the complete checkpoint `path` until the end of the block, whatever becomes of `path`.

    Raises UserError for what is no complete checkpoint, Removed for one that goes while it is being opened. Where the system has no
    /proc, or not enough handles, it is `path` itself.
    """
    with ExitStack() as stack:
        try:
            names = [marker.MARKER, *marker.read(path)]
            if not _HANDLES.is_dir() or not _can_open(len(names)):
                yield path
                return
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridtrain-"))) / path.resolve().name
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
    """Whether `path` has the name that the manager gives, which it takes away by a rename before the files go."""
    return not path.exists() and path.name.startswith("step-")


def _can_open(count: int) -> bool:
    """Whether so many files can be open at once; raises the soft limit where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            return False
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return True
