"""A real browser for tests: Debian's Chromium, headless, driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += [
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--hide-scrollbars",
]
ANSWER_S = 60.0
ITS_OWN = re.compile(rb"\A\w+ (?:https?://)?[\w.-]+\.(?:google|googleapis)\.com[:/]")
"""What this browser asks its maker whatever page it shows; it gets no answer either."""


def chromium() -> str:
    """The browser's path.

    Without one the test skips, except where HYBRIDTRAIN_NEEDS_CHROMIUM says that it was installed for it.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        assert not os.environ.get("HYBRIDTRAIN_NEEDS_CHROMIUM"), (
            "HYBRIDTRAIN_NEEDS_CHROMIUM is set, but there is no chromium"
        )
        pytest.skip("no browser: apt-get install -y chromium")
    return found


class Browser:
    """One tab. `events` holds what the browser told by itself: requests, console lines, exceptions."""

    def __init__(self, process: subprocess.Popen[bytes], *, commands: int, answers: int):
        self.process, self.commands, self.answers = process, commands, os.fdopen(answers, "rb")
        self.events: list[dict[str, Any]] = []
        self.buffer, self.number, self.session = b"", 0, ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call `method` and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            more = self.answers.read1(1 << 20)
            assert more, "the browser is gone"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        """Show a file and wait until it is loaded."""
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression (or of its promise)."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def look(self, *, width: int, dark: bool) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(
            base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        )
        return path

    def requests(self) -> list[str]:
        """Addresses of everything that the page asked for since `open`."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Console lines from warnings up, and exceptions, since `open`."""
        lines = [
            str(event["params"])
            for event in self.events
            if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]
        return lines + [
            str(event["params"]) for event in self.events if event["method"] == "Runtime.consoleAPICalled"
        ]


@contextmanager
def browser(profile: Path, *, proxy: str) -> Iterator[Browser]:
    """A browser with an empty profile in `profile`, whose every connection goes to `proxy` (host:port)."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    command = [
        chromium(),
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--proxy-server={proxy}",
        "--proxy-bypass-list=<-loopback>",
        "about:blank",
    ]
    # The protocol's pipes are file descriptors 3 and 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{command_read} 4>&{answer_write}', "bash", *command]
    process = subprocess.Popen(
        shell, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(command_read, answer_write)
    )
    os.close(command_read)
    os.close(answer_write)
    watchdog = threading.Timer(ANSWER_S, process.kill)  # a browser that never answers ends the read
    watchdog.start()
    try:
        yield Browser(process, commands=command_write, answers=answer_read)
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(timeout=20)
        os.close(command_write)


@contextmanager
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that reaches nothing: host:port, and the first bytes of every connection
    that a page made to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard: list[bytes] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    if not ITS_OWN.match(first := connection.recv(200)):
                        heard.append(first)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
