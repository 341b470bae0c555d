"""Commands of ours in forked children of a process that has imported everything and computed nothing: a tenth
of a second each, not five.

A child may be armed: one of its file operations then fails or kills it (faults.c). Run under
LD_PRELOAD by `started`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "CUDA_VISIBLE_DEVICES": "",
}
SAME = ("step", "tokens_seen", "loss", "grad_norm", "lr", "loss_scale", "skipped", "eval_loss")
MODEL = [
    "model=tiny",
    *(
        f"model.config.{key}={value}"
        for key, value in {"vocab_size": 270, "hidden_size": 8, "intermediate_size": 16}.items()
    ),
]
MODEL += [
    f"model.config.{key}={value}"
    for key, value in {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}.items()
]
TRAIN = [
    "train",
    *MODEL,
    "data.path=corpus",
    "data.seq_len=32",
    "batch.global_batch_size=2",
    "batch.micro_batch_size=1",
    "run.dir=runs/x",
    "optim.lr=0.01",
]
TRAIN += ["schedule=constant", "train.log_every=1", "checkpoint.every=1", "checkpoint.keep_last=1"]
PREPARE = [
    "prepare",
    "data=text",
    "data.source=[texts]",
    "data.path=corpus",
    "data.vocab_size=270",
    "data.eval_fraction=0.3",
]

PRELOAD = (
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "hybridtrain.training.trainer",
    "hybridtrain.engine.torch_native",
)
PRELOAD += (
    "hybridtrain.export.hf",
    "hybridtrain.data.prepare.tokenize",
    "hybridtrain.evaluate.perplexity",
    "hybridtrain.training.builtin",
    "hybridtrain.report",
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; negative: the signal that killed it; 99: an exception came out of it; 98:
    it ran out of time."""
    said: str
    where: str
    """The file operation that was made to fail."""

    @property
    def crashed(self) -> bool:
        return self.code in (98, 99) or "Traceback (most recent call last)" in self.said


def library(folder: Path) -> Path:
    """faults.c, compiled."""
    built = folder / "faults.so"
    subprocess.run(
        [
            "gcc",
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            str(built),
            str(Path(__file__).with_name("faults.c")),
            "-ldl",
        ],
        check=True,
    )
    return built


def started(module: str, *arguments: str, folder: Path, timeout_s: float) -> list[dict[str, object]]:
    """Run a fuzzer of this package in a process of its own and return its rows."""
    rows = folder / "rows.jsonl"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    } | ENVIRONMENT
    environment["LD_PRELOAD"] = str(library(folder))
    command = [
        sys.executable,
        "-m",
        f"tests.fuzz.{module}",
        "--work",
        str(folder / "work"),
        "--out",
        str(rows),
        *arguments,
    ]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads(line) for line in rows.read_text().splitlines()]


def preload() -> None:
    """Import what commands import, so that children need not."""
    for module in PRELOAD:
        importlib.import_module(module)


def run(argv: list[str], *, folder: Path, arm: tuple[int, int] | None, timeout_s: float) -> tuple[Ended, int]:
    """`hybridtrain argv` in a forked child with `folder` as its working directory; with `arm` = (n, code) its
    n-th file operation fails.

    Returns how it ended, and how many file operations it made under the folder.
    """
    log, count = folder.parent / "said.txt", folder.parent / "count.txt"
    for file in (log, count):
        file.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _child(argv, folder=folder, arm=arm, log=log, count=count)
    code = _waited(pid, timeout_s=timeout_s)
    said = log.read_text(errors="replace") if log.exists() else ""
    operations, _, where = count.read_text().partition(" ") if count.exists() else ("0", "", "")
    return Ended(code, said, where), int(operations)


def _child(argv: list[str], *, folder: Path, arm: tuple[int, int] | None, log: Path, count: Path) -> None:
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder)
        shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
        shim.failed_at.restype = ctypes.c_char_p
        shim.arm(str(folder).encode(), *(arm or (0, 0)))
        from hybridtrain.cli.main import main

        code = main(argv)
        operations = shim.disarm()
        count.write_text(f"{operations} {shim.failed_at().decode()}")
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _waited(pid: int, *, timeout_s: float) -> int:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 98


def write_texts(folder: Path) -> None:
    """Sources for `PREPARE`."""
    (folder / "texts").mkdir(parents=True)
    for n in range(6):
        (folder / "texts" / f"{n}.txt").write_text(
            " ".join(f"number {n * k} follows {k * k},\n" for k in range(60))
        )


def must(argv: list[str], folder: Path) -> None:
    """Run what has to work."""
    ended, _ = run(argv, folder=folder, arm=None, timeout_s=300)
    assert ended.code == 0, f"hybridtrain {' '.join(argv)}: {ended.code}\n{ended.said}"


def metrics(run_dir: Path) -> list[dict[str, object]]:
    """What each step's line must repeat bit for bit."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in SAME if key in row} for row in rows]


def digests(folder: Path, names: Callable[[str], bool]) -> dict[str, str]:
    """Relative path -> SHA-256 of the files below `folder` whose name is wanted."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and names(path.name))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copies(base: Path, work: Path) -> Iterator[Path]:
    """Fresh copies of a folder, one after the other, each removed when the next is asked for."""
    number = 0
    while True:
        target = work / f"copy-{number % 2}" / base.name
        shutil.rmtree(target.parent, ignore_errors=True)
        shutil.copytree(base, target, symlinks=True)
        yield target
        number += 1
