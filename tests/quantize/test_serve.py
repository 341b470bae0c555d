"""A quantised folder in transformers' own server, asked with OpenAI's client, as docs/inference.md has it."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridtrain.cli.main import main
from tests.documents import blocks
from tests.evaluate.trained import Trained

FOLDER, PORT = "runs/smoke/quantised", "8000"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def serving(command: str, *, port: str, log: Path) -> Iterator[None]:
    """The server, from when it answers."""
    words = shlex.split(command)
    assert words[:2] == ["transformers", "serve"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [Path(sys.executable).parent / words[0], *words[1:]],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                DIRECT.open(f"http://localhost:{port}/health", timeout=5)
                break
            assert server.poll() is None, log.read_text()
            time.sleep(1)
        yield
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_server_says_what_generate_does(trained: Trained, tmp_path: Path, capsys) -> None:
    for name in ("compressed_tensors", "openai", "fastapi", "uvicorn"):
        pytest.importorskip(name, reason="pip install 'transformers[serving]' 'hybridtrain[quantize]'")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    [command], [program] = blocks("docs/inference.md", "console"), blocks("docs/inference.md", "py")
    folder = tmp_path / "quantised"
    assert main(["quantize", str(trained.run), "quantize.scheme=int4-g32", f"quantize.out={folder}"]) == 0
    capsys.readouterr()
    asked = {"prompt": "number 7 follows ", "max_new_tokens": "24", "temperature": "0"}
    options = [f"generate.{key}={value!r}" for key, value in asked.items()]
    assert main(["generate", str(trained.run), f"generate.source={folder}", *options]) == 0
    generated = capsys.readouterr().out
    command = command.removeprefix("$ ").replace(FOLDER, str(folder)).replace(PORT, port)
    program = (
        program.replace(FOLDER, str(folder)).replace(PORT, port).replace('import "', 'number 7 follows "')
    )
    with serving(command, port=port, log=tmp_path / "log"):
        said = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "NO_PROXY": "localhost"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert said.returncode == 0, said.stderr[-2000:] + (tmp_path / "log").read_text()[-2000:]
    text = said.stdout.rstrip("\n")
    assert text.strip()
    assert generated.rstrip("\n").endswith(f"number 7 follows {text}")
