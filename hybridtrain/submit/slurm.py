"""Calls of Slurm's commands.

Each has a time limit, and a failed call raises UserError with Slurm's reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hybridtrain.errors import UserError, refusal

PATIENCE_S = 60.0
"""Time limit of a Slurm command: a busy controller takes seconds to answer."""
_UNREACHABLE = re.compile(
    "configuration source|unable to contact|connection refused|could not resolve|socket timed out",
    re.IGNORECASE,
)
"""In the messages of Slurm's commands when no controller answers."""
_ID = re.compile(r"(\d+)(;[\w.-]+)?")
_OPTIONS = (
    ("time", "cluster.time=HH:MM:SS or DAYS-HH:MM:SS, within the partition's limit"),
    ("partition", "cluster.partition=NAME, one that `sinfo` lists"),
    ("account", "cluster.account=NAME, cluster.qos=NAME"),
    ("qos", "cluster.qos=NAME"),
    ("gres|gpu", "cluster.gpus_per_node=N, what `sinfo -o %G` shows"),
    ("memory", "cluster.mem=SIZE"),
    ("feature|constraint", "cluster.constraint=FEATURE"),
    ("cpu|task", "cluster.cpus_per_node=N"),
    ("node", "cluster.nodes=N, cluster.exclude=NODES, cluster.gpus_per_node=N, cluster.cpus_per_node=N"),
)
"""Words in Slurm's reason -> the options to change."""


def sbatch(script: Path, *, test_only: bool) -> str:
    """Queue a script and return the job's id; with `test_only` queue nothing and return when
    Slurm would run it.

    Raises UserError with Slurm's reason.
    """
    if shutil.which("sbatch") is None:
        problem = "there is no sbatch here"
        raise refusal(
            "submit",
            str(script),
            problem,
            allowed="a machine of the cluster",
            instead="the login node, or torchrun -m hybridtrain.train",
        )
    result = ask("sbatch", "--test-only" if test_only else "--parsable", str(script), env=os.environ)
    if result.returncode:
        raise _refusal(result.stderr)
    return result.stderr.strip() if test_only else queued_id(result)


def queued_id(result: subprocess.CompletedProcess[str]) -> str:
    """The id of the job that `sbatch --parsable` queued (raises UserError)."""
    if result.returncode:
        raise _refusal(result.stderr)
    match = _ID.fullmatch(result.stdout.strip())
    if match is None:
        raise UserError(
            f"sbatch answers {result.stdout.strip()[:200]!r}, which is no job id: "
            "whether the job is queued is not known\n"
            "  allowed: a number, as `sbatch --parsable` prints it\n"
            "  try:     squeue --me, and scancel what should not run"
        )
    return match[1]


def _refusal(stderr: str) -> UserError:
    reason = (
        stderr.strip().removeprefix("sbatch: error: ").replace("sbatch: error: ", "") or "it gives no reason"
    )
    if _UNREACHABLE.search(reason):
        return _unreachable(reason.splitlines()[-1])
    options = next(
        (options for words, options in _OPTIONS if re.search(words, reason, re.IGNORECASE)),
        "other options of the section cluster",
    )
    return UserError(f"Slurm refuses the job: {reason}\n  allowed: what `sinfo` shows\n  try:     {options}")


def _unreachable(reason: str) -> UserError:
    return UserError(
        f"Slurm cannot be reached from here: {reason}\n"
        "  allowed: a machine where `sinfo` answers\n  try:     the login node of the cluster"
    )


def ask(*command: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command; the caller checks its exit code.

    Raises UserError if it cannot be started or does not end in time.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PATIENCE_S,
            env=dict(env),
        )
    except subprocess.TimeoutExpired as error:
        raise _unreachable(f"{command[0]} has not answered for {PATIENCE_S:.0f} s") from error
    except OSError as error:
        raise _unreachable(f"{command[0]} cannot be started ({error.strerror or error})") from error


def check_nodes(nodes: int, *, partition: str) -> None:
    """Refuse more nodes than the partition has: such a job would wait for ever.

    No check if sinfo does not tell the number.
    """
    if shutil.which("sinfo") is None:
        return
    result = ask("sinfo", "-h", *(["-p", partition] if partition else []), "-o", "%D", env=os.environ)
    available = sum(int(word) for word in result.stdout.split() if word.isascii() and word.isdecimal())
    if 0 < available < nodes:
        raise refusal(
            "cluster.nodes",
            nodes,
            f"there are {available} nodes in {partition or 'all partitions together'}",
            allowed=f"1 to {available}",
            instead=f"cluster.nodes={available}",
        )


def states(jobs: list[str]) -> dict[str, str]:
    """Job id -> state of the jobs that Slurm still knows, by one query; empty without Slurm.

    Raises UserError if it does not answer.
    """
    if not jobs or shutil.which("squeue") is None:
        return {}
    # squeue fails for a single unknown id; among several it ignores unknown ones.
    result = ask(
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        f"--jobs={','.join(sorted(set(jobs)))}",
        "--format=%i %T",
        env=os.environ,
    )
    if result.returncode and _UNREACHABLE.search(result.stderr):
        raise _unreachable(result.stderr.strip().splitlines()[-1])
    pairs = [line.split() for line in result.stdout.splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
