"""Which network card gloo uses. By itself it takes the one that this machine's name resolves to, which may be the loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import failure, log

_log = log.get("network")
_CARD = "GLOO_SOCKET_IFNAME"


def choose_card(address: str) -> None:
    """For ranks on several hosts: the card on the route to `address`, rank 0's host as others reach it; what the user chose stays."""
    if os.environ.get(_CARD):
        return
    card = card_to(address)
    if card:
        os.environ[_CARD] = card
        _log.debug("gloo uses the network card %s, on the route to %s", card, address)


def identity() -> str:
    """The host as a network knows it: its name, its start, and on Linux the container's own network."""
    found = [failure.node()]
    with contextlib.suppress(OSError):
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(os.stat("/proc/self/ns/net").st_ino)]
    return " ".join(found)


def card_to(address: str) -> str:
    """The card whose address the system would use to reach `address` (nothing is sent); on the host itself, the one that has it. Empty: unknown."""
    import psutil

    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            own = probe.getsockname()[0]
    except OSError:
        return ""
    return next((card for card, addresses in psutil.net_if_addrs().items() for entry in addresses if entry.address.partition("%")[0] == own), "")


def hub_resolves() -> bool:
    """Whether the model hub's name is known here, so that asking it has a point: its client asks six times. A proxy is asked in its place."""
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if {hub.scheme, "all"} & urllib.request.getproxies().keys():
        return True
    try:
        socket.getaddrinfo(hub.hostname, hub.port or hub.scheme)
    except OSError:
        return False
    return True


def unfit(error: Exception) -> UserError:
    """The refusal of a network over which ranks that have met cannot compute."""
    import psutil

    words = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    problem = f"rank {log.rank()} on {failure.node()} has met the others but cannot compute with them: {words}"
    cards = ", ".join(psutil.net_if_addrs())
    return refusal(_CARD, os.environ.get(_CARD, "(not set)"), problem, allowed=f"a card that all hosts can reach; here: {cards}", instead=f"{_CARD}=CARD")
