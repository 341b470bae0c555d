"""Where an export goes: what it replaces and what it leaves, two at once, and one that was killed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hybridtrain.checkpoint import marker
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.schema import CheckpointConfig
from hybridtrain.errors import UserError
from hybridtrain.export import destination, hf
from hybridtrain.types import Progress
from tests.export.runs import exporting, model_of, run_of
from tests.runs import immutable

# pytest puts back what the module turns off
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_an_earlier_export_is_replaced_and_any_other_folder_is_not(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    hf.run(exporting(run, max_shard_gb=6e-6))
    hf.run(exporting(run, checkpoint=str(run / "checkpoints" / "step-00000010")))
    assert len(list((run / "export").glob("*.safetensors"))) == 1
    assert json.loads((run / "export" / "hybridtrain.json").read_text())["step"] == 10
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an earlier export"):
        hf.run(exporting(run, out=str(mine)))
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_link_is_followed_and_leftovers_block_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    (tmp_path / "disk").mkdir()
    (run / "export").symlink_to(tmp_path / "disk" / "mine")
    for _ in range(2):  # into a place that is not there yet, and over an export
        hf.run(exporting(run))
        assert (run / "export").is_symlink()
        assert AutoModelForCausalLM.from_pretrained(run / "export").config.vocab_size == 37
    assert os.listdir(tmp_path / "disk") == ["mine"]
    shutil.copytree(tmp_path / "disk" / "mine", tmp_path / "disk" / "mine.removed")
    shutil.copytree(tmp_path / "disk" / "mine", tmp_path / "disk" / "mine.partial")
    hf.run(exporting(run))
    assert os.listdir(tmp_path / "disk") == ["mine"]
    (tmp_path / "disk" / "mine").rename(tmp_path / "disk" / "mine.removed")  # ended between the two renames
    (tmp_path / "disk" / "mine.removed" / "README.md").write_text("kept")
    hf.run(exporting(run))
    assert (tmp_path / "disk" / "mine" / "README.md").read_text() == "kept"
    assert os.listdir(tmp_path / "disk") == ["mine"]


def test_an_earlier_export_that_cannot_be_removed_goes_with_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What stays of it still says whose it is: removed with its record first, it would lie there for ever."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    hf.run(exporting(run))
    with immutable(run / "export" / "model.safetensors"):
        hf.run(exporting(run))
        assert "model.safetensors cannot be removed and stays" in caplog.text
        assert sorted(os.listdir(run / "export.removed")) == ["hybridtrain.json", "model.safetensors"]
        assert AutoModelForCausalLM.from_pretrained(run / "export").config.vocab_size == 37
    hf.run(exporting(run))
    assert not list(run.glob("export.*"))
    (run / "export.removed").mkdir()  # everything in it could be removed, and it could not
    hf.run(exporting(run))
    assert not list(run.glob("export.*"))


@pytest.mark.parametrize("earlier", [False, True])
def test_files_of_others_in_an_export_stay(tmp_path: Path, earlier: bool) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    hf.run(exporting(run, max_shard_gb=6e-6))
    out = run / "export"
    if earlier:  # whose record has no list
        (out / "hybridtrain.json").write_text(json.dumps({"step": 20, "tokens_seen": 20, "dtype": "float32"}))
    (out / "README.md").write_text("my notes")
    (out / "runs").mkdir()
    (out / "runs" / "one.txt").write_text("mine")
    for _ in range(2):
        hf.run(exporting(run))
        assert [(out / "README.md").read_text(), (out / "runs" / "one.txt").read_text()] == [
            "my notes",
            "mine",
        ]
        assert len(list(out.glob("*.safetensors*"))) == 1
    (out / "chat_template.jinja").write_text("mine")
    hf.run(exporting(run))
    (tmp_path / "data" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        UserError, match=r"it has chat_template\.jinja, which no export wrote and this one would replace"
    ):
        hf.run(exporting(run))
    assert (out / "chat_template.jinja").read_text() == "mine"
    assert not list(run.glob("export.*"))


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for shard in (6e-6, 5.0):
        hf.run(exporting(run, out=".", max_shard_gb=shard))
        Path("note.txt").write_text("mine")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "here").config.vocab_size == 37
        assert Path.cwd() == tmp_path / "here"
    assert len(list(Path.cwd().glob("*.safetensors*"))) == 1
    assert set(os.listdir(tmp_path)) == {"here", "run", "data"}


def test_two_exports_at_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    with destination.replacing(run / "export", field="export.out", keeps="") as partial:
        (partial / "hybridtrain.json").write_text('{"step": 1}')
        with pytest.raises(UserError, match="another export is writing there"):
            hf.run(exporting(run))
    hf.run(exporting(run))
    assert json.loads((run / "export" / "hybridtrain.json").read_text())["step"] == 20


def test_exports_of_a_run_that_removes_its_checkpoints_meanwhile(tmp_path: Path) -> None:
    """A thread saves a checkpoint and removes the one before, again and again, as
    checkpoint.every=1 keep_last=1 does."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    manager = Manager(run / "checkpoints", settings=CheckpointConfig(keep_last=1))
    ended = threading.Event()

    def train() -> None:
        for step in range(21, 10_000):
            if ended.is_set():
                return
            aside = manager.folder / f"step-{step:08d}.partial"
            shutil.copytree(manager.path(step - 1), aside)
            marker.write(
                aside,
                progress=Progress(step, step, {}),
                files={file.name: marker.measure(file) for file in aside.glob("*.distcp")},
            )
            aside.rename(manager.path(step))
            manager.prune()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(12):
            assert hf.run(exporting(run)) == 0
    finally:
        ended.set()
        thread.join()
    assert manager.steps()[-1] > 40


def test_an_export_that_was_killed_over_its_first_file_is_begun_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    (run / "export.partial").mkdir()
    (run / "export.partial" / ".hybridtrain.json.17-140.partial").write_text("{")
    hf.run(exporting(run))
    assert not list(run.glob("export.*"))
