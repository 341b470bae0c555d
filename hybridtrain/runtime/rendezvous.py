"""Rendezvous: before there is a process group, the ranks of one start find each other through a store.

    rank 0    writes its entry  ...  counts the others, logs which are missing  ...  writes the verdict
    rank r    reads the entry of rank 0, refuses that of another job;  writes its own  ...  reads the verdict

The launcher holds the store, else rank 0. Keys contain the launcher's attempt, so that those of an earlier
attempt are not read. Waiting polls the store, so that signals are handled meanwhile.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from hybridtrain.errors import LocalError, ReportedElsewhere, UserError, refusal
from hybridtrain.runtime import failure, launch, log, network
from hybridtrain.runtime.store import (
    CONNECT_S,
    TooLate,
    is_reporter,
    no_store,
    open_store,
    read,
    wait,
    where,
)

_MOST_NAMED = 8
"""Missing ranks that a message names."""


@dataclass(frozen=True)
class Rendezvous:
    """The result of a rendezvous."""

    store: dist.Store
    """For the process group, with a prefix that no other start uses."""
    hosts: int
    """Number of hosts; containers of one machine with different network namespaces count separately."""
    address: str
    """Address of rank 0's host as another host reaches it; with a single host MASTER_ADDR."""
    keys: dist.Store
    """The part of the store that the rendezvous itself uses."""

    def clear(self) -> None:
        """On rank 0, once all ranks have read the verdict: delete the keys, since some launchers restart
        ranks without a new attempt number.
        """
        self.keys.set(_STARTED, self.keys.get(_of(0)).decode())  # for those who come too late
        for rank in range(int(os.environ["WORLD_SIZE"])):
            self.keys.delete_key(_of(rank))
        for key in (_ARRIVED, _MISMATCH, _VERDICT):
            self.keys.delete_key(key)


_ARRIVED, _MISMATCH, _VERDICT, _STARTED = "arrived", "mismatch", "verdict", "started"


def _of(rank: int) -> str:
    return f"rank/{rank}"


def join(*, gpu: str, timeout_s: float) -> Rendezvous:
    """Wait until every rank has joined. `gpu`: unique id of this rank's device; empty on a CPU.

    Raises UserError on the rank that finds the problem (the store of another job, a rank that has joined
    already, a timeout), and ReportedElsewhere on ranks for which rank 0 has printed it.
    """
    rank, until = log.rank(), time.monotonic() + timeout_s
    try:
        store, peer = open_store(rank, until=until, timeout_s=timeout_s)
    except UserError as error:
        raise _local(error) from error
    keys = dist.PrefixStore(f"hybridtrain/{launch.attempt()}", store)
    mine = {
        "rank": rank,
        "world_size": int(os.environ["WORLD_SIZE"]),
        "job": launch.job(),
        "host": failure.node(),
        "network": network.identity(),
        "process": os.getpid(),
        "gpu": gpu,
        "peer": peer,
    }
    try:
        verdict = (
            _rank0(mine, keys, until=until, timeout_s=timeout_s)
            if rank == 0
            else _other(mine, keys, until=until, timeout_s=timeout_s)
        )
    except dist.DistError as error:  # the process that holds the store has ended
        if rank == 0:
            raise no_store(str(error)) from error
        raise ReportedElsewhere(2) from error
    except UserError as error:
        raise _local(error) from error
    return Rendezvous(dist.PrefixStore(verdict["start"], store), verdict["hosts"], verdict["address"], keys)


def _rank0(mine: dict[str, Any], keys: dist.Store, *, until: float, timeout_s: float) -> dict[str, Any]:
    world = mine["world_size"]
    _claim(mine, keys)

    def all_arrived() -> bool:
        if keys.check([_MISMATCH]):
            raise UserError(keys.get(_MISMATCH).decode())
        return keys.add(_ARRIVED, 0) >= world - 1

    def missing() -> str:
        absent = [rank for rank in range(1, world) if not keys.check([_of(rank)])]
        more = f" and {len(absent) - _MOST_NAMED} more" if absent[_MOST_NAMED:] else ""
        named = ", ".join(map(str, absent[:_MOST_NAMED]))
        return f"{'ranks' if absent[1:] else 'rank'} {named}{more} of {world}"

    try:
        wait(all_arrived, waiting_for=missing, report=True, until=until, timeout_s=timeout_s)
        present = [json.loads(text) for text in keys.multi_get([_of(rank) for rank in range(world)])]
        _check_devices(present)
    except UserError:
        keys.set(_VERDICT, json.dumps({"refused": True}))
        raise
    networks = {entry["network"] for entry in present}
    address = next(
        (entry["peer"] for entry in present if entry["network"] != mine["network"] and entry["peer"]),
        os.environ["MASTER_ADDR"],
    )
    verdict = {"refused": False, "start": uuid.uuid4().hex, "hosts": len(networks), "address": address}
    keys.set(_VERDICT, json.dumps(verdict))
    return verdict


def _other(mine: dict[str, Any], keys: dist.Store, *, until: float, timeout_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def rank0_is_there() -> bool:
        for key in (_STARTED, _of(0)):
            entry = read(keys, key, timeout_s=timeout_s)
            if entry and entry["job"] != mine["job"] and entry["job"] and mine["job"]:
                raise _foreign(mine, entry)
        found.update(entry)
        return bool(entry)

    wait(
        rank0_is_there,
        waiting_for=lambda: "rank 0",
        report=is_reporter(),
        until=until,
        timeout_s=timeout_s,
    )
    if found["world_size"] != mine["world_size"]:
        problem = (
            f"rank {mine['rank']} on {mine['host']} (process {mine['process']}) has it, "
            f"rank 0 on {found['host']} has {found['world_size']}"
        )
        refused = refusal(
            "WORLD_SIZE",
            mine["world_size"],
            problem,
            allowed="the same number in all processes",
            instead="the same command on every machine",
        )
        keys.set(_MISMATCH, str(refused))
        raise refused
    _claim(mine, keys)
    keys.add(_ARRIVED, 1)
    wait(
        lambda: keys.check([_VERDICT]),
        waiting_for=lambda: "the answer of rank 0",
        report=False,
        until=until + CONNECT_S,
        timeout_s=timeout_s,
    )
    verdict = json.loads(keys.get(_VERDICT))
    if verdict["refused"]:
        raise ReportedElsewhere(2)
    return verdict


def _claim(mine: dict[str, Any], keys: dist.Store) -> None:
    """Write the entry of this rank. Raises UserError if another process has joined as this rank."""
    text = json.dumps(mine)
    before = keys.compare_set(_of(mine["rank"]), "", text).decode()
    if before == text:
        return
    other = json.loads(before)
    problem = (
        f"process {other['process']} on {other['host']} has joined as rank {mine['rank']} already ({where()})"
    )
    raise refusal(
        "RANK",
        mine["rank"],
        problem,
        allowed="one process for each rank",
        instead="another MASTER_PORT, if these are two trainings",
    )


def _foreign(mine: dict[str, Any], first: dict[str, Any]) -> UserError:
    problem = (
        f"{first['job']} meets there (rank 0 on {first['host']}, process {first['process']}), "
        f"and rank {mine['rank']} on {mine['host']} is of {mine['job']}"
    )
    return refusal(
        "MASTER_PORT",
        os.environ["MASTER_PORT"],
        problem,
        allowed="a port for each job",
        instead="another MASTER_PORT",
    )


def _check_devices(present: list[dict[str, Any]]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for entry in present:
        if not entry["gpu"]:
            continue
        rank, host = entry["rank"], entry["host"]
        first = seen.setdefault((host, entry["gpu"]), rank)
        if first != rank:
            on_host = [other["gpu"] for other in present if other["host"] == host]
            gpus = len(set(on_host))
            same = f"ranks {first} and {rank} on {host} have the same GPU"
            raise refusal(
                "WORLD_SIZE",
                entry["world_size"],
                f"{same}: {len(on_host)} processes share {gpus}",
                allowed="one process for each GPU",
                instead=f"{gpus} processes on {host}",
            )


def _local(error: UserError) -> UserError:
    """`error` as a LocalError, which this rank prints itself; of a timeout only one rank per machine does."""
    return error if isinstance(error, TooLate) and not is_reporter() else LocalError(str(error))
