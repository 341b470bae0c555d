"""`hybridtrain report` where a run directory is damaged, hostile, or of an earlier version, and where its own
folder belongs to somebody else."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hybridtrain import report
from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.report import compare, history, layout_grid, plots, single
from hybridtrain.run.record import write_machine
from tests.report.folders import BEGIN, finished, row, write

WRONG_SUMMARIES = {
    "a text for a number": {
        "total_steps": "many",
        "parameters": "7B",
        "world_size": "two",
        "steps": [1],
        "wall_s": "long",
        "final_loss": "low",
    },
    "machine is a text": {"machine": "a laptop"},
    "machine is a list of texts": {
        "machine": ["a laptop", 3, {"host": "n1", "ranks": "all"}, {"ranks": ["x", 0]}]
    },
    "versions is a list": {"versions": ["torch"]},
    "numbers without bounds": {"total_steps": 1e300, "parameters": 10**400, "world_size": -1, "tokens": True},
    "a layout of nobody": {"layout": "tp0"},
    "a layout too large to draw": {"layout": "tp999999999"},
    "no object": [1, 2],
    "texts are numbers": {"status": 5, "layout": 7, "exit_reason": {"a": 1}, "git_revision": 3},
}


@pytest.mark.parametrize("name", WRONG_SUMMARIES)
def test_a_summary_with_wrong_types_is_drawn_all_the_same(name: str, tmp_path: Path) -> None:
    wrong = WRONG_SUMMARIES[name]
    summary = {"status": "running", "steps": 2, **wrong} if isinstance(wrong, dict) else wrong
    read = history.read(write(tmp_path / "run", [], summary=summary, config=schema.Config()))
    page = single.document(read, report.of_run(read)) + single.lines(read)
    assert ("Left out, because it cannot be read: summary.json" in page) == (name == "no object")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 200_000, b'{"status": "finished"', b""])
def test_a_summary_that_is_no_json_is_left_out_by_name(content: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row(1), row(2)])
    (folder / "summary.json").write_bytes(content)
    assert "cannot be read: summary.json" in single.lines(history.read(folder))


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row(1), row(2)], torn='{"step": 3, "lo')
    bad = ["[" * 100_000, "7", '{"step": "x"}', '{"step": 1e999}', '{"step": ' + "9" * 400 + "}"]
    with (folder / "metrics.jsonl").open("r+") as stream:
        stream.write(
            "".join(line + "\n" for line in bad)
            + json.dumps(row(5, loss=1e300, grad_norm="big"))
            + "\n"
            + json.dumps(row(6))
            + "\n"
            + '{"ste'
        )
    events = [
        {"time": at, "step": 1, "kind": "failed", "detail": "x"}
        for at in (BEGIN, 1e300, float("nan"), -1e9, "now")
    ]
    (folder / "events.jsonl").write_text(
        "".join(
            json.dumps(event) + "\n"
            for event in [*events, {"time": BEGIN, "step": 1e300, "kind": "x", "detail": ""}]
        )
    )
    read = history.read(folder)
    assert read.columns["step"].tolist() == [5, 6]
    assert np.isnan(read.columns["loss"]).tolist() == [True, False]
    assert len(read.events) == 1
    assert dict(read.unread) == {"metrics.jsonl": 5, "events.jsonl": 5}
    assert "5 lines of metrics.jsonl, 5 lines of events.jsonl" in single.document(read, report.of_run(read))


def test_a_file_of_the_run_that_is_a_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", [], summary={"status": "running"})
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "metrics.jsonl" in said
    assert "Traceback" not in said


def test_an_older_summary_still_tells_the_machine(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "run",
        [row(1)],
        summary={"status": "finished", "machine": [{"host": "n1", "cpu": "EPYC", "ranks": [0, 1]}]},
    )
    assert history.read(folder).hosts == [{"host": "n1", "cpu": "EPYC", "ranks": [0, 1]}]
    write_machine(folder, [{"host": "n2", "cpu": "Xeon", "ranks": [0]}])
    assert history.read(folder).hosts[0]["host"] == "n2"


def test_a_clock_that_was_set_back_costs_no_training_time(tmp_path: Path) -> None:
    rows = [row(step, time=BEGIN + 0.2 * step - (3600 if step > 3 else 0)) for step in range(1, 7)]
    read = history.read(
        write(tmp_path / "run", rows, summary={"status": "finished"}, events=[(0.0, 0, "started", "")])
    )
    assert read.wall_s == pytest.approx(1.2)
    assert all(np.diff(read.seconds) > 0)


DOLLARS = "cost_$5_vs_$6"


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    folders = [finished(tmp_path / name) for name in (DOLLARS, "a$b$$")]
    for folder in folders:
        (folder / "config.yaml").unlink()
    assert main(["report", str(folders[0])]) == 0
    read = [history.read(folder) for folder in folders]
    page = compare.document(read, list(plots.of_runs(read, names=compare.names(read))))
    assert page.count(f">{DOLLARS}<") >= 5, "the table, and each plot's end of the curve"


def test_a_name_with_line_breaks_and_halves_of_letters_is_one_line(tmp_path: Path) -> None:
    folder = finished(tmp_path / os.fsdecode(b"two\nlines \xff"))
    (folder / "config.yaml").unlink()
    read = history.read(folder)
    assert read.name == r"two lines \udcff"
    report.write(
        [layout_grid.plot(layout_grid.layout_of(read.summary), hosts=[])],
        single.document(read, []),
        name=read.name,
        out=tmp_path / "out",
    )


@pytest.mark.filterwarnings("error")
def test_many_runs_leave_room_for_their_curves(tmp_path: Path) -> None:
    read = [
        history.read(write(tmp_path / f"run-{number}", [row(1), row(2, loss=number)])) for number in range(60)
    ]
    [loss, *_] = plots.of_runs(read, names=compare.names(read))
    axes = loss.figure.axes[0]
    assert "60 runs" in axes.get_title(loc="left")
    assert len(axes.get_lines()) == 60
    assert not axes.texts
    report.write([loss], compare.document(read, [loss]), name="", out=tmp_path / "out")
    assert axes.get_position().width > 0.5


OTHERS = {
    "index.html": "<p>my page</p>",
    "loss.png": "my picture",
    "eval_loss.png": "mine too",
    "notes.txt": "hands off",
}


def test_a_report_replaces_only_what_a_report_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write(tmp_path / "run", [row(1), row(2)]), tmp_path / "site"
    out.mkdir()
    for name, text in OTHERS.items():
        (out / name).write_text(text)
    assert main(["report", str(folder), f"report.out={out}"]) == 2
    assert "it has index.html, loss.png, which this command did not write" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in out.iterdir()} == OTHERS
    (out / "index.html").unlink()
    (out / "loss.png").unlink()
    assert main(["report", str(folder), f"report.out={out}"]) == 0
    assert main(["report", str(folder), f"report.out={out}"]) == 0, "its own"
    assert (out / "eval_loss.png").read_text() == "mine too"
    assert (out / "notes.txt").read_text() == "hands off"


def test_the_folder_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row(1, loss_scale=65536.0), row(2, loss_scale=32768.0)])
    assert main(["report", str(folder)]) == 0
    (folder / "report" / report.RECORD).unlink()
    write(folder, [row(1), row(2)])
    assert main(["report", str(folder)]) == 0
    assert not (folder / "report/loss_scale.png").exists()
    (folder / "report" / report.RECORD).unlink()
    (folder / "report/index.html").write_text("<p>my page</p>")
    assert main(["report", str(folder)]) == 2


def test_comparisons_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        folder = write(tmp_path / "runs" / name, [row(1), row(2)])
        (folder / "config.yaml").unlink(missing_ok=True)
    made = []
    for names in (["a", "b"], ["a", "c"], ["a", "b"], ["a", "b", "c"]):
        assert main(["report", "--compare", *(f"runs/{name}" for name in names)]) == 0
        made.append(
            next(line for line in capsys.readouterr().out.splitlines() if line.endswith("index.html"))
        )
    assert len(set(made)) == 3
    assert made[0] == made[2]
    assert made[0].startswith("runs/compare/a+b-")
    assert made[3].startswith("runs/compare/a+2-others-")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as writes to a full disk do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_space_is_refused_in_fitting_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", [row(1), row(2)])
    with largest_file(10_000):
        assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "report.out=" in said
    assert "larger than is allowed" in said
    assert main(["report", str(folder), "report.out=/proc/report"]) == 2


def test_a_layout_that_no_run_has_is_not_drawn() -> None:
    begin = time.monotonic()
    assert layout_grid.layout_of({"layout": "tp999999999"}) is None
    assert layout_grid.layout_of({"layout": "tp0-pp2"}) is None
    assert layout_grid.layout_of({"layout": "dp_shard100000-tp8-pp16-zero3"}) is not None
    assert time.monotonic() - begin < 1
    assert "layout" in plots.NAMES
