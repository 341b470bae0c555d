"""The store through which the ranks of one start meet, and waiting for what comes there.

Waiting polls, so that signals are handled meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import failure, launch, log

_log = log.get("rendezvous")
FIRST_NOTICE_S = 5.0
"""Seconds until a waiting process logs for which ranks it waits; then once a minute."""
_MINUTES_FROM_S = 120.0
"""Shorter times are logged in seconds."""
_NOTICE_EVERY_S = 60.0
CONNECT_S = 120.0
"""Seconds that a store may take to answer after it has accepted a connection."""
_GONE_S = 15.0
"""Seconds that the launcher's store may refuse connections; it starts before the ranks."""
_READ_S = 2.0
"""Seconds that a store may take to hand out what it has."""


class TooLate(UserError):
    """The timeout of the rendezvous, which every rank finds by itself."""


def is_reporter() -> bool:
    """Whether this rank logs for all ranks of its machine."""
    return log.rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"


def wait(
    holds: Callable[[], bool], *, waiting_for: Callable[[], str], report: bool, until: float, timeout_s: float
) -> None:
    """Poll until `holds()` is true. With `report`, log from time to time for which ranks.

    Raises TooLate at the timeout.
    """
    began = time.monotonic()
    pause, notice_at = 0.002, began + FIRST_NOTICE_S
    while not holds():
        now = time.monotonic()
        if now > until:
            problem = f"{waiting_for()} did not come within {timeout_s:g} s ({where()})"
            refused = refusal(
                "engine.timeout_s",
                f"{timeout_s:g}",
                problem,
                allowed="as long as all processes take to start",
                instead=alone(),
            )
            raise TooLate(str(refused))
        if report and now > notice_at:
            left_s = until - now
            left = f"{left_s:.0f} s" if left_s < _MINUTES_FROM_S else f"{left_s / 60:.0f} minutes"
            _notice(f"{who()} waits for {waiting_for()} at {where()}, at most {left} more")
            notice_at = now + _NOTICE_EVERY_S
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _notice(text: str) -> None:
    # INFO, or ERROR, since the console hides INFO of other ranks
    _log.log(20 if log.rank() == 0 else 40, text)


def who() -> str:
    return "this process" if log.rank() == 0 else f"rank {log.rank()} on {failure.node()}"


def where() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def alone() -> str:
    return "start the missing ones; for one process: unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT LOCAL_RANK"


def open_store(rank: int, *, until: float, timeout_s: float) -> tuple[dist.Store, str]:
    """The store, and the address by which this process reached it (empty if this process holds the store)."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds_it = rank == 0 and not launch.store_of_launcher()
    peer = "" if holds_it else _reached(address, port, until=until, timeout_s=timeout_s)
    options: dict[str, Any] = {
        "is_master": holds_it,
        "wait_for_workers": False,
        "timeout": timedelta(seconds=CONNECT_S),
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
    give_up = time.monotonic() + CONNECT_S
    while thread.is_alive() and time.monotonic() < give_up:
        thread.join(0.2)
    if not answer:
        raise no_store("what listens there does not answer as rank 0 would")
    store = answer[0]
    if isinstance(store, Exception):
        in_use = "EADDRINUSE" in str(store)
        raise (_port_in_use(store) if in_use else no_store(str(store))) from store
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
                raise no_store("the launcher's store is gone, and the launcher with it") from error
        except OSError as error:
            why = error.strerror or str(error)
        return False

    wait(
        answers,
        waiting_for=lambda: f"rank 0 ({why})",
        report=is_reporter(),
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


def no_store(why: str) -> UserError:
    words = next((line.strip() for line in why.splitlines() if line.strip()), "")
    problem = f"{who()} cannot meet the others at {where()}: {words}"
    with contextlib.suppress(OSError):
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
        return refusal(
            "MASTER_PORT",
            os.environ["MASTER_PORT"],
            problem,
            allowed="the address and port of rank 0",
            instead=alone(),
        )
    return refusal(
        "MASTER_ADDR",
        os.environ["MASTER_ADDR"],
        f"{problem} (the name does not resolve)",
        allowed="rank 0's address",
        instead=alone(),
    )


def read(keys: dist.Store, key: str, *, timeout_s: float) -> dict[str, Any]:
    """An entry; empty if it is not there: rank 0 deletes it once all have joined, maybe at this moment.
    `timeout_s`: of the store.
    """
    if not keys.check([key]):
        return {}
    keys.set_timeout(timedelta(seconds=_READ_S))
    try:
        return json.loads(keys.get(key))
    except dist.DistStoreError:
        return {}
    finally:
        keys.set_timeout(timedelta(seconds=timeout_s))
