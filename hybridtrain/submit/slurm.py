"""Slurm's commands, as text; each call says what it wanted when it fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from hybridtrain.types import UserError, refusal

_UNREACHABLE = re.compile("configuration source|unable to contact|connection refused|could not resolve|socket timed out", re.IGNORECASE)
"""In what Slurm's commands say when no controller answers."""


def sbatch(script: Path, *, test_only: bool) -> str:
    """Queue a script and return the job's id; with `test_only` ask when it would run, and queue nothing. Raises UserError with Slurm's reason."""
    if shutil.which("sbatch") is None:
        problem = "there is no sbatch here"
        raise refusal("submit", str(script), problem, allowed="a machine of the cluster", instead="the login node, or torchrun -m hybridtrain.train")
    done = subprocess.run(["sbatch", "--test-only" if test_only else "--parsable", str(script)], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("sbatch: error: ").replace("sbatch: error: ", "")
        if _UNREACHABLE.search(reason):
            last = reason.splitlines()[-1]
            raise UserError(f"Slurm cannot be reached from here: {last}\n  allowed: a machine where `sinfo` answers\n  try:     the login node of the cluster")
        raise UserError(f"Slurm refuses the job: {reason}\n  allowed: what `sinfo` shows\n  try:     other options of the section cluster")
    return (done.stderr if test_only else done.stdout).strip().partition(";")[0]


def check_nodes(nodes: int, *, partition: str) -> None:
    """Refuse more nodes than the partition has: Slurm would keep such a job in the queue for ever. Silent where sinfo does not say."""
    if shutil.which("sinfo") is None:
        return
    done = subprocess.run(["sinfo", "-h", *(["-p", partition] if partition else []), "-o", "%D"], capture_output=True, text=True, check=False, timeout=60)
    there = sum(int(word) for word in done.stdout.split() if word.isdecimal())
    if 0 < there < nodes:
        raise refusal(
            "cluster.nodes",
            nodes,
            f"there are {there} nodes in {partition or 'all partitions together'}",
            allowed=f"1 to {there}",
            instead=f"cluster.nodes={there}",
        )


def states(jobs: list[str]) -> dict[str, str]:
    """Job id -> state, for those that Slurm still knows; empty where there is no Slurm."""
    if not jobs or shutil.which("scontrol") is None:
        return {}
    found = {}
    for job in jobs:
        done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=False, timeout=30)
        words = [word.partition("=")[2] for line in done.stdout.splitlines() for word in line.split() if word.startswith("JobState=")]
        if words:
            found[job] = ",".join(dict.fromkeys(words))
    return found
