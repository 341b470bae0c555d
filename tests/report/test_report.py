"""`hybridtrain report` on run directories as training leaves them: finished, still
running, with nulls, empty."""

import json
import math
import time

import numpy as np
import pytest
from matplotlib.image import imread

from hybridtrain import report
from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.errors import UserError
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.report import compare, history, layout_grid, plots, series, single
from tests.report.folders import eventful, finished, row, write


def drawn_in(path, color) -> int:
    """How many pixels of a PNG have `color`."""
    pixels = imread(path)[..., :3]
    wanted = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return int((np.abs(pixels - wanted).max(axis=-1) < 0.02).sum())


def is_drawn(path) -> bool:
    return drawn_in(path, plots.COLORS[0]) > 30


def drawn(folder):
    """The plots of a run by name, and what they are drawn of."""
    read = history.read(folder)
    return {plot.name: plot for plot in report.of_run(read)}, read


def test_a_finished_run(tmp_path, capsys):
    folder = finished(tmp_path / "demo")
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    names = ["loss", "loss_tokens", "loss_time", "grad_norm", "lr", "throughput", "memory", "layout"]
    files = [str(folder / "report" / name) for name in ("index.html", *(f"{name}.png" for name in names))]
    assert out.splitlines()[-len(files) :] == files
    assert sorted(
        str(path) for path in (folder / "report").iterdir() if path.name != report.RECORD
    ) == sorted(files)
    assert all(is_drawn(folder / "report" / f"{name}.png") for name in names if name != "layout")
    assert drawn_in(folder / "report" / "loss.png", plots.COLORS[1]) > 30  # evaluations
    lines = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert lines["status"].startswith("finished (train.steps")
    assert lines["layout"] == "pp2-dp_shard2 4 processes"
    assert lines["step"] == "200 of 200"
    assert lines["tokens"] == "819k"
    assert lines["loss"] == f"{3 + 5 * math.exp(-5):.4f} from {3 + 5 * math.exp(-0.05):.4f}"
    assert lines["tokens/s"] == "20.0k median"
    assert lines["held-out loss"] == "4.2500 lowest 4.2500"


def test_the_page_tells_everything_and_escapes_it(tmp_path):
    folder = eventful(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report" / "index.html").read_text()
    for told in (
        "eventful &lt;b&gt;",
        "&lt;i&gt;disk&lt;/i&gt;",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "EPYC &amp; co",
        "4 x H200, 139.8 GiB each",
        "node0, node1",
    ):
        assert told in page, told
    for told in (
        "step-00000100",
        "reached the end",
        "40.0%",
        "7.00M parameters",
        "tracker.project",
        "git revision",
        "1 resume",
        "pp2-dp_shard2-tp2-zero1",
    ):
        assert told in page, told
    assert "<i>disk" not in page
    assert page.count("<script>") == 1, "the page's own"
    assert page.count("<svg") == 11
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/", ""), (
        "nothing to load from anywhere"
    )
    assert not [path for path in (folder / "report").iterdir() if path.suffix == ".partial"]


def test_findings_have_a_section_of_their_own(tmp_path):
    """However many events came after them."""
    events = [
        (1.0, 5, "nonfinite", "the loss is not finite in step 5: <m>"),
        (2.0, 3, "rollback", "to step 3"),
    ]
    events += [(float(at), at, "checkpoint", "step") for at in range(10, 60)]
    page = {}
    for name, given in (("with", events), ("without", events[2:])):
        run = history.read(write(tmp_path / name, [row(1)], summary={"status": "finished"}, events=given))
        page[name] = single.document(run, report.of_run(run))
    section = page["with"].partition('id="non-finite"')[2].partition("</section>")[0]
    assert section.index("to step 3") < section.index("in step 5: &lt;m&gt;")
    assert "checkpoint" not in section
    assert 'id="non-finite"' not in page["without"]


def test_time_spent_leaves_out_the_pause_before_a_resume(tmp_path):
    read = history.read(eventful(tmp_path))
    assert read.wall_s == pytest.approx(40.0)
    assert read.seconds[[0, 99, 100, 199]] == pytest.approx([0.2, 20.0, 20.2, 40.0])


def test_marks_stand_where_things_happened(tmp_path):
    made, _ = drawn(eventful(tmp_path))
    axes = made["loss"].figure.axes[0]
    marks = {
        line.get_label(): line.get_xdata().tolist()
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }
    assert marks == {"1 checkpoint": [100.0], "resumed": [100.0], "skipped": [30.0], "failed": [105.0]}
    assert made["grad_norm"].figure.axes[0].get_yscale() == "log"


def test_a_run_that_goes_on(tmp_path):
    summary = {
        "status": "running",
        "wall_s": None,
        "tokens_per_s": None,
        "layout": None,
        "world_size": None,
        "total_steps": 10,
    }
    now = time.time()
    folder = write(
        tmp_path, [row(1, time=now - 0.2), row(2, time=now)], summary=summary, torn='{"step": 3, "lo'
    )
    read = history.read(folder)
    assert read.columns["step"].tolist() == [1, 2]
    assert read.eta_s == pytest.approx(8 * 0.2)
    assert "step 2 of 10, about 2s to go" in single.about(read)
    assert "layout" not in single.lines(read)
    assert report.write(
        report.of_run(read), single.document(read, report.of_run(read)), name=read.name, out=tmp_path / "out"
    )[1].is_file()
    assert is_drawn(tmp_path / "out" / "loss.png")
    silent = history.read(
        write(tmp_path, [row(1, time=now - 7000), row(2, time=now - 6990)], summary=summary)
    )
    assert "nothing logged for 1h5" in single.about(silent)


@pytest.mark.parametrize("files", [["summary.json"], ["config.yaml"], ["metrics.jsonl", "summary.json"]])
def test_a_run_that_ended_before_its_first_step(tmp_path, files):
    folder = write(
        tmp_path / "run",
        [],
        summary={"status": "failed", "exit_reason": "UserError: data.path=x"},
        config=schema.Config(),
        torn='{"st',
    )
    for path in list(folder.iterdir()):
        if path.name not in files:
            path.unlink()
    assert main(["report", str(folder)]) == 0
    page = (folder / "report" / "index.html").read_text()
    assert "No step was logged yet" in page
    assert ("UserError: data.path=x" in page) == ("summary.json" in files)
    assert not list((folder / "report").glob("*.png"))


def test_a_config_of_another_version_is_shown_as_it_stands(tmp_path):
    folder = finished(tmp_path / "demo")
    (folder / "config.yaml").write_text("warp:\n  speed: <9>\n")
    assert main(["report", str(folder)]) == 0
    assert "speed: &lt;9&gt;" in (folder / "report" / "index.html").read_text()


def test_a_secret_from_the_environment_is_not_on_the_page(tmp_path, monkeypatch):
    folder = finished(tmp_path / "demo")
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("project: hybridtrain", "project: ${oc.env:MY_TOKEN}"))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report" / "index.html").read_text()
    assert "hunter2" not in page
    assert "${oc.env:MY_TOKEN}" in page


def test_nulls_leave_gaps(tmp_path):
    rows = [row(step, **({"loss": None, "grad_norm": None} if step == 3 else {})) for step in range(1, 6)]
    made, read = drawn(write(tmp_path, rows))
    assert np.isnan(read.columns["loss"]).tolist() == [False, False, True, False, False]
    assert np.isnan(made["loss"].figure.axes[0].get_lines()[0].get_ydata()).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert "status        unknown" in single.lines(read)


def test_without_a_single_finite_loss(tmp_path):
    made, _ = drawn(write(tmp_path, [row(step, loss=None, grad_norm=None) for step in (1, 2)]))
    assert list(made) == ["lr", "throughput", "memory"]


def test_loss_scale_is_drawn_when_it_varies_and_removed_when_not(tmp_path):
    assert (
        main(["report", str(write(tmp_path, [row(1, loss_scale=65536.0), row(2, loss_scale=32768.0)]))]) == 0
    )
    assert is_drawn(tmp_path / "report" / "loss_scale.png")
    assert main(["report", str(write(tmp_path, [row(1), row(2)]))]) == 0
    assert not (tmp_path / "report" / "loss_scale.png").exists()


@pytest.mark.slow
def test_a_million_steps_are_read_and_thinned_with_their_spikes(tmp_path):
    count, spike = 1_000_000, 654_321
    line = (
        json.dumps(row(0, loss=5.0)).replace('"step": 0', '"step": %d').replace('"loss": 5.0', '"loss": %s')
    )
    with (tmp_path / "metrics.jsonl").open("w") as stream:
        stream.writelines(
            line % (step, 900.5 if step == spike else 5.0) + "\n" for step in range(1, count + 1)
        )
    begin = time.monotonic()
    made, read = drawn(tmp_path)
    page = single.document(read, list(made.values()))
    assert len(read) == count
    raw = made["loss"].figure.axes[0].get_lines()[0]
    assert len(raw.get_xdata()) <= 2 * series.BUCKETS + 2
    assert (spike, 900.5) in zip(raw.get_xdata().tolist(), raw.get_ydata().tolist(), strict=True)
    assert len(page) < 3_000_000
    assert time.monotonic() - begin < 60


def test_thinning_keeps_extremes_ends_and_gaps():
    x, y = np.arange(10_000.0), np.sin(np.arange(10_000.0))
    y[5000], y[5001], y[7000:8000] = 9.0, -9.0, np.nan
    thin_x, thin_y = series.thin(x, y, buckets=50)
    assert len(thin_x) <= 102
    assert (np.nanmax(thin_y), np.nanmin(thin_y)) == (9.0, -9.0)
    assert (thin_x[0], thin_x[-1]) == (0.0, 9999.0)
    assert np.isnan(thin_y).sum() >= 4
    assert all(np.diff(thin_x) > 0)
    short = series.thin(x[:100], y[:100], buckets=50)
    assert short[0].tolist() == x[:100].tolist()


def test_out_is_another_folder(tmp_path):
    folder = finished(tmp_path / "demo")
    assert main(["report", str(folder), f"report.out={tmp_path / 'pictures'}"]) == 0
    assert (tmp_path / "pictures" / "loss.png").is_file()
    assert not (folder / "report").exists()


def test_several_runs(tmp_path, capsys):
    one, two = finished(tmp_path / "a" / "demo"), eventful(tmp_path / "b" / "demo")
    assert main(["report", "--compare", str(one), f"report.out={tmp_path / 'out'}", str(two)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "memory.png")
    rows = compare.differences([history.read(one), history.read(two)])
    assert rows["layout"] == ["pp2-dp_shard2", "pp2-dp_shard2-tp2-zero1"]
    assert rows["tracker.project"] == ["hybridtrain", "<script>alert(1)</script>"]
    assert "train.steps" not in rows
    assert not {"run.name", "run.dir"} & set(rows)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<script>") == 1
    for path in ("loss", "loss_tokens", "loss_time", "throughput", "grad_norm"):
        assert drawn_in(tmp_path / "out" / f"{path}.png", plots.COLORS[0]) > 30
        assert drawn_in(tmp_path / "out" / f"{path}.png", plots.COLORS[1]) > 30
    results = compare.results([history.read(one), history.read(two)])
    assert results["lowest held-out loss"] == ["4.2500", "4.0500"]
    assert results["tokens"] == ["819k", "819k"]


def test_names_of_compared_runs_are_their_own(tmp_path):
    folders = [write(tmp_path / parent / name, [row(1)]) for parent, name in (("x", "run"), ("y", "run"))]
    assert compare.names([history.read(folder) for folder in folders]) == ["x/run", "y/run"]
    assert compare.names([history.read(finished(tmp_path / "f")), history.read(folders[0])]) == [
        "demo",
        "run",
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--compare"], "no runs to compare"),
        (["--compare", "a"], "one run alone"),
        (["a", "b"], "hybridtrain report --compare a b"),
        (["--compare", "a", "b"], "there is no such folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *argv]) == 2
    assert said in capsys.readouterr().err


def test_running_mean_keeps_a_straight_line_and_flattens_noise():
    line = np.arange(200.0)
    assert series.smooth(line)[:-5] == pytest.approx(line[:-5])
    noise = np.tile([-1.0, 1.0], 300)
    assert np.abs(series.smooth(noise)[20:]).max() < 0.1


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00175, "1.75e-3"), (2e-3, "2e-3"), (5e-11, "5e-11")]
)
def test_scientific(value, text):
    assert plots.scientific(value) == text


@pytest.mark.parametrize(
    "layout", [(1, 1, 1, 1, 1), (1, 2, 1, 2, 2), (2, 4, 1, 4, 2), (4, 8, 1, 8, 4), (1, 1000, 1, 1, 1)]
)
def test_every_rank_has_one_cell_that_tells_its_place(layout):
    given = ParallelLayout(**dict(zip(("dp_replicate", "dp_shard", "cp", "tp", "pp"), layout, strict=True)))
    figure = layout_grid.plot(given, hosts=[]).figure
    cells = {patch.get_gid(): patch for patch in figure.axes[0].patches if patch.get_gid()}
    tips = {int(gid.split(":")[1]): gid for gid in cells}
    assert sorted(tips) == list(range(given.world_size))
    places = {(round(patch.get_x(), 3), round(patch.get_y(), 3)) for patch in cells.values()}
    assert len(places) == given.world_size, "no cell lies on another"
    for rank, tip in tips.items():
        for axis, at in given.coordinates(rank).items():
            assert (f"{axis} {at}" in tip) == (dict(given.axes())[axis] > 1), tip
    width, height = figure.get_size_inches()
    assert 1.5 < height < 8.1
    assert width == pytest.approx(5.8)


def test_a_layout_too_large_to_draw_shows_its_first_data_ranks():
    layout = ParallelLayout(dp_replicate=8, dp_shard=32, cp=1, tp=8, pp=4)
    axes = layout_grid.plot(layout, hosts=[]).figure.axes[0]
    assert sum(bool(patch.get_gid()) for patch in axes.patches) == 1024
    assert any("data ranks 32 to 255, not drawn" in text.get_text() for text in axes.texts)


def test_what_is_missing_is_said(tmp_path, capsys):
    finished(tmp_path / "demo")
    with pytest.raises(UserError, match="there is no such folder") as error:
        history.read(tmp_path / "dem")
    assert f"hybridtrain report {tmp_path / 'demo'}" in str(error.value)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"there is no config.yaml, summary.json or metrics.jsonl in it"):
        history.read(tmp_path / "bare")
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path / "demo"), f"report.out={tmp_path / 'file'}"]) == 2
    assert "report.out" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "dem")]) == 2
    assert "Traceback" not in capsys.readouterr().err
