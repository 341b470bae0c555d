"""Run a function on gloo ranks: one forked process per rank, a fresh process group per call, a time-out.

    results = run_ranks(4, function, *args)          # [function(*args) on rank 0, ... rank 3]

Ranks fork from a server process that has imported torch and transformers but never computed: a parent that has once run a
multi-threaded kernel makes its children hang, and importing in each rank would dominate the time. `function` must be a
module-level function of a test module. The first failing rank's traceback is raised here.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_SERVER: dict[str, Any] = {}


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call `function(*args)` on every rank of a new gloo world and return what each returned."""
    connection = _server()
    connection.send((world_size, function.__module__, function.__qualname__, args, timeout_s, list(sys.path), dict(os.environ)))
    outcome, value = connection.recv()
    if outcome == "failed":
        raise RankFailed(value)
    return value


def _server() -> Connection:
    if "connection" not in _SERVER or not _SERVER["process"].is_alive():
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _SERVER.update(connection=ours, process=process)
    return _SERVER["connection"]


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.tensor.parallel
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    while True:
        try:
            world_size, module, name, args, timeout_s, path, environment = connection.recv()
        except EOFError:
            return
        sys.path[:] = path
        os.environ.update(environment)
        connection.send(_run(world_size, module, name, args, timeout_s))


def _run(world_size: int, module: str, name: str, args: tuple, timeout_s: float) -> tuple[str, Any]:
    store = tempfile.mktemp(prefix="ranks-")
    children: dict[int, tuple[int, Connection]] = {}
    for rank in range(world_size):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            ours.close()
            _rank_main(rank, world_size, store, module, name, args, theirs)
        theirs.close()
        children[rank] = (pid, ours)
    try:
        return _collect(children, timeout_s)
    finally:
        for pid, _ in children.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            os.waitpid(pid, 0)
        if os.path.exists(store):
            os.remove(store)


def _collect(children: dict[int, tuple[int, Connection]], timeout_s: float) -> tuple[str, Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    pending = {connection: rank for rank, (_, connection) in children.items()}
    deadline = time.monotonic() + timeout_s
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return "failed", f"ranks {sorted(pending.values())} did not finish within {timeout_s} s\n" + _first(failures)
        for connection in ready:
            rank = pending.pop(connection)
            try:
                outcome, value, when = pickle.loads(connection.recv_bytes())
            except EOFError:
                outcome, value, when = "failed", "died without a word (gloo aborts a process on a size mismatch)", time.time()
            if outcome == "ok":
                results[rank] = value
            else:
                failures.append((when, rank, value))
                deadline = min(deadline, time.monotonic() + 5.0)  # the others wait for a rank that is gone
    return ("failed", _first(failures)) if failures else ("ok", [results[rank] for rank in sorted(results)])


def _first(failures: list[tuple[float, int, str]]) -> str:
    return "" if not failures else "rank {1} failed first:\n{2}".format(*min(failures))


def _rank_main(rank: int, world_size: int, store: str, module: str, name: str, args: tuple, connection: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    code = 0
    try:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        message = ("ok", function(*args), time.time())
    except BaseException:
        message, code = ("failed", traceback.format_exc(), time.time()), 1
    connection.send_bytes(pickle.dumps(message))
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
