"""Trackers beyond wandb and TensorBoard, each read back with its own reader.

They are not in the test extra: a tracker whose package is missing skips.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridtrain.config import checks, schema
from hybridtrain.errors import UserError
from hybridtrain.run.trackers.kinds import KINDS
from tests.run.test_trackers import server, track

LOSSES = {step: 1.0 / step for step in range(1, 6)}


def test_every_kind_that_the_config_knows_has_a_row():
    assert set(KINDS) == set(checks.TRACKERS)


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(monkeypatch):
    config = schema.Config()
    config.tracker.kinds, config.data.path, config.train.steps, config.model.config = (
        ["tensorboard", "comet_ml"],
        "x",
        1,
        {"model_type": "llama"},
    )
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "comet_ml" else real(name, *rest)
    )
    with pytest.raises(UserError, match="pip install comet_ml") as refused:
        checks.check(config)
    assert "the package comet_ml is not installed here" in str(refused.value)
    assert "tensorboard" in str(refused.value).split("allowed:")[1]
    config.tracker.kinds = ["tensorboard"]
    checks.check(config)


def mlflow(folder: Path) -> tuple[dict[int, float], str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'proj'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    return {
        metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")
    }, run.data.params["optim.lr"]


def trackio(folder: Path) -> tuple[dict[int, float], str]:
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([S.get_logs('proj', 'demo'), S.get_run_config('proj', 'demo')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRACKIO_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    logs, config = json.loads(done.stdout.splitlines()[-1])
    return {row["step"]: row["loss"] for row in logs if "loss" in row}, str(config["optim.lr"])


def dvclive(folder: Path) -> tuple[dict[int, float], str]:
    from dvclive.serialize import load_yaml

    lines = [line.split("\t") for line in (folder / "plots/metrics/loss.tsv").read_text().splitlines()[1:]]
    return {int(step): float(loss) for step, loss in lines}, str(
        load_yaml(folder / "params.yaml")["optim.lr"]
    )


def comet_ml(folder: Path) -> tuple[dict[int, float], str]:
    (path,) = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [
            json.loads(line)["payload"] for line in archive.read("messages.json").decode().splitlines()
        ]
    losses = {
        row["metric"]["metricStep" if "metricStep" in row["metric"] else "step"]: row["metric"]["metricValue"]
        for row in messages
        if _is_loss(row)
    }
    (rate,) = {
        row["param"]["paramValue"] for row in messages if row.get("param", {}).get("paramName") == "optim.lr"
    }
    return {int(step): float(value) for step, value in losses.items()}, str(rate)


def _is_loss(row: dict) -> bool:
    return isinstance(row.get("metric"), dict) and row["metric"].get("metricName") == "loss"


def clearml(folder: Path) -> tuple[dict[int, float], str]:
    (path,) = folder.glob("offline/*/metrics.jsonl")
    batches = [json.loads(line) for line in path.read_text().splitlines()]
    points = {
        point["iter"]: point["value"]
        for batch in batches
        for point in batch
        if (point.get("metric"), point.get("variant")) == ("loss", "train")
    }
    task = json.loads((path.parent / "task.json").read_text())
    return points, str(task["configuration"]).partition("optim.lr")[2][:12]


READERS: dict[str, Callable[[Path], tuple[dict[int, float], str]]] = {
    reader.__name__: reader for reader in (mlflow, trackio, dvclive, comet_ml, clearml)
}


@pytest.mark.parametrize("kind", [kind for kind in checks.TRACKERS if kind not in ("wandb", "tensorboard")])
def test_files_hold_the_values_and_no_secret_and_lie_in_the_run(kind, tmp_path):
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"pip install {kind}")
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    timings, warnings = track(
        tmp_path / "trackers", kind, before=f"import os; os.chdir({str(here)!r})", HOME=str(home)
    )
    assert warnings == []
    assert timings["logged_s"] < 0.5
    files = [path for path in (tmp_path / "trackers" / kind).rglob("*") if path.is_file()]
    assert files
    assert [path.name for path in files if b"S3CRET" in path.read_bytes()] == []
    assert list(here.iterdir()) == []
    assert [
        path
        for path in home.rglob("*")
        if path.is_file() and not {"matplotlib", ".clearml"} & set(path.parts)
    ] == []  # ClearML keeps its session there whatever it is told
    if kind in READERS:
        losses, rate = READERS[kind](tmp_path / "trackers" / kind)
        assert losses == pytest.approx(LOSSES)
        assert "0.1" in rate
    else:  # SwanLab's format has no reader but its server
        assert any(b"eval_loss" in path.read_bytes() for path in files)


@pytest.mark.parametrize("listens", [True, False], ids=["hangs", "refuses"])
def test_an_mlflow_server_that_cannot_be_reached_costs_one_warning(tmp_path, listens):
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("pip install mlflow")
    with server(listens=listens) as url:
        limit = "trackers.FINISH_S = 6.0"
        timings, warnings = track(
            tmp_path, "mlflow", "tensorboard", before=limit, MLFLOW_TRACKING_URI=url, HOME=str(tmp_path)
        )
    ours = [line for line in warnings if "Retrying" not in line]  # urllib3 tells of its own attempts
    assert len(ours) == 1
    assert "tracker mlflow gave up" in ours[0]
    assert timings["logged_s"] < 0.5
    assert list(tmp_path.rglob("events.out.tfevents.*"))
