"""What a run does about steps that are not finite and about loss spikes: skip, stop, go back to a checkpoint
and leave out the data in between."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.checkpoint import marker
from hybridtrain.config import checks, compose
from hybridtrain.errors import UserError
from hybridtrain.training import spikes
from tests.runs import arguments, assert_equal_state, checkpoints, corpus, cut_off, finished, four_parts, rows
from tests.training.planted import ROWS, SEQ_LEN, Plant, run, sample, steps_read, updates
from tests.training.test_origin import UP, events

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "zero3": (2, {"parallel__dp_shard": 2, "parallel__dp_replicate": 1, "parallel__zero_stage": 3}),
    "pp2": (2, {"parallel__pp": 2}),
    "tp2 fp16": (2, {"parallel__tp": 2, "precision": "fp16_mixed", "precision__init_scale": 1024.0}),
    "deepspeed zero1": (
        2,
        {
            "engine": "deepspeed",
            "parallel__dp_shard": 2,
            "parallel__dp_replicate": 1,
            "parallel__zero_stage": 1,
        },
    ),
}
BACK = {
    "train__on_nonfinite": "rollback",
    "checkpoint__every": 3,
    "checkpoint__keep_last": 0,
    "train__steps": 9,
}
LONG = pytest.mark.slow


def bad_row(data: Path, step: int) -> Plant:
    """A row of the batch of this step (from 0) gives inf."""
    return Plant("row", "model.embed_tokens", tokens=tuple(sample(data, step, 5)[1]))


def with_states(checkpoint: Path, states: dict[str, object]) -> None:
    """Write small states into a checkpoint."""
    progress = json.loads((checkpoint / marker.PROGRESS).read_text())
    (checkpoint / marker.PROGRESS).write_text(json.dumps({**progress, "states": states}))
    listed = json.loads((checkpoint / marker.MARKER).read_text())
    record = marker.measure(checkpoint / marker.PROGRESS)
    listed["files"][marker.PROGRESS] = {"size": record.size, "crc32": f"{record.crc32:08x}"}
    (checkpoint / marker.MARKER).write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "layout", ["single", *(pytest.param(name, marks=LONG) for name in LAYOUTS if name != "single")]
)
def test_a_rollback_leaves_out_exactly_the_window_and_goes_on_as_a_fresh_start_would(
    data: Path, tmp_path: Path, layout: str
) -> None:
    """The data of step 4 (from 0) are bad, checkpoints are at 3, 6, 9: the data of 3 and 4 are left out."""
    world, axes = LAYOUTS[layout]
    whole, options = tmp_path / "whole", {**BACK, **axes}
    assert run(world, whole, data, bad_row(data, 4), **options) == ""
    assert steps_read(whole, data, world=world, steps=11) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert updates(whole) == [step != 4 for step in range(11)]
    assert [row["step"] for row in rows(whole)] == list(range(1, 10))
    assert [row["tokens_seen"] for row in rows(whole)] == [ROWS * SEQ_LEN * step for step in range(1, 10)]
    [(step, detail)] = events(whole, "rollback")
    assert step == 3
    assert detail.startswith(
        "to step-00000003; rows 24 to 39 of the data order are left out: the loss is not"
    )
    assert events(whole, "nonfinite")[0][0] == 5
    assert checkpoints(whole) == [f"step-0000000{step}" for step in (3, 6, 9)]
    states = marker.read_progress(whole / "checkpoints" / "step-00000006").states
    window = {"step": 3, "first": 24, "stop": 40}
    assert states == {"data_left_out": {"version": 1, "windows": [window]}}
    assert marker.read_progress(whole / "checkpoints" / "step-00000003").states == {}

    fresh = cut_off(whole, tmp_path / "fresh", step=3)  # which loads the same state and leaves out the same
    with_states(fresh / "checkpoints" / "step-00000003", states)
    assert run(world, fresh, data, None, **options) == ""
    assert steps_read(fresh, data, world=world, steps=11) == [5, 6, 7, 8, 9, 10]
    assert_equal_state(fresh / "checkpoints" / "step-00000009", whole / "checkpoints" / "step-00000009")
    assert rows(fresh) == rows(whole)

    resumed = cut_off(whole, tmp_path / "resumed", step=6)
    assert run(world, resumed, data, None, **options) == ""
    assert steps_read(resumed, data, world=world, steps=11) == [8, 9, 10]
    assert_equal_state(resumed / "checkpoints" / "step-00000009", whole / "checkpoints" / "step-00000009")


@pytest.mark.slow
def test_another_layout_leaves_out_the_same(data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run(1, whole, data, bad_row(data, 4), **BACK) == ""
    for layout in ("zero3", "pp2"):
        world, axes = LAYOUTS[layout]
        other = cut_off(whole, tmp_path / layout, step=6)
        assert run(world, other, data, None, **{**BACK, **axes}) == ""
        assert steps_read(other, data, world=world, steps=11) == [8, 9, 10]
        assert rows(other)[-1]["loss"] == pytest.approx(rows(whole)[-1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_crash_before_the_next_checkpoint_goes_back_again(data: Path, tmp_path: Path) -> None:
    """The window is not in that checkpoint; the same data make the run go back again."""
    whole = tmp_path / "whole"
    assert run(1, whole, data, bad_row(data, 4), **BACK) == ""
    again = cut_off(whole, tmp_path / "again", step=3)
    assert run(1, again, data, bad_row(data, 4), **BACK) == ""
    assert steps_read(again, data, world=1, steps=11) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert_equal_state(again / "checkpoints" / "step-00000009", whole / "checkpoints" / "step-00000009")


@pytest.mark.slow
def test_a_state_of_a_later_version_is_refused(data: Path, tmp_path: Path) -> None:
    finished(1, arguments(tmp_path / "run", data, train__steps=1))
    with_states(tmp_path / "run" / "checkpoints" / "step-00000001", {"data_left_out": {"version": 2}})
    text = run(1, tmp_path / "run", data, None, batch__micro_batch_size=1, train__steps=2)
    assert "data_left_out: this state has version 2" in four_parts(text, "checkpoint")


@pytest.mark.slow
def test_rollbacks_have_a_budget(data: Path, tmp_path: Path) -> None:
    plant = Plant("activation", UP, micro_batch=1)
    options = {**BACK, "train__max_rollbacks": 2}
    text = four_parts(run(1, tmp_path / "early", data, plant, **options), "checkpoint.every")
    assert "there is no checkpoint yet to go back to, and the loss is not finite in step 1: " in text
    finished(
        1, arguments(tmp_path / "late", data, batch__micro_batch_size=2, **{**options, "train__steps": 3})
    )
    text = four_parts(run(1, tmp_path / "late", data, plant, **options), "train.max_rollbacks")
    assert "the run has gone back 2 times, and now the loss is not finite in step 4: " in text
    assert [step for step, _ in events(tmp_path / "late", "rollback")] == [3, 3]
    assert steps_read(tmp_path / "late", data, world=1, steps=9) == [3, 4, 5]


@pytest.mark.slow
def test_numbers_that_are_read_a_step_later_lead_to_the_same_window(data: Path, tmp_path: Path) -> None:
    """As on a GPU. The step in between is done again; before a checkpoint, the numbers are waited for."""
    options = {**BACK, "train__log_every": 100}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(1, one, data, bad_row(data, 3), late=True, **options) == ""
    assert steps_read(one, data, world=1, steps=10) == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    assert "one update later" in events(one, "nonfinite")[0][1]
    assert run(1, two, data, bad_row(data, 5), late=True, **options) == ""
    assert steps_read(two, data, world=1, steps=12) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert "one update later" not in events(two, "nonfinite")[0][1]
    assert "rows 24 to 47 of" in events(two, "rollback")[0][1]


def test_skip_goes_on(data: Path, tmp_path: Path) -> None:
    """Of a loss that is not finite no update is made, although the gradients are finite."""
    plant = Plant("loss", "lm_head", tokens=tuple(sample(data, 2, 5)[1]))
    assert run(1, tmp_path / "run", data, plant, train__steps=4) == ""
    assert updates(tmp_path / "run") == [True, True, False, True]
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 1, 0]
    [(step, detail)] = events(tmp_path / "run", "nonfinite")
    assert (step, "lm_head: the loss is not finite" in detail) == (3, True)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"train__on_nonfinite": "rollback"}, "train.on_nonfinite"),
        ({"train__on_spike": "rollback"}, "train.on_spike"),
        ({"train__on_spike": "skip", "engine": "deepspeed"}, "train.on_spike"),
        ({"train__on_spike": "rolback", "checkpoint__every": 1}, "train.on_spike"),
    ],
)
def test_policies_that_cannot_work_are_refused(
    tmp_path: Path, options: dict[str, object], field: str
) -> None:
    argv = arguments(tmp_path / "run", tmp_path, **options)
    with pytest.raises(UserError) as error:
        checks.check(compose.compose("train", argv))
    four_parts(str(error.value), field)


# -- spikes --------------------------------------------------------------------------------------------------

SPIKE = 76
"""Number of the step (from 1) whose rows are random tokens."""
OPTIONS = {
    "train__steps": 80,
    "schedule__warmup_steps": 5,
    "optim__lr": 0.01,
    "checkpoint__every": 20,
    "checkpoint__keep_last": 0,
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with more rows than a run reads."""
    folder = tmp_path_factory.mktemp("clean")
    return corpus(folder, documents=30)


@pytest.fixture(scope="module")
def spiky(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with random tokens in all rows of a step."""
    spoilt = Path(shutil.copytree(clean, tmp_path_factory.mktemp("spiky") / "data"))
    facts = json.loads((spoilt / "corpus.json").read_text())
    del facts["digests"]  # as an earlier version left it: nothing to compare the files with
    (spoilt / "corpus.json").write_text(json.dumps(facts))
    tokens, draw = np.fromfile(spoilt / "train.bin", dtype="<u2"), np.random.default_rng(0)
    for place in range(ROWS):
        row = sample(clean, SPIKE - 1, place)[0]
        tokens[row * SEQ_LEN : (row + 1) * SEQ_LEN + 1] = draw.integers(0, 299, SEQ_LEN + 1)
    tokens.tofile(spoilt / "train.bin")
    return spoilt


@pytest.mark.slow
def test_a_clean_run_has_no_spikes(clean: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "train__steps": 100}
    assert run(1, tmp_path / "run", clean, None, **options, train__on_spike="stop") == ""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_spike_stops_the_run(spiky: Path, tmp_path: Path, world: int) -> None:
    text = run(world, tmp_path / "run", spiky, None, **OPTIONS, train__on_spike="stop")
    assert f"a loss spike in step {SPIKE}: loss " in four_parts(text, "train.on_spike")
    [(step, detail)] = events(tmp_path / "run", "spike")
    assert step == SPIKE
    assert float(detail.partition("z = ")[2].partition(";")[0]) > 6


@pytest.mark.slow
@pytest.mark.parametrize("grad_threshold", [0, 3])
def test_a_spike_is_skipped(spiky: Path, tmp_path: Path, grad_threshold: int) -> None:
    options = {**OPTIONS, "train__on_spike": "skip", "train__spike_grad_threshold": grad_threshold}
    assert run(1, tmp_path / "run", spiky, None, **options) == ""
    assert [step for step, _ in events(tmp_path / "run", "spike")] == [SPIKE]
    assert updates(tmp_path / "run") == [step != SPIKE for step in range(1, 81)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "deepspeed zero1"])
def test_a_spike_rolls_the_run_back(spiky: Path, tmp_path: Path, layout: str) -> None:
    world, axes = LAYOUTS[layout]
    whole, options = tmp_path / "run", {**OPTIONS, **axes, "train__on_spike": "rollback"}
    assert run(world, whole, spiky, None, **options) == ""
    assert [step for step, _ in events(whole, "rollback")] == [60]
    assert steps_read(whole, spiky, world=world, steps=96) == list(range(96))
    assert all(updates(whole))
    window = marker.read_progress(whole / "checkpoints" / "step-00000080").states["loss_window"]
    assert (len(window["losses"]), window["frozen_until"]) == (64, SPIKE)
    assert max(window["losses"]) < 5  # without the spike
    assert not set(window["losses"]) & {row["loss"] for row in rows(whole)[60:SPIKE]}  # nor those done again
    first, again = (tmp_path / name for name in ("first", "again"))
    resumed = cut_off(whole, first, step=60)
    with_states(
        resumed / "checkpoints" / "step-00000060",
        {
            "data_left_out": {"version": 1, "windows": [{"step": 60, "first": 480, "stop": 608}]},
            "loss_window": {**window, "losses": window["losses"][:60], "norms": window["norms"][:60]},
        },
    )
    assert run(world, resumed, spiky, None, **options) == ""
    assert steps_read(resumed, spiky, world=world, steps=96) == list(range(76, 96))
    ours, theirs = (marker.read_progress(path / "checkpoints" / "step-00000080") for path in (resumed, whole))
    assert ours.states["data_left_out"] == theirs.states["data_left_out"]
    assert rows(resumed)[-1] == rows(whole)[-1]
    other = cut_off(whole, again, step=80)
    assert run(world, other, spiky, None, **{**options, "train__steps": 82}) == ""
    assert steps_read(other, spiky, world=world, steps=98) == [96, 97]


def test_the_score_of_a_spike() -> None:
    """(log v - median) / (1.4826 MAD + 0.001), by hand."""
    window = spikes.Spikes(threshold=6.0, grad_threshold=0.0, state={})
    values = [math.exp(step / 10) for step in range(21)]  # logarithms 0 to 2, median 1, MAD 0.5
    for step, value in enumerate(values):
        assert window.limits is None or step >= spikes.LEAST
        window.add(value, 1.0, step=step + 1)
    assert spikes.score(window.losses, math.exp(3)) == pytest.approx(2 / (1.4826 * 0.5 + 1e-3))
    limits = window.limits
    assert limits is not None
    assert limits[0] == pytest.approx(math.exp(1 + 6 * (1.4826 * 0.5 + 1e-3)))
    assert not window.is_spike(limits[0], 1.0)
    assert window.is_spike(limits[0] * 1.001, 1.0)
    never = spikes.Spikes(threshold=1e6, grad_threshold=0.0, state=window.state())
    assert not never.is_spike(1e300, 1.0)
    again = spikes.Spikes(threshold=6.0, grad_threshold=3.0, state=window.state())
    assert again.losses == window.losses
    assert not again.is_spike(1e9, 1.0)
    assert again.is_spike(1e9, 1.1)


def test_changes_of_the_loss_scale_are_those_of_the_steps_that_count(data: Path, tmp_path: Path) -> None:
    """Whether they are written at each step, or after a rollback, at the end."""
    found = []
    for every in (1, 100):
        folder = tmp_path / str(every)
        fp16 = {"precision": "fp16_mixed", "precision__init_scale": 2.0**24, "train__log_every": every}
        assert run(1, folder, data, bad_row(data, 4), **BACK, **fp16) == ""
        assert [step for step, _ in events(folder, "rollback")] == [3]
        found.append(events(folder, "loss_scale"))
    assert found[0] == found[1]
    assert found[0]
