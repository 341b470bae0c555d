"""Run a function on ranks of this machine: forked processes, a new process group per call, a timeout.

    run_ranks(4, function, *args, preload=(...), backend="gloo", timeout_s=240)
        # [function(*args) on rank 0, ... rank 3]

    this process --pipe--> server (has imported `preload`, never computes) --fork--> rank 0 ... rank n-1

Ranks fork from a server: children of a process that has run a multi-threaded kernel hang, children of one
that has initialized CUDA cannot use it, and importing in each rank would take most of the time. `function`
must be importable by its name.

No process is left behind. The server ends its ranks when this process has ended (end of file on the pipe),
the kernel ends a rank when the server has ended, and Ctrl-C reaches only this process, which then closes its
server.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hybridtrain.runtime import failure

GRACE_S = 5.0
"""Seconds that the other ranks keep running after one has failed, so that a primary error is found behind
secondary ones.
A finished rank also stays this long: a rank that still connects to it would take its exit for a crash."""
_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1


class RankFailed(AssertionError):
    """A rank raised, died or timed out.

    The text is the traceback and the last output of the rank that failed first.
    """


@dataclass(frozen=True)
class _Job:
    """One call of `run_ranks`, as sent to the server."""

    world_size: int
    module: str
    name: str
    args: bytes
    """Pickled, so that only the ranks import the modules of the arguments."""
    backend: str
    timeout_s: float
    path: list[str]
    environment: dict[str, str]


class _Server:
    """The process that ranks fork from, and this process's end of the pipe to it."""

    def __init__(self, preload: Sequence[str]) -> None:
        self.preload = tuple(preload)
        self.connection, theirs = Pipe()
        code = (
            "import sys; from hybridtrain.runtime.ranks import serve; serve(int(sys.argv[1]), sys.argv[2:])"
        )
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno()), *self.preload],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def close(self) -> None:
        self.connection.close()  # the server reads end of file, ends its ranks and exits
        try:
            self.process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_SERVERS: dict[str, _Server] = {}


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    preload: Sequence[str],
    backend: str,
    timeout_s: float,
) -> list[Any]:
    """Call `function(*args)` on every rank of a new process group; returns the results in rank order.

    `preload`: modules that ranks have imported already. `backend`: of init_process_group. Raises RankFailed.
    """
    server = _server(preload)
    path = list(sys.path)
    job = _Job(
        world_size,
        function.__module__,
        function.__qualname__,
        pickle.dumps(args),
        backend,
        timeout_s,
        path,
        dict(os.environ),
    )
    try:
        server.connection.send(job)
        outcome, value = server.connection.recv()
    except (EOFError, OSError) as error:
        close()
        raise RankFailed(
            f"the process that ranks are forked from is gone (exit code {server.process.returncode})"
        ) from error
    except BaseException:  # e.g. Ctrl-C: the next call must not read this call's answer
        close()
        raise
    if outcome == "failed":
        raise RankFailed(value)
    return [pickle.loads(result) for result in value]


def close() -> None:
    """End the server and all ranks. The next call of `run_ranks` starts a new server."""
    while _SERVERS:
        _SERVERS.popitem()[1].close()


def _server(preload: Sequence[str]) -> _Server:
    server = _SERVERS.get("running")
    if server is None or server.preload != tuple(preload) or server.process.poll() is not None:
        close()
        server = _SERVERS["running"] = _Server(preload)
        atexit.unregister(close)
        atexit.register(close)
    return server


# -- in the server -------------------------------------------------------------------------------------------


def serve(descriptor: int, preload: Sequence[str]) -> None:
    """Import `preload`, then run jobs until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # raises, so that `_run` ends its ranks
    connection: Connection = Connection(descriptor)
    for module in preload:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # collections in ranks skip imported objects and so do not copy their pages
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        sys.path[:] = job.path
        for gone in set(os.environ) - set(job.environment) - {"OMP_NUM_THREADS"}:
            del os.environ[gone]
        os.environ.update(job.environment)
        answer = _run(job, connection)
        if answer is None:
            return
        connection.send(answer)


def _run(job: _Job, connection: Connection) -> tuple[str, Any] | None:
    """Fork the ranks and collect their results; None if the caller has gone."""
    children: dict[int, tuple[int, Connection]] = {}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(job.world_size):
                ours, theirs = Pipe(duplex=False)
                server = os.getpid()
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    ours.close()
                    _rank_main(rank, job, Path(folder), theirs, server)
                theirs.close()
                children[rank] = (pid, ours)
            return _collect(children, connection, job.timeout_s, Path(folder))
        finally:
            for pid, ours in children.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ours.close()


def _collect(
    children: dict[int, tuple[int, Connection]], caller: Connection, timeout_s: float, folder: Path
) -> tuple[str, Any] | None:
    results: dict[int, bytes] = {}
    # (secondary, time, rank, text): a secondary error may arrive before the death of the rank that caused it
    failures: list[tuple[bool, float, int, str]] = []
    pending = {connection: rank for rank, (_, connection) in children.items()}
    deadline = time.monotonic() + timeout_s
    while pending:
        ready = wait([*pending, caller], timeout=max(0.0, deadline - time.monotonic()))
        if caller in ready:
            return None  # the caller sends nothing while it waits, so this is end of file
        if not ready:
            if not failures:
                return (
                    "failed",
                    f"ranks {sorted(pending.values())} did not finish within {timeout_s:g} s"
                    + _tail(folder, min(pending.values())),
                )
            break
        for connection in ready:
            rank = pending.pop(connection)  # type: ignore[call-overload]
            try:
                outcome, value, when = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                outcome, value, when = (
                    "failed",
                    "died without a word (gloo aborts a process on a size mismatch)",
                    time.time(),
                )
            if outcome == "ok":
                results[rank] = value
            else:
                failures.append((outcome == "secondary", when, rank, value))
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failures:
        _, _, rank, text = min(failures)
        return "failed", f"rank {rank} failed first:\n{text}" + _tail(folder, rank)
    return "ok", [results[rank] for rank in sorted(results)]


def _tail(folder: Path, rank: int) -> str:
    """The last lines that a rank printed."""
    file = _output(folder, rank)
    lines = file.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if file.is_file() else []
    return "\n".join(["", f"last output of rank {rank}:", *lines]) if lines else ""


def _output(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


# -- in a rank -----------------------------------------------------------------------------------------------


def _rank_main(rank: int, job: _Job, folder: Path, connection: Connection, server: int) -> None:
    """Run one rank; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _die_with(server)
        with _output(folder, rank).open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world_size), GLOO_SOCKET_IFNAME="lo"
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # not used: the store is a file
        message = _call(rank, job, folder)
        code = 0 if message[0] == "ok" else 1
        connection.send_bytes(pickle.dumps(message))
        connection.close()
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 0:
            time.sleep(GRACE_S)  # the server kills this process once all ranks have answered
    finally:
        os._exit(code)  # skips exit handlers, which belong to the server


def _call(rank: int, job: _Job, folder: Path) -> tuple[str, Any, float]:
    try:
        import torch.distributed as dist

        dist.init_process_group(
            job.backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=job.world_size
        )
        function: Any = importlib.import_module(job.module)
        for part in job.name.split("."):
            function = getattr(function, part)
        return "ok", pickle.dumps(function(*pickle.loads(job.args))), time.time()
    except BaseException as error:
        return "secondary" if failure.is_secondary(error) else "failed", traceback.format_exc(), time.time()


def _die_with(server: int) -> None:
    """Have the kernel kill this process when the server ends for any reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
