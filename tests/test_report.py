"""`hybridtrain report` on run directories as training leaves them: finished, still running, with nulls, empty."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from hybridtrain import report
from hybridtrain.cli import main
from hybridtrain.config import compose, schema
from hybridtrain.types import UserError


def row(step: int, **changes) -> dict:
    values = {
        "step": step,
        "tokens_seen": 4096 * step,
        "loss": 3 + 5 * math.exp(-step / 40),
        "grad_norm": 1.0,
        "lr": 1e-3,
        "loss_scale": 1.0,
        "skipped": 0,
        "tokens_per_s": 20000.0,
        "tokens_per_s_per_device": 5000.0,
        "step_time_s": 0.2,
        "mfu": None,
        "max_memory_gib": 1.5,
        "time": 1e9 + 0.2 * step,
    }
    return values | changes


def write(folder, rows, *, summary=None, config=None, torn=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in rows) + torn)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (folder / "config.yaml").write_text(compose.to_yaml(config))
    return folder


def finished(folder):
    config = schema.Config()
    config.run.name, config.train.steps = "demo", 200
    summary = {"status": "finished", "wall_s": 203.4, "tokens_per_s": 20900.0, "layout": "pp2-dp_shard2", "world_size": 4, "exit_reason": "train.steps"}
    rows = [row(step, **({"eval_loss": 4.25} if step % 50 == 0 else {})) for step in range(2, 201, 2)]
    return write(folder, rows, summary=summary, config=config)


def is_drawn(path) -> bool:
    """Whether a PNG shows a curve: it has pixels in the curve's blue."""
    pixels = imread(path)[..., :3]
    blue = np.array([int(report.BLUE[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return int((np.abs(pixels - blue).max(axis=-1) < 0.02).sum()) > 30


def test_a_finished_run(tmp_path, capsys):
    folder = finished(tmp_path / "demo")
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    names = ["loss", "grad_norm", "lr", "throughput", "memory"]
    assert [line for line in out.splitlines() if line.endswith(".png")] == [str(folder / "report" / f"{name}.png") for name in names]
    assert {path.stem for path in (folder / "report").iterdir()} == set(names)
    assert all(is_drawn(folder / "report" / f"{name}.png") for name in names)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line and not line.endswith(".png") and not line.startswith(("eval", "wall")))
    assert lines["status"] == "finished (train.steps)"
    assert lines["layout"] == "pp2-dp_shard2, 4 processes"
    assert lines["steps"] == "200 of 200"
    assert lines["tokens"] == "819k"
    assert lines["loss"] == f"{3 + 5 * math.exp(-0.05):.4f} at the start, {3 + 5 * math.exp(-5):.4f} at the end"
    assert lines["tokens/s"] == "20.9k"
    assert "eval loss   4.2500 at step 200" in out
    assert "wall time   3m23s" in out


def test_a_run_that_goes_on(tmp_path):
    summary = {"status": "running", "wall_s": None, "tokens_per_s": None, "layout": None, "world_size": None}
    folder = write(tmp_path, [row(1), row(2)], summary=summary, torn='{"step": 3, "lo')
    history = report.read(folder)
    assert [values["step"] for values in history.rows] == [1, 2]
    text = report.table(history)
    assert "status      running" in text
    assert "layout" not in text
    assert "tokens/s    20.0k" in text
    assert is_drawn(report.draw(history, out=tmp_path / "out")[0])


def test_nulls_leave_gaps(tmp_path):
    rows = [row(step, **({"loss": None, "grad_norm": None} if step == 3 else {})) for step in range(1, 6)]
    history = report.read(write(tmp_path, rows))
    steps, values = history.series("loss")
    assert steps.tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(values).tolist() == [False, False, True, False, False]
    assert len(report.draw(history, out=tmp_path / "report")) == 5
    assert "status      unknown" in report.table(history)


def test_without_a_single_finite_loss(tmp_path):
    history = report.read(write(tmp_path, [row(step, loss=None, grad_norm=None) for step in (1, 2)]))
    assert [path.stem for path in report.draw(history, out=tmp_path / "report")] == ["lr", "throughput", "memory"]
    assert "loss        never finite" in report.table(history)


def test_loss_scale_is_drawn_when_it_varies_and_removed_when_not(tmp_path):
    history = report.read(write(tmp_path, [row(1, loss_scale=65536.0), row(2, loss_scale=32768.0)]))
    report.draw(history, out=tmp_path / "report")
    assert is_drawn(tmp_path / "report" / "loss_scale.png")
    report.draw(report.read(write(tmp_path, [row(1), row(2)])), out=tmp_path / "report")
    assert not (tmp_path / "report" / "loss_scale.png").exists()


def test_evaluations_on_lines_of_their_own(tmp_path):
    history = report.read(write(tmp_path, [row(10), {"step": 10, "eval_loss": 4.5}, row(20), {"step": 20, "eval_loss": 4.0}]))
    assert [series.tolist() for series in history.series("eval_loss")] == [[10, 20], [4.5, 4.0]]
    assert "eval loss   4.0000 at step 20" in report.table(history)
    assert len(report.draw(history, out=tmp_path / "report")) == 5


def test_out_is_another_folder(tmp_path):
    folder = finished(tmp_path / "demo")
    assert main(["report", str(folder), f"report.out={tmp_path / 'pictures'}"]) == 0
    assert (tmp_path / "pictures" / "loss.png").is_file()
    assert not (folder / "report").exists()


def test_running_mean_keeps_a_straight_line_and_flattens_noise():
    line = np.arange(200.0)
    assert report._running_mean(line)[:-5] == pytest.approx(line[:-5])
    noise = np.tile([-1.0, 1.0], 300)
    assert np.abs(report._running_mean(noise)[20:]).max() < 0.1


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.00175, "1.75e-3"), (2e-3, "2e-3"), (5e-11, "5e-11")])
def test_scientific(value, text):
    assert report._scientific(value) == text


def test_what_is_missing_is_said(tmp_path, capsys):
    finished(tmp_path / "demo")
    with pytest.raises(UserError, match="there is no such folder") as error:
        report.read(tmp_path / "dem")
    assert f"hybridtrain report {tmp_path / 'demo'}" in str(error.value)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"there is no metrics.jsonl in it"):
        report.read(tmp_path / "bare")
    write(tmp_path / "empty", [], torn='{"st')
    with pytest.raises(UserError, match="no step was logged yet"):
        report.read(tmp_path / "empty")
    assert main(["report", str(tmp_path / "dem")]) == 2
    assert "Traceback" not in capsys.readouterr().err
