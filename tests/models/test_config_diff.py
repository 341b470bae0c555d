"""The model of a run stays what it was, down to fields that no size tells: an edited config.json is noticed
by `verify`, by a resume and by a branch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.config.compose import compose
from hybridtrain.models import config_diff
from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.verify import verify_run
from tests.export.runs import as_earlier
from tests.runs import arguments, finished, four_parts, on_ranks, rows

THETA = "rope_parameters.rope_theta was 10000.0 and is 5000000.0"
ENDS = {"train__steps": 3, "checkpoint__every": 1, "checkpoint__keep_last": 0}


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def begun_from(source: Path, run: Path, data: Path, **options: object) -> list[str]:
    """A command line whose model is the one in `source`, without fields of its own."""
    argv = arguments(run, data, **{**ENDS, "model__from_pretrained": source, **options})
    return [word for word in argv if not word.startswith(("model=", "model.config"))]


def other_theta(file: Path) -> None:
    edit(file, rope_parameters={"rope_theta": 5e6, "rope_type": "default"})


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model, a run of three steps from it, and its first two steps apart."""
    folder = tmp_path_factory.mktemp("made")
    fields = {**compose("train", ["model=tiny"]).model.config, "vocab_size": 300}
    plain_model(hf_config(fields, chosen={}, attention="sdpa")).save_pretrained(folder / "source")
    finished(1, begun_from(folder / "source", folder / "run", data))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The run after two steps; its source is made/source."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    return tmp_path / "run"


@pytest.fixture
def source(made: Path) -> Path:
    """The pretrained model, which is put back afterwards."""
    kept = made / "kept"
    shutil.copytree(made / "source", kept)
    yield made / "source"
    shutil.rmtree(made / "source", ignore_errors=True)
    kept.rename(made / "source")


def test_verify_sees_an_edited_config(run: Path) -> None:
    assert verify_run(run) == ([], 2)
    other_theta(run / "model" / "config.json")
    (problem,) = verify_run(run)[0]
    assert f"model/config.json: it has changed since step-00000002 was written ({THETA})" in problem


def test_a_resume_warns_of_an_edited_copy_and_writes_it_again(data: Path, made: Path, run: Path) -> None:
    """What is trained is built from the run's own model section: the copy is for an export."""
    before = json.loads((run / "model" / "config.json").read_text())
    other_theta(run / "model" / "config.json")
    ended = finished(1, begun_from(made / "source", run, data))
    assert f"model/config.json has changed since step-00000002 was written ({THETA})" in ended.err + ended.out
    assert json.loads((run / "model" / "config.json").read_text()) == before
    assert rows(run) == rows(made / "run")


def test_a_source_that_was_edited_meanwhile_is_refused(data: Path, run: Path, source: Path) -> None:
    # nothing that a trained model computes with
    edit(source / "config.json", bos_token_id=7, initializer_range=0.5)
    finished(1, begun_from(source, run, data))
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    other_theta(source / "config.json")
    before = (run / "metrics.jsonl").read_bytes()
    for checkpoint in ("with its config.json", "of an earlier release"):
        if checkpoint == "of an earlier release":
            as_earlier(run / "checkpoints" / "step-00000002")
        ended = on_ranks(1, begun_from(source, run, data))
        assert ended.code == 2
        assert THETA in four_parts(ended.err, "model")
    assert (run / "metrics.jsonl").read_bytes() == before
    branch = on_ranks(
        1, begun_from(source, run.parent / "branch", data, run__branch_from=run, optim__lr=0.001)
    )
    assert branch.code == 2
    assert THETA in branch.err
    assert not (run.parent / "branch").exists()


def test_without_its_source_a_run_goes_by_the_checkpoint_and_not_by_the_edited_copy(
    data: Path, made: Path, run: Path, source: Path
) -> None:
    (run / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 0], "temperature": 0.6}')
    other_theta(run / "model" / "config.json")
    shutil.rmtree(source)
    finished(1, begun_from(source, run, data))
    assert rows(run) == rows(made / "run")
    assert json.loads((run / "model" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 10000.0
    assert json.loads((run / "model" / "generation_config.json").read_text()) == {
        "eos_token_id": [5, 0],
        "temperature": 0.6,
    }, "taken from the source"


def test_fields_of_another_version_of_transformers_are_no_change() -> None:
    old = {
        "transformers_version": "5.17.0",
        "hidden_size": 8,
        "gone": 1,
        "rope_parameters": {"rope_theta": 1e4, "old": 1},
    }
    new = {
        "transformers_version": "5.23.0",
        "hidden_size": 8,
        "added": 2,
        "rope_parameters": {"rope_theta": 10000, "new": 1},
    }
    assert config_diff.changes(old, new) == {}
    assert set(config_diff.changes(old, {**new, "transformers_version": "5.17.0"})) == {
        "gone",
        "added",
        "rope_parameters.old",
        "rope_parameters.new",
    }
    assert config_diff.changes(old, {**new, "rope_parameters": {"rope_theta": 2e4}}) == {
        "rope_parameters.rope_theta": (1e4, 2e4)
    }
    assert config_diff.changes({"a": True}, {"a": 1}) == {"a": (True, 1)}
    assert config_diff.model_changes({"use_cache": True}, {"use_cache": False}) == {}
