"""Which linear layers multiply in which format: said at the start, kept in checkpoints."""

from pathlib import Path

import pytest

from hybridtrain.checkpoint import marker
from tests.runs import arguments, checkpoints, finished, rows

# of a layer with hidden size 64, 2 of 4 heads for keys and values, inner size 160
ATTENTION, MLP, HEAD = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 160, 300 * 64


@pytest.mark.parametrize("layout", ["single", pytest.param("pp2", marks=pytest.mark.slow)])
def test_the_table_is_said_and_kept(data: Path, run_dir: Path, layout: str) -> None:
    """The first layer and the down projections are high, of 4 layers with 7 products each."""
    options = {
        "precision__compute": "fp8_tensorwise",
        "precision__high_first": 1,
        "precision__rules": "[{match: '*.down_proj', compute: high}]",
    }
    argv = arguments(run_dir, data, parallel=layout, train__steps=1, checkpoint__every=1, **options)
    said = finished(1 if layout == "single" else 2, argv).out
    low, high = 3 * (ATTENTION + MLP * 2 // 3), ATTENTION + MLP + 3 * MLP // 3
    share = low / (low + high + HEAD)
    assert f"fp8_tensorwise: 18 linear layers, 98.3k parameters, {share:.1%} of the products" in said
    assert "precision high: 11 linear layers with the head" in said
    [newest] = checkpoints(run_dir)
    kept = marker.read_progress(run_dir / "checkpoints" / newest).states["formats"]
    assert kept["version"] == 1
    first, second = kept["formats"]
    assert first == {"format": "fp8_tensorwise", "modules": 18, "parameters": low, "share": share}
    assert (second["format"], second["modules"], second["parameters"]) == ("high", 11, high + HEAD)


def test_one_format_needs_no_table(data: Path, run_dir: Path) -> None:
    finished(1, arguments(run_dir, data, train__steps=1, checkpoint__every=1))
    assert marker.read_progress(run_dir / "checkpoints" / checkpoints(run_dir)[0]).states == {}


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp8_tensorwise", "fp8_rowwise", "mxfp8", "int8", "fp16", "bf16"])
def test_tensor_parallelism_trains_as_one_process_does(data: Path, tmp_path: Path, compute: str) -> None:
    losses = []
    for world, layout in ((1, "single"), (2, "tp2")):
        options = {
            "model__config__num_key_value_heads": 4,  # whole blocks of 32 on each of two ranks
            "model__config__intermediate_size": 192,
            "precision__compute": compute,
            "optim__lr": 1e-3,
        }
        run = tmp_path / layout
        finished(world, arguments(run, data, parallel=layout, train__steps=50, **options))
        losses.append([float(str(row["loss"])) for row in rows(run)])
    one, two = (sum(of_run[-10:]) / 10 for of_run in losses)
    assert one < 0.75 * losses[0][0]
    assert two == pytest.approx(one, rel=5e-3)
