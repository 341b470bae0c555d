"""`hybridtrain quantize`, ended by a signal, goes on from the layers that it finished, to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.cli.main import main
from hybridtrain.errors import refusal
from hybridtrain.export import destination
from hybridtrain.models import build
from hybridtrain.quantize import progress, walk
from tests.cases import model

pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")


class Killed(BaseException):
    """In the place of a signal."""


@pytest.fixture(scope="module")
def argv(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that calibrates a model of four layers."""
    source = tmp_path_factory.mktemp("source")
    torch.manual_seed(3)
    whole: Any = build.plain_model(build.hf_config(model(vocab_size=300), chosen={}, attention="sdpa"))
    whole.save_pretrained(source)
    given = [f"run.dir={source / 'none'}", f"data.path={data}", "data.seq_len=32", "quantize.rows=16"]
    return ["quantize", f"quantize.source={source}", "quantize.scheme=int4-g32-gptq", *given]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def stop_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """End the command before another layer than so many is read; returns the layers that are read."""
    read: list[int] = []
    whole = walk._layer

    def stopping(number: int, *given, **options):
        if len(read) == layers:
            raise Killed
        read.append(number)
        return whole(number, *given, **options)

    monkeypatch.setattr(walk, "_layer", stopping)
    return read


def test_it_goes_on_where_it_was(argv, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*argv, f"quantize.out={whole}"]) == 0
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Killed):
            main([*argv, f"quantize.out={out}"])
    kept = partial_of(out)
    record = json.loads((kept / progress.FILE).read_text())
    assert [each["file"] for each in record["files"]] == [f"model-{at:05d}.safetensors" for at in range(3)]
    assert f"what is finished stays in {kept}" in capsys.readouterr().out
    (kept / "model-00003.safetensors").write_bytes(b"a part of a layer")
    read = stop_after(-1, monkeypatch)
    assert main([*argv, f"quantize.out={out}"]) == 0
    assert "layers 0 to 1 of 4 are kept from an interrupted start" in capsys.readouterr().out
    assert read == [2, 3]
    assert files(out) == files(whole)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["run.seed=3"], "calibration rows"),
        pytest.param(["quantize.scheme=int8"], "calibration rows, schemes of layers", marks=pytest.mark.slow),
        pytest.param(["quantize.dtype=float32"], "quantize.dtype", marks=pytest.mark.slow),
    ],
)
def test_another_command_starts_anew(changes, words, argv, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Killed):
            main([*argv, f"quantize.out={out}"])
    read = stop_after(-1, monkeypatch)
    assert main([*argv, *changes, f"quantize.out={out}"]) == 0
    assert f"an interrupted start had other {words}: all layers are quantised anew" in capsys.readouterr().out
    assert read == [0, 1, 2, 3]
    assert main([*argv, *changes, f"quantize.out={whole}"]) == 0
    assert files(out) == files(whole)


def test_what_is_finished_outlives_a_failure_to_replace(argv, tmp_path: Path, monkeypatch) -> None:
    """A file of the user's in the folder; it is moved away, and no layer is quantised again."""
    out = tmp_path / "out"
    assert main([*argv, "quantize.scheme=int8", f"quantize.out={out}"]) == 0
    (out / "plan.json").write_text("mine")
    monkeypatch.setattr(destination, "_others", refused)
    assert main([*argv, f"quantize.out={out}"]) == 2
    assert (out / "plan.json").read_text() == "mine"
    monkeypatch.undo()
    read = stop_after(-1, monkeypatch)
    assert main([*argv, f"quantize.out={out}"]) == 0
    assert read == []
    assert progress.FILE not in json.loads((out / "hybridtrain.json").read_text())["files"]
    assert not (out / progress.FILE).exists()


def refused(*_: Any, field: str, **__: Any) -> None:
    raise refusal(field, "out", "a file is in the way", allowed="none", instead="another folder")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_real_signal(number: signal.Signals, argv, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hybridtrain.cli", *argv]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run([*command, f"quantize.out={whole}"], check=True, capture_output=True, timeout=300)
    record = partial_of(out) / progress.FILE
    assert any(is_ended([*command, f"quantize.out={out}"], record, number) for _ in range(5))
    assert record.is_file()
    again = subprocess.run(
        [*command, f"quantize.out={out}"], check=True, capture_output=True, text=True, timeout=300
    )
    assert "of 4 are kept from an interrupted start" in again.stdout + again.stderr
    assert files(out) == files(whole)


def test_a_damaged_record(argv, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    kept = partial_of(out)
    kept.mkdir()
    (kept / "hybridtrain.json").write_text("{}")
    (kept / progress.FILE).write_text('{"of": {}, "files": [{"file": "model-00000.safetensors"}]')
    assert main([*argv, "quantize.scheme=int8", f"quantize.out={out}"]) == 0
    assert "files that are not whole" in capsys.readouterr().out
    assert not kept.exists()


def is_ended(command: list[str], record: Path, number: signal.Signals) -> bool:
    """Whether a signal ended the command after a layer, and not too late."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while process.poll() is None and not (record.is_file() and len(files_in(record)) > 1):
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=300)
    return process.returncode != 0


def files_in(record: Path) -> list[Any]:
    """Those that are finished; none of a record that is gone meanwhile."""
    try:
        return json.loads(record.read_text())["files"]
    except FileNotFoundError:
        return []
