"""One run, one writer: the lock of a run directory.

    runs/<name>/lock   {"host", "pid", "machine", "born", "job", "chain", "attempt", "since", "every", "token", "beat"}

The process that trains holds the file with flock, which the system drops when the process ends, however it ends. Not every network file
system carries flock to other hosts, so a thread also counts `beat` up every BEAT_S seconds. Who finds a lock decides by what it says:

    the same machine                  the process is alive: refused; dead: taken over at once
    the same job, requeued            taken over at once
    another host                      refused when the beat goes on; taken over after MISSED beats that did not come

Whoever lost the lock meanwhile (a host that was frozen) learns it at its next beat, and ends before it writes again. No torch.
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
from hybridtrain.run.holder import Holder, is_dead, is_requeue, parsed, this_process
from hybridtrain.runtime import log
from hybridtrain.runtime.files import unwritable

_log = log.get("run")
NAME = "lock"
MISSED = 3
"""Beats that must fail to come before another host's lock is taken over."""
FLOCK = True
"""False: do without flock, as on a file system that does not have it."""
_SETTLE_S = 1.0
"""How long a lock that is being written may be without content, and after how long two that took over at once know which of them has it."""
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_BYTES = 1 << 16


class Lock:
    """A lock that this process holds. `release` gives it back; until then a thread shows that the process is alive."""

    def __init__(self, folder: Path, *, handle: int, holder: Holder) -> None:
        self.folder, self.holder = folder, holder
        self.handle, self._released = handle, threading.Event()
        self._lost: Holder | None = None
        self._thread = threading.Thread(target=self._beats, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError when another process has taken the run over: nothing may be written any more."""
        if self._lost is not None:
            problem = f"{self._lost} has taken it over from this one ({self.holder}), which gave no sign of life"
            raise refusal("run.dir", self.folder, problem, allowed="one training in a run directory", instead=f"leave it to that one, or {self._lost.ends_by}")

    def release(self) -> None:
        """Give the lock back; does nothing the second time."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._lost is None and _same_file(self.handle, self.folder / NAME):
                (self.folder / NAME).unlink()
        os.close(self.handle)

    def _beats(self) -> None:
        while not self._released.wait(self.holder.every):
            self.holder = replace(self.holder, beat=self.holder.beat + 1)
            with contextlib.suppress(OSError):  # a full disk: the next beat tries again
                now = read(self.folder)
                if now is not None and now.token != self.holder.token:
                    self._lost = now
                    return
                _write(self.handle, self.holder)


def read(folder: Path) -> Holder | None:
    """Who the lock of `folder` says trains there; None without a lock, or one that cannot be read."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | _PLAIN)
    except OSError:
        return None
    try:
        return parsed(os.pread(handle, _MOST_BYTES, 0))
    except OSError:
        return None
    finally:
        os.close(handle)


def is_foreign(folder: Path) -> bool:
    """Whether the file under our name holds something else: text, which a crash does not leave of a lock."""
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
    """Whether the process that the lock names is alive, as far as can be seen without waiting; None without a lock."""
    holder = read(folder)
    if holder is None:
        return None
    if (dead := is_dead(holder)) is not None:
        return not dead
    with contextlib.suppress(OSError):
        return time.time() - (folder / NAME).stat().st_mtime < (MISSED + 1) * holder.every
    return None


def holder_elsewhere(folder: Path) -> Holder | None:
    """The living process of another job (or of none) that trains in `folder`; None: this job may start there."""
    holder = read(folder)
    return holder if holder is not None and alive(folder) and not is_requeue(this_process(), of=holder) else None


def held(folder: Path, *, by: Holder | None) -> UserError:
    """The refusal of a run directory in which another process trains."""
    words, end = (f"{by} trains here since {by.when}", by.ends_by) if by else ("another process trains here", "end that process")
    return refusal("run.dir", folder, words, allowed="one training in a run directory", instead=f"wait for it; {end}; another run.dir (run.name=NAME)")


def acquire(folder: Path, *, takeover: bool) -> Lock:
    """Take the lock of an existing folder, from a dead process too; with `takeover` from whoever has it. Raises UserError: held, or unwritable."""
    own, until = this_process(), time.monotonic() + 2 * _SETTLE_S
    while True:
        try:
            handle, made = _opened(folder / NAME)
        except OSError as error:
            raise unwritable("run.dir", folder, error) from error
        lock = None
        try:
            lock = _taken(folder, handle=handle, made=made, own=own, takeover=takeover, patient=time.monotonic() < until)
        finally:
            if lock is None or lock.handle != handle:
                os.close(handle)
        if lock is not None:
            return lock
        time.sleep(_SETTLE_S / 10)


def _taken(folder: Path, *, handle: int, made: bool, own: Holder, takeover: bool, patient: bool) -> Lock | None:
    """The lock, if it can be had through `handle` or in place of it; None: look again. Raises UserError: held."""
    free, file = _flock(handle), folder / NAME
    if free and not _same_file(handle, file):
        return None
    holder = parsed(os.pread(handle, _MOST_BYTES, 0))
    dead = is_dead(holder) if holder else None
    ours = takeover or (holder is not None and is_requeue(own, of=holder))
    if free or (free is None and made):
        if holder and not ours and dead is None and not _stopped(folder, holder=holder):
            raise held(folder, by=read(folder) or holder)
        return _written(folder, handle=handle, own=own, locked=bool(free))
    if not ours:
        if (holder is None or (dead and free is False)) and patient:  # it may be just writing its name
            return None
        gone = dead or (holder is None and free is None) or (holder is not None and dead is None and _stopped(folder, holder=holder))
        if not gone:
            raise held(folder, by=read(folder) or holder)
    return _replaced(folder, own=own, before=holder)


def _written(folder: Path, *, handle: int, own: Holder, locked: bool) -> Lock | None:
    """The lock through `handle`, with our name in it; None if the file is no longer the one at its place."""
    try:
        _write(handle, own)
    except OSError as error:
        if not locked or error.errno not in _FULL:  # what a crash left may fill the disk, and is swept once we are alone: the next beat writes
            raise unwritable("run.dir", folder, error) from error
    return Lock(folder, handle=handle, holder=own) if _same_file(handle, folder / NAME) else None


def _replaced(folder: Path, *, own: Holder, before: Holder | None) -> Lock | None:
    """The lock as a new file in place of one that cannot be had: its flock is a dead process's, or there is none. None: another one was faster."""
    aside = folder / f".{NAME}.{own.token}"
    handle = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    lock = None
    try:
        locked = _flock(handle)
        _write(handle, own)
        now = read(folder)
        if (now.token if now else "") != (before.token if before else ""):
            return None
        os.replace(aside, folder / NAME)
        if not locked:
            time.sleep(_SETTLE_S)  # of two that came at once, the later one's file is there now
        if _same_file(handle, folder / NAME):
            if before is not None:
                _log.warning("%s is taken over from %s", folder, before)
            lock = Lock(folder, handle=handle, holder=own)
        return lock
    except OSError as error:
        raise unwritable("run.dir", folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if lock is None:
            os.close(handle)


def _stopped(folder: Path, *, holder: Holder) -> bool:
    """Watch the beat of another host's process: whether MISSED beats do not come. Counts down in the log."""
    begun, limit = time.monotonic(), MISSED * holder.every
    told = limit + 1
    while (left := limit - (time.monotonic() - begun)) > 0:
        if left <= told - holder.every or told > limit:
            told = left
            _log.warning("%s is locked by %s: without a sign of life it is taken over in %.0f s (run.takeover=true: at once)", folder, holder, left)
        time.sleep(min(left, 1.0, holder.every / 4))
        now = read(folder)
        if now is not None and (now.token, now.beat) != (holder.token, holder.beat):
            return False
        if now is None and not (folder / NAME).exists():  # given back
            return True
    return True


def _opened(file: Path) -> tuple[int, bool]:
    """A handle, and whether the file is new. Raises OSError; a link is not followed, for what it points to is not ours to write."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
    except FileExistsError:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | _PLAIN, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(file))
    return handle, False


def _flock(handle: int) -> bool | None:
    """Whether the lock could be had; None where there is no flock."""
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
    """Whether `file` is what the handle has open: it may have been removed or replaced."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except OSError:
        return False


def _write(handle: int, holder: Holder) -> None:
    data = (json.dumps(asdict(holder), indent=1) + "\n").encode()
    os.pwrite(handle, data, 0)
    os.ftruncate(handle, len(data))
    os.fsync(handle)
