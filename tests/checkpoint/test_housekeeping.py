"""What stands in the way of clearing up ends no run: files that cannot be removed, links, names that are not
ours, a full disk, a closed console."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridtrain.checkpoint import marker
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.compose import to_yaml
from hybridtrain.config.schema import CheckpointConfig, Config
from hybridtrain.errors import UserError
from hybridtrain.run import start
from hybridtrain.runtime import log
from hybridtrain.types import Progress
from hybridtrain.verify import verify_run
from tests.runs import arguments, checkpoints, finished, immutable, on_ranks, rows


def made(folder: Path, *steps: int) -> Manager:
    manager = Manager(folder, settings=CheckpointConfig(keep_last=1))
    for step in steps:
        path = manager.path(step)
        path.mkdir(parents=True)
        (path / marker.METADATA).write_bytes(b"")
        marker.write(path, progress=Progress(step, 0, {}), files={})
    return manager


def test_a_run_goes_on_past_checkpoints_that_cannot_be_removed(data: Path, tmp_path: Path) -> None:
    """An immutable file, a checkpoint moved to another disk, and a file in the place of a folder
    that will be written."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    finished(1, arguments(run, data, train__steps=2, checkpoint__every=1, checkpoint__keep_last=0))
    folder = run / "checkpoints"
    (folder / "step-00000001").rename(elsewhere)
    (folder / "step-00000001").symlink_to(elsewhere)
    (folder / "step-00000003.partial").write_text("the user's")
    (folder / "step-00000009.partial").mkdir()
    with immutable(folder / "step-00000002" / ".metadata"):
        argv = arguments(run, data, train__steps=4, checkpoint__every=1, checkpoint__keep_last=1)
        said = finished(1, argv).out
        assert "step-00000003.partial is not a folder, so hybridtrain did not write it: it stays" in said
        assert "step-00000002.removed cannot be removed and stays (Operation not permitted)" in said
        assert len(rows(run)) == 4
        assert checkpoints(run) == ["step-00000002.removed", "step-00000003.partial", "step-00000004"]
        assert (folder / "step-00000003.partial").read_text() == "the user's"
        assert (elsewhere / marker.MARKER).is_file(), "the link goes, not what it points to"
        said = finished(1, [*argv, "train.steps=5"]).out
        assert said.count("step-00000002.removed cannot be removed and stays") == 1
    finished(1, [*argv, "train.steps=6"])
    assert checkpoints(run) == ["step-00000003.partial", "step-00000006"]


def test_a_checkpoint_that_cannot_be_renamed_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = made(tmp_path, 1, 2)
    with immutable(manager.path(1)), caplog.at_level("WARNING", logger="hybridtrain"):
        manager.prune()
        manager.prune()
        assert manager.steps() == [1, 2]
        assert caplog.text.count("step-00000001 cannot be removed and stays") == 1
    manager.prune()
    assert manager.steps() == [2]


def test_a_checkpoint_under_the_name_of_another_step_is_not_the_newest(tmp_path: Path) -> None:
    manager = made(tmp_path, 8)
    manager.path(8).rename(manager.path(99))
    with pytest.raises(
        UserError,
        match=r"step-00000099: it holds step 8: it was renamed\n.*\n.*mv .*step-00000099 .*/step-00000008",
    ):
        manager.latest()
    manager.path(99).rename(manager.path(8))
    assert manager.latest() == manager.path(8)


@contextlib.contextmanager
def small_disk(folder: Path, *, kib: int) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(file: Path) -> None:
    """With what is left of the disk."""
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"0" * 4096):
            pass


def test_a_half_checkpoint_that_fills_the_disk_is_cleared_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk:
        config = Config()
        config.run.dir, config.run.name, config.train.steps, config.data.path = (
            str(disk / "run"),
            "x",
            5,
            "data",
        )

        def begun() -> None:
            entry = start.lock_run(config)
            try:
                Manager(entry.path / "checkpoints", settings=config.checkpoint).sweep()
                start.begin(entry, config, yaml_text=to_yaml(config), versions={}, checkpoint=None, step=0)
            finally:
                entry.leave()

        begun()
        partial = disk / "run" / "checkpoints" / "step-00000004.partial"
        partial.mkdir(parents=True)
        fill(partial / "__0_0.distcp")
        begun()
        assert not partial.exists()
        fill(disk / "full")
        with pytest.raises(UserError, match=r"run\.dir=.*: it cannot be written: the disk is full"):
            begun()


def test_a_refusal_after_the_directory_was_opened_leaves_none(data: Path, tmp_path: Path) -> None:
    import numpy as np

    spoilt = Path(shutil.copytree(data, tmp_path / "data"))
    tokens = np.fromfile(spoilt / "train.bin", dtype="<u2")
    tokens[::50] = 60000
    tokens.tofile(spoilt / "train.bin")
    corpus = json.loads((spoilt / "corpus.json").read_text())
    # as earlier versions wrote it
    (spoilt / "corpus.json").write_text(
        json.dumps({key: value for key, value in corpus.items() if key != "digests"})
    )
    before = sorted(tmp_path.iterdir())
    ended = on_ranks(2, arguments(tmp_path / "new" / "run", spoilt))
    assert ended.code == 2
    assert sorted(tmp_path.iterdir()) == before


def test_a_directory_that_is_gone_while_training_is_told_so(tmp_path: Path) -> None:
    config = Config()
    config.run.dir = str(tmp_path / "run")
    entry = start.lock_run(config)
    run = start.begin(entry, config, yaml_text=to_yaml(config), versions={}, checkpoint=None, step=0)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="it has been moved or removed"):
        run.append_metrics({"step": 1})
    run.close()
    assert (tmp_path / "moved" / "lock").exists(), "what is not at its place is not ours to remove"


def test_a_console_and_a_log_that_cannot_be_written_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank-0.log").symlink_to("/dev/full")
    monkeypatch.setenv("RANK", "0")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        log.setup(tmp_path)
        for _ in range(3):
            log.get("test").info("a line")
        with contextlib.suppress(OSError):
            closed.flush()
        log.get("test").info("%d", "no number")  # our own mistake is still shown
        for name in (log.ROOT, *log.CHATTY):
            for handler in logging.getLogger(name).handlers[:]:
                logging.getLogger(name).removeHandler(handler)
        with contextlib.suppress(OSError):
            closed.close()
    said = capfd.readouterr().err
    assert said.count("--- Logging error ---") == 2, said
    assert "no number" in said
    assert "Broken pipe" not in said
    assert "No space left" not in said


def test_a_folder_of_logs_that_cannot_be_made_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*cannot be written"):
        log.setup(tmp_path / "logs")


def test_whoever_reads_the_first_line_of_a_log_ends_it_quietly(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").write_text("a line\n" * 100_000)
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    shell = (
        f"{sys.executable} -m hybridtrain.cli logs {tmp_path} logs.lines=100000 "
        f"| head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout == "a line\n0\n"
    assert done.stderr == ""


def test_verify_lists_what_is_wrong_with_a_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished(1, arguments(run, data, train__steps=3, checkpoint__every=1, checkpoint__keep_last=0))
    assert verify_run(run) == ([], 3)
    folder = run / "checkpoints"
    damaged = next((folder / "step-00000002").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (folder / "step-00000003").rename(folder / "step-00000007")
    (folder / "step-00000009").mkdir()
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write((run / "metrics.jsonl").read_text().splitlines()[1] + '\n{"st')
    model = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(
        json.dumps({**model, "num_hidden_layers": model["num_hidden_layers"] - 1, "layer_types": None})
    )
    problems, number = verify_run(run)
    assert number == 3
    assert len(problems) == 6, problems
    changed = "it has changed since step-00000007 was written (num_hidden_layers was"
    for words in (
        "damaged: " + damaged.name,
        "it holds step 3",
        "has step 2 after step 3",
        "line 5 is damaged",
        changed,
        "step-00000009: its complete.json is missing",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)


def test_a_finished_run_that_is_started_again_loses_what_could_not_be_removed_before(
    data: Path, tmp_path: Path
) -> None:
    argv = arguments(tmp_path / "run", data, train__steps=1)
    finished(1, argv)
    left = tmp_path / "run" / "checkpoints" / "step-00000000.removed"
    left.mkdir()
    (left / "complete.json").write_text("{}")
    assert "nothing is left to do" in finished(1, argv).out
    assert sorted(path.name for path in left.parent.iterdir()) == ["step-00000001"]
