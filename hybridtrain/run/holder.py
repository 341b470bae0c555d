"""The process that holds a run directory's lock, and whether it is alive. No torch."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BEAT_S = 20.0
"""Seconds between two heartbeats."""
_LONGEST_BEAT_S = 600.0
_LAST_TIME = 1e11
"""The year 5138; a later time is a damaged lock's."""


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run directory. Its fields are the keys of the lock file."""

    host: str
    pid: int
    machine: str
    """Boot and process namespace in which `pid` is valid."""
    born: str
    """Start time of the process in kernel ticks: pids are reused."""
    job: str
    """Slurm job; empty: none."""
    chain: str
    """The job that this one is a requeue or a replacement of."""
    attempt: int
    """How often Slurm restarted the job."""
    since: float
    """When the lock was taken, in seconds since 1970."""
    every: float
    """Seconds between two heartbeats."""
    token: str
    """Random; distinguishes this lock from every other."""
    beat: int
    """Heartbeats so far."""

    def __str__(self) -> str:
        job = f" (job {self.job}{f', restart {self.attempt}' if self.attempt else ''})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    @property
    def when(self) -> str:
        """When the lock was taken, in local time."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))

    @property
    def kill_command(self) -> str:
        """The shell command that ends the process."""
        return (
            f"scancel {self.job}"
            if self.job
            else f"kill {self.pid}" + ("" if self.machine == _machine() else f" on {self.host}")
        )


_TYPES = {"host": str, "pid": int, "machine": str, "born": str, "job": str, "chain": str, "attempt": int}
_TYPES |= {"since": float, "every": float, "token": str, "beat": int}


def parse(data: bytes) -> Holder | None:
    """The holder named in a lock file's content; None if it is empty or damaged."""
    try:
        values = json.loads(data)
        holder = Holder(**{name: kind(values[name]) for name, kind in _TYPES.items()})
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return holder if 0 <= holder.since < _LAST_TIME and 0 < holder.every <= _LONGEST_BEAT_S else None


def requeues() -> int:
    """How often Slurm has started this job again; 0 outside of Slurm."""
    given = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(given) if given.isascii() and given.isdecimal() else 0


def this_process() -> Holder:
    """This process, as the holder of a new lock."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return Holder(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        born=_born(os.getpid()) or "",
        job=job,
        chain=os.environ.get("HYBRIDTRAIN_CHAIN") or job,
        attempt=requeues(),
        since=time.time(),
        every=BEAT_S,
        token=uuid.uuid4().hex,
        beat=0,
    )


def is_requeue(own: Holder, *, of: Holder) -> bool:
    """Whether `own` is a restart of the other's Slurm job, or the job that replaced it: Slurm has
    then ended the other.
    """
    if not own.chain or own.chain != of.chain:
        return False
    return own.job != of.job or own.attempt > of.attempt


def is_dead(holder: Holder) -> bool | None:
    """Whether the process has ended; None if it is on another machine, where that cannot be checked."""
    if holder.machine != _machine():
        return None
    return _born(holder.pid) != holder.born


@cache
def _machine() -> str:
    """Boot id and pid namespace: within both, a pid identifies a process."""
    try:
        return (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            + " "
            + os.readlink("/proc/self/ns/pid")
        )
    except OSError:  # not Linux
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """Start time of a process in ticks since boot; "" where /proc is missing; None if it does not exist
    or is a zombie.
    """
    try:
        state, *_, start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state in "ZX" else start
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, ValueError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
