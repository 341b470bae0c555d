"""events.jsonl and the machine facts of real runs: start, checkpoints, a resume under another layout, skipped
updates between lines, a failure."""

from __future__ import annotations

import json
from pathlib import Path

from hybridtrain.run.record import read_machine
from hybridtrain.runtime import host
from tests.runs import arguments, finished, on_ranks, summary


def events(run: Path) -> list[tuple[str, int, str]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    return [(line["kind"], line["step"], line["detail"]) for line in lines]


def test_a_run_and_its_continuation_under_another_layout(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished(2, arguments(run, data, train__steps=4, checkpoint__every=2))
    assert [(kind, step) for kind, step, _ in events(run)] == [
        ("started", 0),
        ("checkpoint", 2),
        ("checkpoint", 4),
        ("finished", 4),
    ]
    assert events(run)[0][2] == "dp_replicate2 on 2 processes"
    assert events(run)[1][2] == "step-00000002"
    told = summary(run)
    assert (told["total_steps"], told["layout"]) == (4, "dp_replicate2")
    assert told["parameters"] > 1000
    (node,) = read_machine(run)
    assert "machine" not in told, "it would be written again at every log line"
    assert node["ranks"] == [0, 1]
    assert node["cores"] >= 1
    assert node["memory_gib"] > 0.5
    finished(2, arguments(run, data, train__steps=6, checkpoint__every=2, parallel="tp2"))
    later = events(run)[4:]
    assert [(kind, step) for kind, step, _ in later] == [("resumed", 4), ("checkpoint", 6), ("finished", 6)]
    assert later[0][2].startswith("tp2 on 2 processes; from step-00000004; changed: ")
    assert "parallel.tp" in later[0][2]


def test_updates_skipped_between_two_lines_are_counted_and_each_change_of_the_loss_scale_is_told(
    data: Path, tmp_path: Path
) -> None:
    """A loss scale that no fp16 gradient survives, at first and whenever it grows; only every third step is
    logged."""
    run = tmp_path / "run"
    options = {
        "precision": "fp16_mixed",
        "precision__init_scale": 2.0**100,
        "precision__growth_factor": 2.0**14,
        "precision__backoff_factor": 2.0**-14,
        "precision__growth_interval": 2,
        "precision__hysteresis": 1,
        "train__steps": 9,
        "train__log_every": 3,
    }
    finished(1, arguments(run, data, **options))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["skipped"]) for row in rows] == [(1, 1), (3, 2), (6, 1), (9, 1)]
    skipped = [(step, detail) for kind, step, detail in events(run) if kind == "skipped"]
    assert skipped[1:] == [
        (3, "2 updates skipped since the last line; loss scale 33,554,432"),
        (6, "1 update skipped since the last line; loss scale 33,554,432"),
        (9, "1 update skipped since the last line; loss scale 33,554,432"),
    ]
    low, high, highest = "2,048", "33,554,432", "1.12589990684262e+15"
    assert [(step, detail) for kind, step, detail in events(run) if kind == "loss_scale"] == [
        (1, f"1.26765060022823e+30 to {highest}"),
        (2, f"{highest} to {high}"),
        (3, f"{high} to {low}"),
        (5, f"{low} to {high}"),
        (6, f"{high} to {low}"),
        (8, f"{low} to {high}"),
        (9, f"{high} to {low}"),
    ]


def test_a_failure_is_an_event_with_its_reason(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"precision": "fp16_mixed", "precision__static_scale": 2.0**40, "train__max_nonfinite": 2}
    assert on_ranks(1, arguments(run, data, **options)).code == 2
    kind, step, detail = events(run)[-1]
    assert (kind, step) == ("failed", 2)
    assert "train.max_nonfinite=2" in detail
    assert "the gradients of 2 steps in a row" in detail
    assert "loss scale 1,099,511,627,776" in detail
    assert summary(run)["exit_reason"] == detail


def test_ranks_are_told_by_host() -> None:
    facts = {"cpu": "x", "cores": 8}
    merged = host.merge([{"host": "a", **facts}, {"host": "b", **facts}, {"host": "a", **facts}])
    assert merged == [{"host": "a", **facts, "ranks": [0, 2]}, {"host": "b", **facts, "ranks": [1]}]
