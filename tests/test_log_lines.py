"""What a line of metrics.jsonl says of the steps since the last one, in a whole run; and Python's garbage collection in it."""

import gc
import json
from pathlib import Path

import pytest

from hybridtrain.loop import Collector
from tests import runs


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_a_line_is_the_mean_since_the_last_one(tmp_path):
    data = runs.corpus(tmp_path)
    runs.finished(1, runs.arguments(tmp_path / "each", data, train__steps=5))
    ended = runs.finished(1, runs.arguments(tmp_path / "some", data, train__steps=5, train__log_every=3))
    own = [line["step_loss"] for line in lines(tmp_path / "each")]
    assert [line["loss"] for line in lines(tmp_path / "each")] == own
    some = lines(tmp_path / "some")
    assert [line["step"] for line in some] == [1, 3, 5]
    assert [line["step_loss"] for line in some] == [own[0], own[2], own[4]]
    means = [own[0], sum(own[1:3]) / 2, sum(own[3:5]) / 2]
    assert [line["loss"] for line in some] == pytest.approx(means, rel=1e-6)
    assert runs.summary(tmp_path / "some")["final_loss"] == some[-1]["loss"]
    assert f"loss {means[-1]:.4f}" in ended.out + ended.err


def test_garbage_is_collected_at_certain_steps_only():
    assert gc.isenabled()
    with Collector() as collector:
        collector.after(3)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        before = gc.get_stats()[1]["collections"]
        for step in range(4, 101):
            collector.after(step)
        assert gc.get_stats()[1]["collections"] == before + 2  # at 50 and 100
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
