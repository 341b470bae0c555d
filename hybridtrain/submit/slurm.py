"""Slurm's commands, as text; each call says what it wanted when it fails, and none waits for ever."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hybridtrain.errors import UserError, refusal

PATIENCE_S = 60.0
"""How long a command of Slurm may take: a busy controller answers after seconds."""
_UNREACHABLE = re.compile("configuration source|unable to contact|connection refused|could not resolve|socket timed out", re.IGNORECASE)
"""In what Slurm's commands say when no controller answers."""
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
"""What Slurm's reason is about -> the options that decide it."""


def sbatch(script: Path, *, test_only: bool) -> str:
    """Queue a script and return the job's id; with `test_only` ask when it would run, and queue nothing. Raises UserError with Slurm's reason."""
    if shutil.which("sbatch") is None:
        problem = "there is no sbatch here"
        raise refusal("submit", str(script), problem, allowed="a machine of the cluster", instead="the login node, or torchrun -m hybridtrain.train")
    done = ask("sbatch", "--test-only" if test_only else "--parsable", str(script), env=os.environ)
    if done.returncode:
        raise _refused(done.stderr)
    return done.stderr.strip() if test_only else queued(done)


def queued(done: subprocess.CompletedProcess[str]) -> str:
    """The id of the job that `sbatch --parsable` queued (raises UserError)."""
    if done.returncode:
        raise _refused(done.stderr)
    found = _ID.fullmatch(done.stdout.strip())
    if found is None:
        raise UserError(
            f"sbatch answers {done.stdout.strip()[:200]!r}, which is no job id: whether the job is queued is not known\n"
            "  allowed: a number, as `sbatch --parsable` prints it\n"
            "  try:     squeue --me, and scancel what should not run"
        )
    return found[1]


def _refused(said: str) -> UserError:
    reason = said.strip().removeprefix("sbatch: error: ").replace("sbatch: error: ", "") or "it gives no reason"
    if _UNREACHABLE.search(reason):
        return _unreachable(reason.splitlines()[-1])
    options = next((options for words, options in _OPTIONS if re.search(words, reason, re.IGNORECASE)), "other options of the section cluster")
    return UserError(f"Slurm refuses the job: {reason}\n  allowed: what `sinfo` shows\n  try:     {options}")


def _unreachable(reason: str) -> UserError:
    return UserError(f"Slurm cannot be reached from here: {reason}\n  allowed: a machine where `sinfo` answers\n  try:     the login node of the cluster")


def ask(*command: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; its exit code is for the caller. Raises UserError if it cannot be started or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=PATIENCE_S, env=dict(env))
    except subprocess.TimeoutExpired as error:
        raise _unreachable(f"{command[0]} has not answered for {PATIENCE_S:.0f} s") from error
    except OSError as error:
        raise _unreachable(f"{command[0]} cannot be started ({error.strerror or error})") from error


def check_nodes(nodes: int, *, partition: str) -> None:
    """Refuse more nodes than the partition has: Slurm would keep such a job in the queue for ever. Silent where sinfo does not say."""
    if shutil.which("sinfo") is None:
        return
    done = ask("sinfo", "-h", *(["-p", partition] if partition else []), "-o", "%D", env=os.environ)
    there = sum(int(word) for word in done.stdout.split() if word.isascii() and word.isdecimal())
    if 0 < there < nodes:
        raise refusal(
            "cluster.nodes",
            nodes,
            f"there are {there} nodes in {partition or 'all partitions together'}",
            allowed=f"1 to {there}",
            instead=f"cluster.nodes={there}",
        )


def states(jobs: list[str]) -> dict[str, str]:
    """Job id -> state of the jobs that Slurm still knows, in one query; empty without Slurm. Raises UserError if Slurm does not answer."""
    if not jobs or shutil.which("squeue") is None:
        return {}
    # A single unknown id is an error for squeue, among several it is passed over.
    done = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(sorted(set(jobs)))}", "--format=%i %T", env=os.environ)
    if done.returncode and _UNREACHABLE.search(done.stderr):
        raise _unreachable(done.stderr.strip().splitlines()[-1])
    pairs = [line.split() for line in done.stdout.splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
