"""Rendezvous: before there is a process group, the ranks of one start find each other through a store.

    rank 0    writes its entry  ...  counts the others, logs which are missing  ...  writes the verdict
    rank r    reads the entry of rank 0, refuses that of another job;  writes its own  ...  reads the verdict

The launcher holds the store, else rank 0. Keys contain the launcher's attempt, so that those of an earlier
attempt are not read. Waiting polls the store, so that signals are handled meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hybridtrain.errors import LocalError, ReportedElsewhere, UserError, refusal
from hybridtrain.runtime import failure, launch, log, network

_log = log.get("rendezvous")
FIRST_NOTICE_S = 5.0
"""Seconds until a waiting process logs for which ranks it waits; then once a minute."""
_MINUTES_FROM_S = 120.0
"""Shorter times are logged in seconds."""
_NOTICE_EVERY_S = 60.0
_CONNECT_S = 120.0
"""Seconds that a store may take to answer after it has accepted a connection."""
_GONE_S = 15.0
"""Seconds that the launcher's store may refuse connections; it starts before the ranks."""
_READ_S = 2.0
"""Seconds that a store may take to hand out what it has."""
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
        store, peer = _open(rank, until=until, timeout_s=timeout_s)
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
            raise _no_store(str(error)) from error
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
        _wait(all_arrived, waiting_for=missing, report=True, until=until, timeout_s=timeout_s)
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
            found.update(_read(keys, key))
            if found and found["job"] != mine["job"] and found["job"] and mine["job"]:
                raise _foreign(mine, found)
        return keys.check([_of(0)])

    _wait(
        rank0_is_there,
        waiting_for=lambda: "rank 0",
        report=_is_reporter(),
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
    _wait(
        lambda: keys.check([_VERDICT]),
        waiting_for=lambda: "the answer of rank 0",
        report=False,
        until=until + _CONNECT_S,
        timeout_s=timeout_s,
    )
    verdict = json.loads(keys.get(_VERDICT))
    if verdict["refused"]:
        raise ReportedElsewhere(2)
    return verdict


def _read(keys: dist.Store, key: str) -> dict[str, Any]:
    """An entry; empty if it is not there: rank 0 deletes it once all have joined, maybe at this moment."""
    if not keys.check([key]):
        return {}
    keys.set_timeout(timedelta(seconds=_READ_S))
    try:
        return json.loads(keys.get(key))
    except dist.DistStoreError:
        return {}
    finally:
        keys.set_timeout(timedelta(seconds=_CONNECT_S))


def _claim(mine: dict[str, Any], keys: dist.Store) -> None:
    """Write the entry of this rank. Raises UserError if another process has joined as this rank."""
    text = json.dumps(mine)
    before = keys.compare_set(_of(mine["rank"]), "", text).decode()
    if before == text:
        return
    other = json.loads(before)
    problem = (
        f"process {other['process']} on {other['host']} "
        f"has joined as rank {mine['rank']} already ({_where()})"
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


class _TooLate(UserError):
    """The timeout of the rendezvous, which every rank finds by itself."""


def _is_reporter() -> bool:
    """Whether this rank logs for all ranks of its machine."""
    return log.rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"


def _local(error: UserError) -> UserError:
    """`error` as a LocalError, which this rank prints itself; of a timeout only one rank per machine does."""
    return error if isinstance(error, _TooLate) and not _is_reporter() else LocalError(str(error))


def _wait(
    holds: Callable[[], bool], *, waiting_for: Callable[[], str], report: bool, until: float, timeout_s: float
) -> None:
    """Poll until `holds()` is true. With `report`, log from time to time for which ranks.

    Raises _TooLate at the timeout.
    """
    began = time.monotonic()
    pause, notice_at = 0.002, began + FIRST_NOTICE_S
    while not holds():
        now = time.monotonic()
        if now > until:
            problem = f"{waiting_for()} did not come within {timeout_s:g} s ({_where()})"
            refused = refusal(
                "engine.timeout_s",
                f"{timeout_s:g}",
                problem,
                allowed="as long as all processes take to start",
                instead=_alone(),
            )
            raise _TooLate(str(refused))
        if report and now > notice_at:
            left_s = until - now
            left = f"{left_s:.0f} s" if left_s < _MINUTES_FROM_S else f"{left_s / 60:.0f} minutes"
            _notice(f"{_who()} waits for {waiting_for()} at {_where()}, at most {left} more")
            notice_at = now + _NOTICE_EVERY_S
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _notice(text: str) -> None:
    # INFO, or ERROR, since the console hides INFO of other ranks
    _log.log(20 if log.rank() == 0 else 40, text)


def _who() -> str:
    return "this process" if log.rank() == 0 else f"rank {log.rank()} on {failure.node()}"


def _where() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _alone() -> str:
    return "start the missing ones; for one process: unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT LOCAL_RANK"


# -- the store -----------------------------------------------------------------------------------------------


def _open(rank: int, *, until: float, timeout_s: float) -> tuple[dist.Store, str]:
    """The store, and the address by which this process reached it (empty if this process holds the store)."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds_it = rank == 0 and not launch.store_of_launcher()
    peer = "" if holds_it else _reached(address, port, until=until, timeout_s=timeout_s)
    options: dict[str, Any] = {
        "is_master": holds_it,
        "wait_for_workers": False,
        "timeout": timedelta(seconds=_CONNECT_S),
    }
    if holds_it:
        options["multi_tenant"] = True
        if (listening := os.environ.get(launch.LISTEN_FD, "")).isdecimal():
            options["master_listen_fd"] = int(listening)
    answer: list[Any] = []

    def connect() -> None:
        try:
            answer.append(dist.TCPStore(address, port, **options))
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=connect, daemon=True)  # hangs if something else listens on the port
    thread.start()
    give_up = time.monotonic() + _CONNECT_S
    while thread.is_alive() and time.monotonic() < give_up:
        thread.join(0.2)
    if not answer:
        raise _no_store("what listens there does not answer as rank 0 would")
    store = answer[0]
    if isinstance(store, Exception):
        in_use = "EADDRINUSE" in str(store)
        raise (_port_in_use(store) if in_use else _no_store(str(store))) from store
    store.set_timeout(timedelta(seconds=timeout_s))
    return store, peer


def _reached(address: str, port: int, *, until: float, timeout_s: float) -> str:
    """Wait until a process listens at `address`; returns the IP address that it was reached by."""
    refused_since: float | None = None
    why, peer = "", ""

    def answers() -> bool:
        nonlocal refused_since, why, peer
        try:
            with socket.create_connection((address, port), timeout=5) as connection:
                peer = connection.getpeername()[0]
                return True
        except ConnectionRefusedError as error:
            refused_since = refused_since or time.monotonic()
            why = "connection refused"
            if launch.store_of_launcher() and time.monotonic() - refused_since > _GONE_S:
                raise _no_store("the launcher's store is gone, and the launcher with it") from error
        except OSError as error:
            why = error.strerror or str(error)
        return False

    _wait(
        answers,
        waiting_for=lambda: f"rank 0 ({why})",
        report=_is_reporter(),
        until=until,
        timeout_s=timeout_s,
    )
    return peer


def _port_in_use(error: Exception) -> UserError:
    refused = refusal(
        "MASTER_PORT",
        os.environ["MASTER_PORT"],
        f"another process listens on it here ({failure.node()})",
        allowed="a port that is free",
        instead="another MASTER_PORT in all processes, or wait until the other training has ended",
    )
    refused.__cause__ = error
    return refused


def _no_store(why: str) -> UserError:
    words = next((line.strip() for line in why.splitlines() if line.strip()), "")
    problem = f"{_who()} cannot meet the others at {_where()}: {words}"
    with contextlib.suppress(OSError):
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
        return refusal(
            "MASTER_PORT",
            os.environ["MASTER_PORT"],
            problem,
            allowed="the address and port of rank 0",
            instead=_alone(),
        )
    return refusal(
        "MASTER_ADDR",
        os.environ["MASTER_ADDR"],
        f"{problem} (the name does not resolve)",
        allowed="rank 0's address",
        instead=_alone(),
    )
