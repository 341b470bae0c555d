"""Who trains in a run directory, as its lock says, and whether that process is alive. No torch."""

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
"""Seconds between two beats."""
_LONGEST_BEAT_S = 600.0
_LAST_TIME = 1e11
"""The year 5138: no lock is from a later time."""


@dataclass(frozen=True)
class Holder:
    """Who trains in a run directory."""

    host: str
    pid: int
    machine: str
    """Boot and process namespace that `pid` counts in."""
    born: str
    """When the process began, in the kernel's ticks: a pid may be used again."""
    job: str
    """Slurm job; empty: none."""
    chain: str
    """The job that this one is a requeue or a replacement of."""
    attempt: int
    """How often Slurm restarted the job."""
    since: float
    every: float
    """Seconds between two beats."""
    token: str
    beat: int

    def __str__(self) -> str:
        job = f" (job {self.job}{f', restart {self.attempt}' if self.attempt else ''})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    @property
    def when(self) -> str:
        """Since when, in local time."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))

    @property
    def ends_by(self) -> str:
        """The command that ends it."""
        return f"scancel {self.job}" if self.job else f"kill {self.pid}" + ("" if self.machine == _machine() else f" on {self.host}")


_TYPES = {"host": str, "pid": int, "machine": str, "born": str, "job": str, "chain": str, "attempt": int}
_TYPES |= {"since": float, "every": float, "token": str, "beat": int}


def parsed(data: bytes) -> Holder | None:
    """The holder that a lock with this content names; None: it names none."""
    try:
        values = json.loads(data)
        holder = Holder(**{name: kind(values[name]) for name, kind in _TYPES.items()})
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return holder if 0 <= holder.since < _LAST_TIME and 0 < holder.every <= _LONGEST_BEAT_S else None


def this_process() -> Holder:
    """This process, as a lock names it."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return Holder(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        born=_born(os.getpid()) or "",
        job=job,
        chain=os.environ.get("HYBRIDTRAIN_CHAIN") or job,
        attempt=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        since=time.time(),
        every=BEAT_S,
        token=uuid.uuid4().hex,
        beat=0,
    )


def is_requeue(own: Holder, *, of: Holder) -> bool:
    """Whether `own` is a later start of the same job, or the job that took its place: Slurm has ended the one before."""
    if not own.chain or own.chain != of.chain:
        return False
    return own.job != of.job or own.attempt > of.attempt


def is_dead(holder: Holder) -> bool | None:
    """Whether the process has ended; None: it is not of this machine, so that nobody here can tell."""
    if holder.machine != _machine():
        return None
    return _born(holder.pid) != holder.born


@cache
def _machine() -> str:
    """Boot and process namespace: where a pid means the same process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux: names must do
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process began, in ticks since boot; "" where the system does not say; None: there is no such process, or only its remains."""
    try:
        state, *_, begun = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
        return None if state in "ZX" else begun
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
