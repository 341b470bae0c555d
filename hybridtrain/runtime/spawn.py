"""Starts the ranks of a command on this machine:  hybridtrain train --nproc N ...

    this process   --starts-->   rank 0 ... rank N-1   (python -m hybridtrain.<command>, with the variables
                                                       that torchrun sets)

This process does not train and does not import torch. It forwards signals, gives ranks time to save, ends all
ranks when one has failed, and exits with the code of the rank that failed first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from types import FrameType

from hybridtrain.runtime import launch

_SAVE_S = 600.0
"""Seconds that ranks may take to save a checkpoint after a signal, unless SHUTDOWN is set."""
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable for these seconds, the one that torchrun reads."""
OTHERS_S = 15.0
"""Seconds that the other ranks may take, after one has failed, to notice it and write their reports; then
they get SIGTERM."""
REFUSED_S = 2.0
"""The same after a UserError, which the other ranks have, too. Less than the time after which they print it
again."""
_TERMINATE_S = 15.0
"""Seconds between SIGTERM and SIGKILL."""
_EXPLAINED = (0, 1, 2, 130)
"""Exit codes after which nothing is left to print: success, traceback, UserError, Ctrl-C."""
_REFUSAL = 2
"""Exit code after a UserError."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def start(module: str, argv: list[str], *, processes: int) -> int:
    """Run `python -m module argv` in `processes` ranks; returns the exit code, 128 + N if signal N ended the
    rank that failed.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(512)  # inherited by rank 0, so that no other process can take the port
            for number in range(processes):
                ranks.append(_rank(number, module, argv, processes=processes, listening=listening))
                if received:
                    ranks[-1].send_signal(received[-1])
        return _watch(ranks, received)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def gpus() -> int:
    """Number of GPUs, as limited by CUDA_VISIBLE_DEVICES; 0 without nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def _rank(
    rank: int, module: str, argv: list[str], *, processes: int, listening: socket.socket
) -> subprocess.Popen[bytes]:
    port = str(listening.getsockname()[1])
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        launch.JOB: f"process {os.getpid()} {_START}",
    }
    if "lo" in [name for _, name in socket.if_nameindex()]:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine's name need not resolve
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; engine.threads decides
    if rank == 0:
        environment[launch.LISTEN_FD] = str(listening.fileno())
    descriptors = (listening.fileno(),) if rank == 0 else ()
    return subprocess.Popen([sys.executable, "-m", module, *argv], env=environment, pass_fds=descriptors)


_START = uuid.uuid4().hex


def _watch(ranks: list[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait until all ranks have ended; returns the exit code.

    After a failure or a signal, ranks that take too long are ended.
    """
    failed: int | None = None
    patience: float | None = None
    terminated = False
    while None in [rank.poll() for rank in ranks]:  # a list: all of them must be polled
        if failed is None and (codes := [rank.returncode for rank in ranks if rank.returncode]):
            failed, patience = codes[0], time.monotonic() + (REFUSED_S if codes[0] == _REFUSAL else OTHERS_S)
        if received and patience is None:
            patience = time.monotonic() + _save_s()
        if patience is not None and time.monotonic() > patience:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    (rank.kill if terminated else rank.terminate)()
            terminated, patience = True, time.monotonic() + _TERMINATE_S
        time.sleep(0.05)
    if failed is None:
        failed = next((rank.returncode for rank in ranks if rank.returncode), 0)
    if failed < 0:
        number = next(index for index, rank in enumerate(ranks) if rank.returncode == failed)
        print(
            f"hybridtrain: rank {number} (process {ranks[number].pid}) was ended by {_name(-failed)}",
            file=sys.stderr,
            flush=True,
        )
        return 128 - failed
    if failed not in _EXPLAINED:
        number = next(index for index, rank in enumerate(ranks) if rank.returncode == failed)
        print(
            f"hybridtrain: rank {number} (process {ranks[number].pid}) ended with exit code {failed}",
            file=sys.stderr,
            flush=True,
        )
    return failed


def _save_s() -> float:
    given = os.environ.get(SHUTDOWN, "")
    return float(given) if given.isascii() and given.isdecimal() else _SAVE_S


def _name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
