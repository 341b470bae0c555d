"""How this process was launched: its rank variables, its launcher, and how it exits.

torchrun, accelerate and deepspeed set the standard rank variables; those of plain srun are translated. All of
this happens before torch is imported, so that errors appear at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from hybridtrain.errors import refusal

_log = logging.getLogger("hybridtrain.runtime.launch")
DEADLINE = "HYBRIDTRAIN_DEADLINE"
"""Environment variable: the job's time limit, as Unix time."""
JOB = "HYBRIDTRAIN_JOB"
"""Environment variable, set by `hybridtrain train --nproc`: a unique name of this start,
equal in all ranks."""
LISTEN_FD = "HYBRIDTRAIN_LISTEN_FD"
"""Environment variable of rank 0, set by `hybridtrain train --nproc`: descriptor of MASTER_PORT's socket."""
RUN_DIR_FILE = "HYBRIDTRAIN_RUN_DIR_FILE"
"""Environment variable in a sweep: the file into which a run writes its directory (run.dir may differ)."""
_ADDRESS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK_0_FIRST_S = 5.0
"""Seconds that other ranks wait before they exit with an error: the launcher then ends all ranks, and rank 0
must print it first."""
AFTER_RANK_0_S = 1.0
"""The same if rank 0 is known to print the error now."""
_POLL_S = 0.5
"""Seconds between two checks whether the launcher is alive."""
_LAUNCHER = re.compile(
    r"torchrun|torch[./]distributed[./](run|launch)|accelerate|deepspeed|slurmstepd|hybridtrain"
)
_WATCHER = "launcher"
_GENERATIONS = 5
"""Parent processes among which the launcher is looked for: it may start ranks through a script."""


def arguments(argv: list[str]) -> list[str]:
    """`argv` without --local_rank=N, which the deepspeed launcher adds although it sets LOCAL_RANK."""
    return [text for text in argv if not (text.startswith("--local_rank=") and "LOCAL_RANK" in os.environ)]


# -- the environment -----------------------------------------------------------------------------------------


def check_directory() -> None:
    """Refuse a working directory that has been removed (raises UserError)."""
    try:
        os.getcwd()
    except OSError as error:
        where = os.environ.get("PWD", "(unknown)")
        raise refusal(
            "working directory",
            where,
            "it has been removed",
            allowed="a folder that exists",
            instead="cd to another folder",
        ) from error


def adopt_srun() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT if plain srun started several processes.

    Raises UserError if srun's variables are incomplete.
    """
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or env.get("SLURM_STEP_NUM_TASKS", "1") in ("", "1"):
        return
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"):
        if not env.get(name, "").isdecimal():
            missing = "it is not set" if name not in env else "it is not a number"
            raise refusal(
                name,
                env.get(name, ""),
                f"{missing}, though srun sets it",
                allowed="what srun sets",
                instead="srun, torchrun, or unset SLURM_PROCID",
            )
    env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"] = (
        env["SLURM_PROCID"],
        env["SLURM_LOCALID"],
        env["SLURM_STEP_NUM_TASKS"],
    )
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _address(env.get("SLURM_STEP_NODELIST", ""))
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 10000))


def _address(nodes: str) -> str:
    """The address by which Slurm reaches the first of `nodes`; its name need not resolve."""
    first = _output("scontrol", "show", "hostnames", nodes).split()
    if not first:
        raise refusal(
            "SLURM_STEP_NODELIST",
            nodes,
            "Slurm knows no node by it",
            allowed="what srun sets",
            instead="MASTER_ADDR=ADDRESS of the first node",
        )
    words = _output("scontrol", "-o", "show", "node", first[0]).split()
    return next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), first[0])


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        why = lines[0] if lines else type(error).__name__
        problem = f"`{' '.join(command)}`, which tells where ranks meet, failed: {why}"
        raise refusal(
            "MASTER_ADDR",
            "(not set)",
            problem,
            allowed="an address of the first node",
            instead="export MASTER_ADDR=ADDRESS before srun",
        ) from error


def begin() -> None:
    """First steps of a training process: check its environment, watch its launcher.

    Raises UserError.
    """
    check_directory()
    adopt_srun()
    check()
    deadline()
    end_with_launcher()


def check() -> None:
    """Refuse incomplete or invalid rank variables, naming all of them, and an unknown GLOO_SOCKET_IFNAME.

    Raises UserError.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in _ADDRESS if name not in env]
        wrong = _wrong()
        if missing or wrong:
            present = " ".join(
                f"{name}={env[name]!r}" if not env[name] else f"{name}={env[name]}"
                for name in (*_ADDRESS, "LOCAL_RANK")
                if name in env
            )
            name = next(iter(wrong), next(name for name in _ADDRESS if name in env))
            problem = [f"set are {present}"]
            problem += [f"missing {'are' if missing[1:] else 'is'} {', '.join(missing)}"] if missing else []
            problem += [f"{key} {why}" for key, why in wrong.items()]
            world = env.get("WORLD_SIZE", "")
            number = world if world.strip("0").isdecimal() else "N"
            several = f"hybridtrain train --nproc {number} ..., or torchrun"
            allowed = f"all of {', '.join(_ADDRESS)}, as a launcher sets them, or none"
            raise refusal(
                name,
                env[name],
                "; ".join(problem),
                allowed=allowed,
                instead=f"unset {' '.join(_ADDRESS)} LOCAL_RANK; several processes: {several}",
            )
    _check_interface()


def _wrong() -> dict[str, str]:
    """Rank variable -> what is wrong with its value."""
    env, wrong = os.environ, {}
    for name, least, most in (
        ("RANK", 0, 1 << 31),
        ("WORLD_SIZE", 1, 1 << 31),
        ("LOCAL_RANK", 0, 1 << 31),
        ("MASTER_PORT", 1, 65535),
    ):
        if name in env and not (
            env[name].isascii() and env[name].isdecimal() and least <= int(env[name][:12]) <= most
        ):
            wrong[name] = f"is no whole number from {least}{f' to {most}' if most == 65535 else ' on'}"
    if env.get("MASTER_ADDR", "x").strip() == "":
        wrong["MASTER_ADDR"] = "is empty"
    if not wrong and "RANK" in env and "WORLD_SIZE" in env and int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        wrong["RANK"] = f"is not below WORLD_SIZE={env['WORLD_SIZE']}"
    return wrong


def _check_interface() -> None:
    given = os.environ.get("GLOO_SOCKET_IFNAME", "")
    interfaces = [name for _, name in socket.if_nameindex()]
    unknown = [name for name in given.split(",") if name and name not in interfaces]
    if unknown:
        problem = f"this machine has no network interface {', '.join(unknown)}"
        raise refusal(
            "GLOO_SOCKET_IFNAME",
            given,
            problem,
            allowed=", ".join(interfaces),
            instead="unset GLOO_SOCKET_IFNAME",
        )


def deadline() -> float:
    """The job's time limit, Unix time; infinite without DEADLINE.

    Raises UserError if it is not a time in the future.
    """
    given = os.environ.get(DEADLINE, "").strip()
    if not given:
        return math.inf
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    now = time.time()
    if math.isnan(value) or value <= now:
        problem = (
            "it is not a time in seconds since 1970"
            if math.isnan(value)
            else f"it was {_duration(now - value)} ago: the run would end after each step"
        )
        raise refusal(
            DEADLINE,
            given,
            problem,
            allowed="a future time in seconds since 1970",
            instead=f"unset {DEADLINE}",
        )
    return value


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.0f} h"
    )


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process, also if it is the only one."""
    return "RANK" in os.environ


def world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def job() -> str:
    """The launcher's id of this start, the same in all its processes; empty if there is none."""
    env = os.environ
    if env.get(JOB):
        return env[JOB]
    if env.get("TORCHELASTIC_RUN_ID", "none") not in ("", "none"):  # torchrun's default is "none"
        return f"torchrun {env['TORCHELASTIC_RUN_ID']}"
    slurm = env.get("SLURM_JOB_ID_HET_GROUP_0") or env.get("SLURM_JOB_ID")
    return f"Slurm job {slurm}" if slurm else ""


def attempt() -> str:
    """Number of the launcher's attempt.

    A store that outlives a restart still has the keys of the last attempt.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"


def store_of_launcher() -> bool:
    """Whether the launcher holds the store of the rendezvous; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# -- the launcher --------------------------------------------------------------------------------------------


def end_with_launcher() -> None:
    """Start a thread that ends this rank when its launcher has ended.

    No effect on processes without a launcher. A killed launcher cannot end its ranks; they would go on and
    keep the run directory locked.
    """
    launcher = _launcher()
    if launcher is not None and _WATCHER not in (thread.name for thread in threading.enumerate()):
        threading.Thread(
            target=_watch, args=(launcher, _start_time(launcher)), name=_WATCHER, daemon=True
        ).start()


def _launcher() -> int | None:
    """Process id of the launcher; None without one, and if only its variables are left in the environment."""
    env, parent = os.environ, os.getppid()
    if "RANK" not in env:
        return None
    if not ({"TORCHELASTIC_RUN_ID", JOB, "SLURM_PROCID", "CROSS_RANK"} & set(env)):
        return None
    if not Path("/proc/self/stat").exists():
        return parent
    process = parent
    for _ in range(_GENERATIONS):
        if process <= 0:
            break
        if _LAUNCHER.search(_command_line(process)):
            return process
        process = _parent(process)
    # a program that uses torch's launcher as a library
    return parent if "python" in _command_line(parent).partition(" ")[0] else None


def _command_line(process: int) -> str:
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{process}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
            .strip()
        )
    return ""


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []


def _parent(process: int) -> int:
    fields = _stat(process)
    return int(fields[1]) if fields else 0


def _start_time(process: int) -> str:
    """Start of a process in clock ticks, since ids are reused; empty if it has ended."""
    fields = _stat(process)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def _watch(launcher: int, started: str) -> None:
    direct = os.getppid() == launcher
    while os.getppid() == launcher if direct else _start_time(launcher) == started:
        time.sleep(_POLL_S)
    late = threading.Timer(2.0, os._exit, (1,))  # logging may block if nobody reads the pipe
    late.daemon = True
    late.start()
    _log.error("the launcher (process %d) is gone: this rank ends", launcher)
    os._exit(1)


def report_to_launcher(text: str) -> None:
    """Write the error to TORCHELASTIC_ERROR_FILE, so that torchrun's summary shows it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not Path(file).exists():
        now = str(int(time.time()))
        with contextlib.suppress(OSError):
            Path(file).write_text(
                json.dumps(
                    {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": now}}}
                )
            )


def leave(code: int) -> NoReturn:
    """Exit with `os._exit`, after running atexit handlers and flushing the output.

    DTensor's caches keep process groups alive after `destroy_process_group`. A gloo thread that frees a
    tensor during shutdown aborts the process, and a finished run would count as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed pipe, full disk, no stream
            stream.flush()
    os._exit(code)


def use_expandable_segments() -> None:
    """Set expandable_segments of torch's GPU allocator against fragmentation, unless it is configured.

    Call before torch is imported.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
