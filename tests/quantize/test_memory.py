"""How much memory `hybridtrain quantize` and `generate` need, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.models import tokens
from tests.quantize.limited import limit, run, write

pytestmark = pytest.mark.slow
pytest.importorskip("compressed_tensors", reason="not installed: pip install 'hybridtrain[quantize]'")
MB = 10**6
LIMIT = 450 * MB


def quantize(folder: Path, data: Path, *changes: str, inside: Path | None) -> int:
    """The largest anonymous memory."""
    given = [f"quantize.source={folder}", f"quantize.out={folder}-out", f"run.dir={folder / 'none'}"]
    given += [f"data.path={data}", "data.seq_len=32", "quantize.rows=64"]
    return run("quantize", *given, *changes, inside=inside)[0]


def test_memory_does_not_grow_with_depth(data: Path, tmp_path: Path) -> None:
    """Above a model of next to nothing, with which the same libraries are loaded: two layers in fp32, and the
    sums over the inputs of one layer's linear layers and the matrices that GPTQ makes of the largest."""
    write(tmp_path / "tiny", layers=2, hidden=128, dtype="float32")
    constant = quantize(tmp_path / "tiny", data, inside=None)
    peaks = {}
    for depth in (4, 12):
        layer = write(tmp_path / str(depth), layers=depth, hidden=512, dtype="float32")
        peaks[depth] = quantize(tmp_path / str(depth), data, inside=None)
    inner, hidden = 1408**2 * 4, 512**2 * 4
    allowed = 2 * layer + (1 + 6) * inner + 6 * hidden
    # modules without weights: up to a MB a layer
    assert peaks[12] < peaks[4] + layer, (constant, layer, peaks)
    assert max(peaks.values()) < constant + allowed + layer / 2, (constant, layer, peaks)


def test_a_model_larger_than_memory_is_quantised(data: Path, tmp_path: Path) -> None:
    layer = write(tmp_path / "source", layers=20, hidden=1024, dtype="float32")
    assert 20 * layer > 2 * LIMIT
    with limit(LIMIT) as group:
        peak = quantize(tmp_path / "source", data, "quantize.scheme=int4-g32", inside=group)
    assert peak < LIMIT


def test_a_model_larger_than_memory_generates(data: Path, tmp_path: Path) -> None:
    """The same text as with enough memory."""
    folder = tmp_path / "source"
    layer = write(folder, layers=20, hidden=2048, dtype="bfloat16")
    tokens.copy_tokenizer(data / "tokenizer", out=folder)
    assert 20 * layer > 4 * LIMIT
    argv = ["generate", f"generate.source={folder}", "generate.prompt=number 4", "generate.temperature=0"]
    argv += ["generate.max_new_tokens=4"]
    with limit(LIMIT) as group:
        _, text = run(*argv, "inference.max_memory_gb=0.1", inside=group)
    assert run(*argv, inside=None)[1].endswith(text.splitlines()[-1])
