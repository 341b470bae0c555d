"""The network interface for gloo: by default it takes that of the host name, which may be the loopback."""

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
_INTERFACE = "GLOO_SOCKET_IFNAME"


def choose_interface(address: str) -> None:
    """Set GLOO_SOCKET_IFNAME, unless it is set, to the interface on the route to `address`, rank 0's as other
    hosts reach it.
    """
    if os.environ.get(_INTERFACE):
        return
    interface = interface_to(address)
    if interface:
        os.environ[_INTERFACE] = interface
        _log.debug("gloo uses the network interface %s, on the route to %s", interface, address)


def identity() -> str:
    """A name for this host's network: host name, boot id, and on Linux the network namespace, which
    containers have of their own.
    """
    result = [failure.node()]
    with contextlib.suppress(OSError):
        result += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(os.stat("/proc/self/ns/net").st_ino),
        ]
    return " ".join(result)


def interface_to(address: str) -> str:
    """The interface on the route to `address`; "" if unknown.

    For an address of this host the interface that has it. Sends nothing.
    """
    import psutil

    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            own = probe.getsockname()[0]
    except OSError:
        return ""
    return next(
        (
            interface
            for interface, addresses in psutil.net_if_addrs().items()
            for entry in addresses
            if entry.address.partition("%")[0] == own
        ),
        "",
    )


def hub_resolves() -> bool:
    """Whether the Hugging Face hub's name resolves, or a proxy is set.

    Without it the client would retry six times.
    """
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if {hub.scheme, "all"} & urllib.request.getproxies().keys():
        return True
    try:
        socket.getaddrinfo(hub.hostname, hub.port or hub.scheme)
    except OSError:
        return False
    return True


def unfit(error: Exception) -> UserError:
    """The refusal of a network over which collectives fail although the rendezvous worked."""
    import psutil

    words = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    problem = (
        f"rank {log.rank()} on {failure.node()} has met the others but cannot compute with them: {words}"
    )
    interfaces = ", ".join(psutil.net_if_addrs())
    return refusal(
        _INTERFACE,
        os.environ.get(_INTERFACE, "(not set)"),
        problem,
        allowed=f"an interface that all hosts can reach; here: {interfaces}",
        instead=f"{_INTERFACE}=NAME",
    )
