"""How this process was launched, and how it leaves. torchrun, accelerate and deepspeed set the standard rank variables; plain srun
has its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from typing import NoReturn


def arguments(argv: list[str]) -> list[str]:
    """Without --local_rank=N, which the deepspeed launcher adds to what LOCAL_RANK says already."""
    return [text for text in argv if not (text.startswith("--local_rank=") and "LOCAL_RANK" in os.environ)]


def adopt_srun() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT where srun alone started several processes, and nobody else did."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or int(env.get("SLURM_STEP_NUM_TASKS") or 1) == 1:
        return
    env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_LOCALID"], env["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _address(env["SLURM_STEP_NODELIST"])
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 10000))


def _address(nodes: str) -> str:
    """Of the first of Slurm's nodes: what Slurm reaches it by, for its name need not resolve."""
    first = _said("scontrol", "show", "hostnames", nodes).split()[0]
    words = _said("scontrol", "-o", "show", "node", first).split()
    return next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), first)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def leave(code: int) -> NoReturn:
    """End this process with exit functions run and output flushed, but without taking the interpreter apart.

    DTensor's caches hold process groups beyond `destroy_process_group`. A gloo thread that lets go of a tensor while the interpreter
    is being taken apart aborts the process, and a run that has finished would count as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # whoever read it has enough; a full disk; closed from the start
            stream.flush()
    os._exit(code)
