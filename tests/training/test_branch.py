"""run.branch_from: a new run that goes on from the whole state of another, with what may differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import Ended, arguments, assert_equal_state, finished, four_parts, on_ranks, rows, summary

KEEP = {"checkpoint__every": 4, "checkpoint__keep_last": 0}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, with checkpoints 4 and 8."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finished(1, arguments(run, data, **KEEP))
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_where_nothing_differs_a_branch_is_the_run_bit_for_bit(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    source, run, before = whole / "checkpoints" / "step-00000004", tmp_path / "branch", content(whole)
    said = finished(1, arguments(run, data, run__branch_from=source, **KEEP)).out
    assert f"branched  from {source} at step 4, 1024 tokens" in said
    assert rows(run) == rows(whole)[4:]
    assert_equal_state(run / "checkpoints" / "step-00000008", whole / "checkpoints" / "step-00000008")
    assert json.loads((run / "branch.json").read_text())["checkpoint"] == str(source)
    [start, *_] = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert (start["kind"], start["step"]) == ("started", 4)
    assert f"branched from {source} at step 4" in start["detail"]
    assert f"branch_from: {source}" in (run / "config.yaml").read_text()
    assert content(whole) == before, "the source stays as it is"


def test_a_branch_has_another_rate_and_layout_and_goes_on_from_its_own_checkpoints(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    """From a run: its newest checkpoint. What the run does later changes nothing for the branch."""
    run, source = tmp_path / "branch", tmp_path / "source"
    shutil.copytree(whole, source)
    argv = arguments(run, data, run__branch_from=source, optim__lr=0.001, schedule="cosine", **KEEP)
    finished(2, [*argv, "train.steps=10"])
    assert [row["step"] for row in rows(run)] == [9, 10]
    assert rows(run)[0]["tokens_seen"] == 9 * 256
    shutil.rmtree(source)
    said = finished(1, [*argv, "train.steps=12"]).out
    assert "resumed   step-00000010" in said
    assert [row["step"] for row in rows(run)] == [9, 10, 11, 12]
    assert summary(run)["status"] == "finished"


def refused(data: Path, run: Path, **options: object) -> str:
    """Before anything is written."""
    before = content(run) if run.exists() else None
    ended: Ended = on_ranks(1, arguments(run, data, **options))
    assert ended.code == 2, ended
    assert (content(run) if run.exists() else None) == before
    return ended.err


def test_what_a_branch_cannot_begin_from_is_refused(data: Path, whole: Path, tmp_path: Path) -> None:
    new, source = tmp_path / "new", whole / "checkpoints" / "step-00000004"
    assert "there is no such folder" in four_parts(
        refused(data, new, run__branch_from=tmp_path / "none"), "run.branch_from"
    )
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint in it" in four_parts(
        refused(data, new, run__branch_from=tmp_path / "empty"), "run.branch_from"
    )
    assert "has done 8 steps already" in four_parts(refused(data, new, run__branch_from=whole), "train")
    words = refused(data, new, run__branch_from=source, model__config__num_hidden_layers=1)
    assert "of another model: model.config.num_hidden_layers was 4 and is 1" in four_parts(
        words, "run.branch_from"
    )
    words = refused(data, new, run__branch_from=source, model__config__rope_theta=500.0)
    assert "of another model: model.config.rope_theta was" in four_parts(words, "run.branch_from")
    broken = tmp_path / "broken" / "step-00000004"
    shutil.copytree(source, broken)
    (broken / "__0_0.distcp").write_bytes(b"")
    assert "damaged: __0_0.distcp" in four_parts(refused(data, new, run__branch_from=broken), "checkpoint")
    assert not new.exists()
    assert "run.branch_from was '' and is" in four_parts(
        refused(data, whole, run__branch_from=source), "run.dir"
    )
