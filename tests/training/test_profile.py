"""run.profile: a trace of each chosen rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridtrain.cli.main import main
from tests import runs


def test_the_chosen_ranks_write_traces_of_three_steps(data: Path, tmp_path: Path) -> None:
    options = {"train__steps": 6, "parallel__tp": 2, "run__profile": "true", "run__profile_ranks": "[1]"}
    runs.finished(2, runs.arguments(tmp_path / "run", data, **options))
    [trace] = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "rank-1-steps-3-5.json"
    steps = {
        event["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if str(event.get("name", "")).startswith("ProfilerStep")
    }
    assert len(steps) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_of_few_steps_ends_all_the_same(data: Path, tmp_path: Path, count: int) -> None:
    runs.finished(1, runs.arguments(tmp_path / "run", data, train__steps=count, run__profile="true"))
    assert len(runs.rows(tmp_path / "run")) == count


@pytest.mark.parametrize("ranks", ["[]", "[1]", "[-1]"])
def test_ranks_that_there_are_not_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: str
) -> None:
    words = runs.arguments(tmp_path / "run", data, run__profile="true", run__profile_ranks=ranks)
    assert main(["train", *words]) == 2
    assert "run.profile_ranks=" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
