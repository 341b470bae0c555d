"""What can be wrong with a run directory: damaged checkpoints, another run, another model, other data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import arguments, corpus, finished, four_parts, on_ranks, rows
from tests.training.answers import answer


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4, and its own copy of the data."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(data, root / "data")
    finished(2, arguments(root / "run", root / "data", train__steps=4, checkpoint__every=2))
    return root


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (
        lambda run: os.truncate(newest(run) / "__1_0.distcp", 1000),
        "__1_0.distcp: it has 1000 bytes instead of",
    ),
    "missing tensors": (lambda run: (newest(run) / "__0_0.distcp").unlink(), "__0_0.distcp: it is missing"),
    "truncated metadata": (
        lambda run: os.truncate(newest(run) / ".metadata", 10),
        ".metadata: it has 10 bytes instead of",
    ),
    "truncated marker": (
        lambda run: os.truncate(newest(run) / "complete.json", 10),
        "complete.json: it cannot be read",
    ),
    "emptied position": (
        lambda run: os.truncate(newest(run) / "progress.json", 0),
        "progress.json: it has 0 bytes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_run_left_as_it_is(
    trained: Path, copy: Path, damage: str
) -> None:
    spoil, words = DAMAGE[damage]
    spoil(copy)
    before = contents(copy)
    text = four_parts(answer(arguments(copy, trained / "data", checkpoint__every=2)), "checkpoint")
    assert f"checkpoint={newest(copy)}: damaged: {words}" in text
    assert "IMPORTED TORCH" not in text
    assert contents(copy) == before


def test_damage_that_only_reading_shows_is_refused_on_all_ranks(trained: Path, copy: Path) -> None:
    file = newest(copy) / "__1_0.distcp"
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    file.write_bytes(spoilt)
    ended = on_ranks(2, arguments(copy, trained / "data", checkpoint__every=2, train__steps=6))
    assert ended.code == 2
    assert "__1_0.distcp: its content has changed (CRC32 differs)" in four_parts(ended.err, "checkpoint")
    assert json.loads((copy / "summary.json").read_text())["status"] == "failed"


def test_an_incomplete_checkpoint_is_passed_over_for_the_newest_complete_one(
    trained: Path, copy: Path
) -> None:
    (newest(copy) / "complete.json").unlink()
    said = finished(2, arguments(copy, trained / "data", checkpoint__every=2, train__steps=4)).out
    assert "resumed   step-00000002 at step 2" in said
    assert rows(copy) == rows(trained / "run")


def test_nothing_but_incomplete_checkpoints_is_not_enough_where_one_is_required(
    trained: Path, copy: Path
) -> None:
    for path in (copy / "checkpoints").iterdir():
        (path / "complete.json").unlink()
    assert "holds no complete checkpoint" in answer(
        arguments(copy, trained / "data", checkpoint__every=2, run__resume="required")
    )


def test_never_with_a_run_there(trained: Path, copy: Path) -> None:
    text = four_parts(
        answer(arguments(copy, trained / "data", checkpoint__every=2, run__resume="never")), "run.resume"
    )
    assert "holds a run already" in text


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("run__seed", 3, "run.seed was 0 and is 3"),
        (
            "model__config__intermediate_size",
            96,
            "another run: model.config.intermediate_size was 160 and is 96\n",
        ),
        ("optim__lr", 0.1, "optim.lr was"),
    ],
)
def test_an_explicit_directory_of_another_run(
    trained: Path, copy: Path, option: str, value: object, words: str
) -> None:
    before = contents(copy)
    text = four_parts(
        answer(arguments(copy, trained / "data", checkpoint__every=2, **{option: value})), "run.dir"
    )
    assert "it holds another run" in text
    assert words in text
    assert (f"run.branch_from={copy}" in text) == (not option.startswith("model"))
    assert contents(copy) == before


def test_a_checkpoint_of_another_model(trained: Path, copy: Path, tmp_path: Path) -> None:
    """Put into the run by hand: the configuration is the run's own, so only the checkpoint can tell."""
    other = tmp_path / "other"
    finished(2, arguments(other, trained / "data", train__steps=5, model__config__intermediate_size=96))
    shutil.copytree(other / "checkpoints" / "step-00000005", copy / "checkpoints" / "step-00000005")
    text = four_parts(answer(arguments(copy, trained / "data", checkpoint__every=2)), "model")
    assert "is of another model: intermediate_size was 96 and is 160" in text


def test_other_data_in_the_same_folder_goes_on_only_when_asked_for(
    trained: Path, copy: Path, tmp_path: Path
) -> None:
    """The path is the run's own, so only the fingerprint of the tokens can tell."""
    other = corpus(tmp_path / "other", words="comes after")
    kept = tmp_path / "kept"
    shutil.move(trained / "data", kept)
    try:
        shutil.copytree(other, trained / "data")
        argv = arguments(copy, trained / "data", checkpoint__every=2, train__steps=6)
        before = contents(copy)
        text = four_parts(answer(argv), "data.path")
        assert (
            f"data.path={trained / 'data'}: the checkpoint of step 4 was trained on other data: "
            "they were prepared again since, or replaced"
        ) in text
        assert "run.allow_data_change=true" in text
        assert contents(copy) == before
        said = finished(2, [*argv, "run.allow_data_change=true"]).out
        assert "warning: resuming with other data: data, order" in said
        same = "model, optimizer, schedule, seed and batch are unchanged; with other data:"
        assert f"resumed   step-00000004 at step 4, 1024 tokens; {same} {trained / 'data'}" in said
        assert [row["step"] for row in rows(copy)] == list(range(1, 7))
    finally:
        shutil.rmtree(trained / "data")
        shutil.move(kept, trained / "data")
