"""The lock of a run directory: only one process trains in it.

    runs/<name>/lock   {"host", "pid", "machine", "born", "job", "chain", "attempt", "since", "every",
                       "token", "beat"}

The process that trains holds an flock on the file, which the kernel releases when the process ends, however
it ends. Not every network file system makes flock visible to other hosts, so a thread also increments `beat`
every BEAT_S seconds (the heartbeat). A process that finds a lock acts by its content:

    holder on the same machine        alive: refused; dead: taken over at once
    holder is this job, requeued      taken over at once
    holder on another host            heartbeat continues: refused; MISSED heartbeats missing: taken over

A process whose lock was taken over (its host was frozen) notices at its next heartbeat, and ends before it
writes again. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

from hybridtrain.errors import UserError, refusal
from hybridtrain.run.holder import Holder, is_dead, is_requeue, parse, this_process
from hybridtrain.runtime import log
from hybridtrain.runtime.files import unwritable

_log = log.get("run")
NAME = "lock"
MISSED = 3
"""Heartbeats that must be missing before another host's lock is taken over."""
FLOCK = True
"""False: do not use flock, as on a file system without it."""
_SETTLE_S = 1.0
"""How long a new lock file may be empty, and how long to wait for the winner when two processes take over
at the same time."""
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_BYTES = 1 << 16


class Lock:
    """A lock that this process holds until `release`; a thread writes the heartbeat."""

    def __init__(self, folder: Path, *, handle: int, holder: Holder) -> None:
        self.folder, self.holder = folder, holder
        self.handle, self._released = handle, threading.Event()
        self._lost: Holder | None = None
        self._thread = threading.Thread(target=self._heartbeat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if another process has taken over the run: this one must not write any more."""
        if self._lost is not None:
            problem = (
                f"{self._lost} has taken it over from this one ({self.holder}), which gave no sign of life"
            )
            instead = f"leave it to that one, or {self._lost.kill_command}"
            raise refusal(
                "run.dir", self.folder, problem, allowed="one training in a run directory", instead=instead
            )

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._lost is None and _same_file(self.handle, self.folder / NAME):
                (self.folder / NAME).unlink()
        os.close(self.handle)

    def _heartbeat(self) -> None:
        while not self._released.wait(self.holder.every):
            self.holder = replace(self.holder, beat=self.holder.beat + 1)
            with contextlib.suppress(OSError):  # a full disk: the next beat tries again
                now = read(self.folder)
                if now is not None and now.token != self.holder.token:
                    self._lost = now
                    return
                _write(self.handle, self.holder)


def read(folder: Path) -> Holder | None:
    """The holder named in the lock of `folder`; None if the lock is missing or unreadable."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | _PLAIN)
    except OSError:
        return None
    try:
        return parse(os.pread(handle, _MOST_BYTES, 0))
    except OSError:
        return None
    finally:
        os.close(handle)


def is_foreign(folder: Path) -> bool:
    """Whether the file called `lock` is not ours: it has content that does not start like a lock's."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | _PLAIN)
    except OSError:
        return os.path.lexists(folder / NAME)
    try:
        data = os.pread(handle, _MOST_BYTES, 0).strip(b"\0 \n")
    except OSError:
        return True
    finally:
        os.close(handle)
    return bool(data) and not data.startswith(b'{\n "host"')


def alive(folder: Path) -> bool | None:
    """Whether the holder is alive, as far as can be told without waiting; None without a
    lock, or if unknown."""
    holder = read(folder)
    if holder is None:
        return None
    if (dead := is_dead(holder)) is not None:
        return not dead
    with contextlib.suppress(OSError):
        return time.time() - (folder / NAME).stat().st_mtime < (MISSED + 1) * holder.every
    return None


def holder_elsewhere(folder: Path) -> Holder | None:
    """The live process of another job (or of none) that trains in `folder`; None: this
    job may start there."""
    holder = read(folder)
    return (
        holder if holder is not None and alive(folder) and not is_requeue(this_process(), of=holder) else None
    )


def in_use(folder: Path, *, by: Holder | None) -> UserError:
    """The error for a run directory in which another process trains."""
    problem, end = (
        (f"{by} trains here since {by.when}", by.kill_command)
        if by
        else ("another process trains here", "end that process")
    )
    return refusal(
        "run.dir",
        folder,
        problem,
        allowed="one training in a run directory",
        instead=f"wait for it; {end}; another run.dir (run.name=NAME)",
    )


def acquire(folder: Path, *, takeover: bool) -> Lock:
    """Take the lock of an existing folder, also from a dead process; with `takeover`, from any process.

    Raises UserError if a live process holds it, or the folder cannot be written.
    """
    own, until = this_process(), time.monotonic() + 2 * _SETTLE_S
    while True:
        try:
            handle, created = _open(folder / NAME)
        except OSError as error:
            raise unwritable("run.dir", folder, error) from error
        lock = None
        try:
            lock = _try(
                folder,
                handle=handle,
                created=created,
                own=own,
                takeover=takeover,
                patient=time.monotonic() < until,
            )
        finally:
            if lock is None or lock.handle != handle:
                os.close(handle)
        if lock is not None:
            return lock
        time.sleep(_SETTLE_S / 10)


def _try(
    folder: Path, *, handle: int, created: bool, own: Holder, takeover: bool, patient: bool
) -> Lock | None:
    """Take the lock through `handle`, or by replacing the file; None: try again.

    Raises UserError if a live process holds it.
    """
    free, file = _flock(handle), folder / NAME
    if free and not _same_file(handle, file):
        return None
    holder = parse(os.pread(handle, _MOST_BYTES, 0))
    dead = is_dead(holder) if holder else None
    ours = takeover or (holder is not None and is_requeue(own, of=holder))
    if free or (free is None and created):
        if holder and not ours and dead is None and not _heartbeat_stopped(folder, holder=holder):
            raise in_use(folder, by=read(folder) or holder)
        return _take_file(folder, handle=handle, own=own, locked=bool(free))
    if not ours:
        if (holder is None or (dead and free is False)) and patient:
            return None  # the new holder may not have written the file yet
        gone = (
            dead
            or (holder is None and free is None)
            or (holder is not None and dead is None and _heartbeat_stopped(folder, holder=holder))
        )
        if not gone:
            raise in_use(folder, by=read(folder) or holder)
    return _replace_file(folder, own=own, before=holder)


def _take_file(folder: Path, *, handle: int, own: Holder, locked: bool) -> Lock | None:
    """Write this process into the open lock file; None if that file was removed or replaced meanwhile."""
    try:
        _write(handle, own)
    except OSError as error:
        # A crash's leftovers may fill the disk. They are removed once the lock is held; the next heartbeat
        # writes the file.
        if not locked or error.errno not in _FULL:
            raise unwritable("run.dir", folder, error) from error
    return Lock(folder, handle=handle, holder=own) if _same_file(handle, folder / NAME) else None


def _replace_file(folder: Path, *, own: Holder, before: Holder | None) -> Lock | None:
    """Take over with a new lock file, where the old one cannot be locked.

    None: another process was faster.
    """
    temporary = folder / f".{NAME}.{own.token}"
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unwritable("run.dir", folder, error) from error
    lock = None
    try:
        locked = _flock(handle)
        _write(handle, own)
        now = read(folder)
        if (now.token if now else "") != (before.token if before else ""):
            return None
        os.replace(temporary, folder / NAME)
        if not locked:
            time.sleep(_SETTLE_S)  # of two processes that did this at once, the later one's file remains
        if _same_file(handle, folder / NAME):
            if before is not None:
                _log.warning("%s is taken over from %s", folder, before)
            lock = Lock(folder, handle=handle, holder=own)
        return lock
    except OSError as error:
        raise unwritable("run.dir", folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if lock is None:
            os.close(handle)


def _heartbeat_stopped(folder: Path, *, holder: Holder) -> bool:
    """Whether MISSED heartbeats of a process on another host do not come.

    Waits for them, with a countdown in the log.
    """
    start, limit = time.monotonic(), MISSED * holder.every
    logged = limit + 1
    while (left := limit - (time.monotonic() - start)) > 0:
        if left <= logged - holder.every or logged > limit:
            logged = left
            _log.warning(
                (
                    "%s is locked by %s: without a sign of life "
                    "it is taken over in %.0f s (run.takeover=true: at once)"
                ),
                folder,
                holder,
                left,
            )
        time.sleep(min(left, 1.0, holder.every / 4))
        now = read(folder)
        if now is not None and (now.token, now.beat) != (holder.token, holder.beat):
            return False
        if now is None and not (folder / NAME).exists():  # released
            return True
    return True


def _open(file: Path) -> tuple[int, bool]:
    """(file descriptor, whether the file is new). Symbolic links are not followed: their target is not ours.

    Raises OSError.
    """
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
    except FileExistsError:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | _PLAIN, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(file))
    return handle, False


def _flock(handle: int) -> bool | None:
    """Take the flock; returns whether that succeeded, None where flock is not supported."""
    if not FLOCK:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _same_file(handle: int, file: Path) -> bool:
    """Whether `file` is still the file that the handle has open; it may have been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except OSError:
        return False


def _write(handle: int, holder: Holder) -> None:
    data = (json.dumps(asdict(holder), indent=1) + "\n").encode()
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.fsync(handle)
