"""Memory of a command: how much of its own it takes, and a limit on it.

python -m tests.quantize.limited quantize key=value ...: a command of hybridtrain, then the largest size of
its anonymous memory (which no file backs), in bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hybridtrain.export import safetensors
from hybridtrain.export.safetensors import TensorSpec
from hybridtrain.models import build
from tests.cases import model

_PLACES = 1 << 16
_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def write(folder: Path, *, layers: int, hidden: int, dtype: str) -> int:
    """A llama of random weights, a file for each layer; returns the bytes of a layer."""
    import torch

    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "vocab_size": 300}
    config = build.hf_config(
        model(num_hidden_layers=layers, **sizes, dtype=dtype), chosen={}, attention="sdpa"
    )
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    files: dict[str, list[TensorSpec]] = {}
    for name, each in build.meta_model(config).named_parameters():
        words = name.split(".")
        number = int(words[2]) + 1 if words[1] == "layers" else 0
        spec = TensorSpec(name, tuple(each.shape), getattr(torch, dtype))
        files.setdefault(f"model-{number:05d}.safetensors", []).append(spec)
    most = max(spec.size // spec.dtype.itemsize for specs in files.values() for spec in specs)
    values = torch.randn(most + _PLACES, generator=torch.Generator().manual_seed(3)) * hidden**-0.5

    def tensor(spec: TensorSpec) -> torch.Tensor:
        count = spec.size // spec.dtype.itemsize
        if len(spec.shape) == 1:
            return torch.ones(count, dtype=spec.dtype)
        start = zlib.crc32(spec.name.encode()) % _PLACES  # all tensors are pieces of one, at different places
        return values[start : start + count].reshape(spec.shape).to(spec.dtype)

    for file, specs in files.items():
        safetensors.write(folder / file, specs=specs, tensor=tensor, metadata={})
    where = {spec.name: file for file, specs in files.items() for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(spec.size for spec in files["model-00001.safetensors"])


def run(*argv: str, inside: Path | None) -> tuple[int, str]:
    """(largest anonymous memory in bytes, output) of a command, inside a group with a limit."""
    enter = 'echo $$ > "$0" && exec "$@"' if inside else 'exec "$@"'
    command = [sys.executable, "-m", "tests.quantize.limited", *argv]
    group = str(inside / "cgroup.procs") if inside else "none"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", enter, group, *command],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    output, _, largest = done.stdout.rstrip().rpartition("\n")
    return int(largest), output


@contextmanager
def limit(size: int) -> Iterator[Path]:
    """A control group whose processes have so many bytes of memory. Skips where none can be made."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {line.split(":")[1]: line.split(":", 2)[2] for line in lines}
    if "memory" in own:  # version 1: inside our own group
        group, name = _V1 / own["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:  # version 2: beside it, as a group with processes has no controllers for others in it
        group, name = (_V2 / own.get("", "/").lstrip("/")).parent, "memory.max"
    group = group / f"hybridtrain-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error})")
    try:
        try:
            (group / name).write_text(str(size))
        except OSError as error:
            pytest.skip(f"a control group made here has no limit on memory ({error})")
        yield group
    finally:
        for _ in range(50):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def _watch(largest: list[int]) -> None:
    while True:
        status = Path("/proc/self/status").read_text()
        largest[0] = max(largest[0], int(status.partition("RssAnon:")[2].split()[0]) << 10)
        time.sleep(0.002)


def main() -> int:
    from hybridtrain.cli.main import main as hybridtrain

    largest = [0]
    threading.Thread(target=_watch, args=(largest,), daemon=True).start()
    code = hybridtrain(sys.argv[1:])
    print(largest[0])
    return code


if __name__ == "__main__":
    sys.exit(main())
