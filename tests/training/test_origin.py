"""Faults planted in the modules of some ranks are traced to module, rank, micro-batch, row and document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import checkpoints, rows, summary
from tests.training.planted import Plant, run, sample

UP, DOWN, OUT = (
    "model.layers.2.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.self_attn.o_proj",
)
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "pp2-tp2": (4, {"parallel__pp": 2, "parallel__tp": 2}),
    "zero3": (2, {"parallel__dp_shard": 2, "parallel__dp_replicate": 1, "parallel__zero_stage": 3}),
    "zbv": (2, {"parallel__pp": 2, "parallel__schedule": "zbv_zero_bubble"}),
}
LAYOUTS |= {
    f"deepspeed {name}": (LAYOUTS[name][0], {**LAYOUTS[name][1], "engine": "deepspeed"})
    for name in ("zero3", "pp2-tp2")
}
LAYOUTS["deepspeed pp2-tp2"][1]["precision"] = "bf16_mixed"
BOTH_OF_STAGE_0, BOTH_OF_STAGE_1 = (
    "rank 0 (pp 0, tp 0), rank 1 (pp 0, tp 1)",
    "rank 2 (pp 1, tp 0), rank 3 (pp 1, tp 1)",
)
FORWARD, BACKWARD = "its output is not finite", "in the backward pass its input gradient is not finite"
SPOILT = 5
"""Place in the global batch of the row that is spoilt: in micro-batch 2 of 4, or 0 of data rank 1."""


def events(folder: Path, kind: str) -> list[tuple[int, str]]:
    """(step, detail) of the events of a kind."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(line["step"], line["detail"]) for line in lines if line["kind"] == kind]


def stop(layout: str, folder: Path, data: Path, plant: Plant, **options: object) -> tuple[str, str]:
    """(finding, what to try) of a run that stops in its first step."""
    world, axes = LAYOUTS[layout]
    given = {"train__on_nonfinite": "stop", "checkpoint__every": 1, **axes, **options}
    first, _, advice = run(world, folder, data, plant, **given).splitlines()
    assert first.startswith("train.on_nonfinite=stop: ")
    before, _, finding = first.partition(" in step 1: ")
    assert before.endswith("not finite")
    [(step, detail)] = events(folder, "nonfinite")
    assert step == 1
    assert detail.endswith(finding)
    assert finding in str(summary(folder)["exit_reason"])
    assert not (folder / "checkpoints").exists() or checkpoints(folder) == []
    return finding, advice


def check(
    layout: str, plant: Plant, folder: Path, data: Path, *, words: str, ranks: str, places: list[int]
) -> None:
    """`places`: of the rows that are named, in the global batch."""
    finding, _ = stop(layout, folder, data, plant)
    module = f"{plant.module}.attention" if plant.kind == "attention" else plant.module
    assert finding.startswith(f"{module}: {words}"), finding
    assert f"; micro-batch {plant.micro_batch}, {ranks}; row " in finding, finding
    for place in range(8):
        row, _, documents = sample(data, 0, place)
        of = f"row {row} of {data} (document"
        assert (of in finding) == (place in places), (place, finding)
        assert place not in places or f"{of}{'s' if documents[1:] else ''} {documents[0]}" in finding, finding


def spoilt(data: Path) -> tuple[int, ...]:
    return tuple(sample(data, 0, SPOILT)[1])


LONG = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "plant", "words", "ranks", "places"),
    [
        pytest.param("single", Plant("weight", UP), "its weight", "rank 0", [0, 1], marks=LONG),
        pytest.param(
            "single", Plant("attention", "model.layers.1.self_attn"), FORWARD, "rank 0", [0, 1], marks=LONG
        ),
        pytest.param("single", Plant("between", UP), "its input", "rank 0", [0, 1], marks=LONG),
        pytest.param(
            "single", Plant("backward", DOWN, micro_batch=3), BACKWARD, "rank 0", [6, 7], marks=LONG
        ),
        pytest.param(
            "pp2-tp2", Plant("weight", UP, (3,)), "its weight", "rank 3 (pp 1, tp 1)", [0, 1], marks=LONG
        ),
        pytest.param(
            "pp2-tp2", Plant("activation", OUT, None, 2), FORWARD, BOTH_OF_STAGE_0, [4, 5], marks=LONG
        ),
        pytest.param(
            "pp2-tp2",
            Plant("attention", "model.layers.3.self_attn"),
            FORWARD,
            BOTH_OF_STAGE_1,
            [0, 1],
            marks=LONG,
        ),
        ("zero3", Plant("activation", OUT, (1,), 1, 2), FORWARD, "rank 1 (dp_shard 1)", [6, 7]),
        pytest.param(
            "deepspeed zero3",
            Plant("activation", OUT, (1,), 1, 2),
            FORWARD,
            "rank 1 (dp_shard 1)",
            [6, 7],
            marks=LONG,
        ),
        pytest.param(
            "deepspeed pp2-tp2",
            Plant("backward", "model.layers.3.mlp.act_fn", (2,), 1),
            BACKWARD,
            "rank 2 (pp 1, tp 0)",
            [2, 3],
            marks=LONG,
        ),
        pytest.param("zbv", Plant("backward", DOWN, None, 1), BACKWARD, "rank 1 (pp 1)", [2, 3], marks=LONG),
    ],
)
def test_a_fault_is_traced(
    data: Path, tmp_path: Path, layout: str, plant: Plant, words: str, ranks: str, places: list[int]
) -> None:
    check(layout, plant, tmp_path / "run", data, words=words, ranks=ranks, places=places)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kind", "module", "micro_batch", "words", "ranks"),
    [
        ("zero3", "row", "model.embed_tokens", 0, FORWARD, "rank 1 (dp_shard 1)"),
        ("deepspeed zero3", "row", "model.embed_tokens", 0, FORWARD, "rank 1 (dp_shard 1)"),
        ("deepspeed pp2-tp2", "loss", "lm_head", 2, "the loss is not finite", BOTH_OF_STAGE_1),
        ("pp2-tp2", "row", "model.embed_tokens", 2, FORWARD, BOTH_OF_STAGE_0),
        ("pp2-tp2", "loss", "lm_head", 2, "the loss is not finite", BOTH_OF_STAGE_1),
        ("single", "loss", "lm_head", 2, "the loss is not finite", "rank 0"),
    ],
)
def test_one_bad_row_of_a_micro_batch_is_named_with_its_document(
    data: Path, tmp_path: Path, layout: str, kind: str, module: str, micro_batch: int, words: str, ranks: str
) -> None:
    plant = Plant(kind, module, micro_batch=micro_batch, tokens=spoilt(data))
    check(layout, plant, tmp_path / "run", data, words=words, ranks=ranks, places=[SPOILT])


@pytest.mark.slow
def test_a_fault_that_does_not_come_again_is_a_finding(data: Path, tmp_path: Path) -> None:
    finding, advice = stop("single", tmp_path / "run", data, Plant("once", UP))
    assert finding == "it did not come again when the step was repeated"
    assert "hardware" in advice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words", "advice"),
    [
        ("activation", FORWARD, "precision=bf16_mixed: fp16 ends at 65504"),
        ("backward", BACKWARD, "a lower precision.min_scale"),
    ],
)
def test_the_advice_in_fp16_depends_on_the_direction(
    data: Path, tmp_path: Path, kind: str, words: str, advice: str
) -> None:
    scale = {"precision": "fp16_mixed", "precision__init_scale": 1.0}
    finding, said = stop("single", tmp_path / "run", data, Plant(kind, DOWN, micro_batch=1), **scale)
    assert finding.startswith(f"{DOWN}: {words}")
    assert "float16 ends at 65504" in finding
    assert advice in said


@pytest.mark.slow
def test_gradients_that_overflow_at_a_high_loss_scale_are_skipped_without_a_replay(
    data: Path, tmp_path: Path
) -> None:
    scale = {"precision": "fp16_mixed", "precision__init_scale": 2.0**28, "train__on_nonfinite": "stop"}
    assert run(1, tmp_path / "run", data, None, train__steps=24, **scale) == ""
    assert rows(tmp_path / "run")[0]["skipped"] == 1
    assert rows(tmp_path / "run")[-1]["skipped"] == 0
    assert events(tmp_path / "run", "nonfinite") == []


@pytest.mark.slow
def test_the_error_at_the_limit_of_skipped_steps_says_where_it_began(data: Path, tmp_path: Path) -> None:
    plant = Plant("activation", OUT, micro_batch=1)
    text = run(1, tmp_path / "run", data, plant, train__max_nonfinite=3)
    first, allowed, advice = text.splitlines()
    assert first.startswith("train.max_nonfinite=3: ")
    assert f"{OUT}: {FORWARD}" in first
    assert allowed.startswith("  allowed: ")
    assert advice.startswith("  try:     a lower optim.lr")
    assert advice.count("a lower optim.lr") == 1
    assert [step for step, _ in events(tmp_path / "run", "nonfinite")] == [1]  # one replay for all three
