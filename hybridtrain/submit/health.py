"""Health check of the nodes, one process per node, before training:  python -m hybridtrain.submit.health RUN

Each node reports to the first one: its GPUs, versions, clock, and whether it can write the run directory.
Then all nodes all-reduce a tensor. The first node writes nodes that are missing or differ to
<run>/submit/bad_nodes.json, and all exit with 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridtrain.runtime import failure, host, network
from hybridtrain.runtime.files import write_atomically

SKEW_S = 30.0
"""Clocks may differ by this much: deadlines and logs need about the same time on all nodes."""


def local_facts(run: Path, *, gpus: int) -> dict[str, Any]:
    """What this node reports; `problem` is what is wrong with it on its own, else empty."""
    facts: dict[str, Any] = {
        "node": failure.node(),
        "time": time.time(),
        "versions": dict(host.versions()),
        "gpus": torch.cuda.device_count(),
        "problem": "",
    }
    probe = run / "submit" / f"probe-{facts['node']}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        facts["problem"] = f"cannot write {run}: {error}"
    if gpus and facts["gpus"] != gpus:
        facts["problem"] = f"{facts['gpus']} GPUs instead of {gpus}"
    return facts


def compare(facts_of: dict[int, dict[str, Any]], *, names: list[str]) -> dict[str, str]:
    """Node name -> what is wrong with it.

    `facts_of`: node number -> its report, and `received`, when it arrived (Unix time).
    """
    bad = {name: "it did not report in time" for number, name in enumerate(names) if number not in facts_of}
    first = facts_of.get(0)
    for number, facts in facts_of.items():
        differing = sorted(
            key for key, value in facts["versions"].items() if first and value != first["versions"].get(key)
        )
        skew = abs(facts["time"] - facts["received"])
        if facts["problem"]:
            bad[names[number]] = facts["problem"]
        elif differing:
            assert first is not None
            others = first["versions"]
            versions = ", ".join(
                f"{key} {facts['versions'][key]} (the first node: {others.get(key)})" for key in differing
            )
            bad[names[number]] = f"other versions: {versions}"
        elif skew > SKEW_S:
            bad[names[number]] = f"its clock is {skew:.0f} s off"
    return bad


def main(run: Path) -> int:
    me, size, patience = (
        int(os.environ["SLURM_NODEID"]),
        int(os.environ["SLURM_JOB_NUM_NODES"]),
        float(os.environ.get("HYBRIDTRAIN_HEALTH_S") or 120),
    )
    timeout = timedelta(seconds=patience)
    # The port that training uses afterwards: another one could be the next job's.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    facts = local_facts(run, gpus=int(os.environ.get("HYBRIDTRAIN_GPUS") or 0))
    store = dist.TCPStore(address, port, is_master=me == 0, wait_for_workers=False, timeout=timeout)
    store.set(f"facts-{me}", json.dumps({**facts, "time": time.time()}))
    if me == 0:
        bad = compare(_gather(store, size=size, until=time.monotonic() + patience), names=_node_names(size))
        if bad:
            write_atomically(run / "submit" / "bad_nodes.json", json.dumps(bad))
        store.set("verdict", json.dumps(bad))
    else:
        bad = json.loads(store.get("verdict"))
    if bad:
        if me == 0:
            print("; ".join(f"{node}: {why}" for node, why in bad.items()), flush=True)
            time.sleep(2.0)  # this process holds the store, and the others still read from it
        return 1
    return _all_reduce(store, me=me, size=size, timeout=timeout)


def _gather(store: dist.TCPStore, *, size: int, until: float) -> dict[int, dict[str, Any]]:
    """Node number -> report, of all nodes that report in time."""
    facts_of: dict[int, dict[str, Any]] = {}
    while len(facts_of) < size and time.monotonic() < until:
        for number in set(range(size)) - set(facts_of):
            if store.check([f"facts-{number}"]):
                facts_of[number] = {**json.loads(store.get(f"facts-{number}")), "received": time.time()}
        time.sleep(0.05)
    return facts_of


def _node_names(size: int) -> list[str]:
    """Nodes in Slurm's order."""
    import subprocess

    result = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=False,
    )
    names = result.stdout.split()
    return names if len(names) == size else [f"node {number}" for number in range(size)]


def _all_reduce(store: dist.TCPStore, *, me: int, size: int, timeout: timedelta) -> int:
    """An all-reduce on the backends that training uses: gloo, and NCCL if there are GPUs.

    Returns the exit code.
    """
    gpu = torch.cuda.is_available()
    if size > 1:
        network.choose_interface(os.environ["MASTER_ADDR"])
    if gpu:
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("health", store), rank=me, world_size=size, timeout=timeout
    )
    wrong = []
    for device, name in (("cpu", "gloo"), *((("cuda", "nccl"),) if gpu else ())):
        value = torch.full((1 << 20,), float(me + 1), device=device)
        dist.all_reduce(value)
        if float(value[0]) != size * (size + 1) / 2:
            wrong.append(f"the sum over nodes is {float(value[0])} ({name})")
    print(f"{failure.node()}: {'; '.join(wrong) or 'fit'}", flush=True)
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
