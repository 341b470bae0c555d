"""The page in a real browser: it renders, the plots are there, the read-out reads the right numbers, and
nothing leaves the machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hybridtrain.cli.main import main
from tests import browser
from tests.report.folders import eventful, finished

SIZES = (
    "[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility())"
    ".map(s => [s.closest('figure').id, s.clientWidth, s.clientHeight])"
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of one run with everything in it, and of two runs compared."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [eventful(folder / "eventful"), finished(folder / "demo")]
    assert main(["report", str(runs[0])]) == 0
    assert main(["report", "--compare", *map(str, runs), f"report.out={folder / 'compare'}"]) == 0
    return {"one": runs[0] / "report" / "index.html", "several": folder / "compare" / "index.html"}


def paper_of(path: Path) -> float:
    """How bright a screenshot is in the middle of all: 0 black, 1 white."""
    return float(np.median(imread(path)[..., :3]))


def test_the_page_of_a_run(pages: dict[str, Path], tmp_path: Path) -> None:
    with browser.listener() as (proxy, heard), browser.browser(tmp_path / "profile", proxy=proxy) as tab:
        bright = {}
        for width, dark in ((1360, False), (1360, True), (390, False)):
            tab.look(width=width, dark=dark)
            tab.open(pages["one"])
            sizes = {name: (w, h) for name, w, h in tab.evaluate(SIZES)}
            assert set(sizes) == {
                "loss",
                "grad_norm",
                "lr",
                "throughput",
                "mfu",
                "memory",
                "loss_scale",
                "skipped",
                "layout",
            }
            assert all(w > 300 and h > 80 for w, h in sizes.values()), sizes
            assert tab.evaluate(OVERFLOW) == 0, f"wider than {width} pixels"
            assert tab.evaluate("document.title") == "eventful <b> · finished"
            assert tab.evaluate("document.querySelectorAll('h1 b').length") == 0, (
                "a run's name is text, not markup"
            )
            assert tab.requests() == [pages["one"].resolve().as_uri()]
            assert tab.complaints() == []
            bright[width, dark] = paper_of(tab.screenshot(tmp_path / f"{width}-{dark}.png"))
        assert bright[1360, False] > 0.9
        assert bright[1360, True] < 0.2
        assert not any(heard), "a connection that asked for nothing is the browser's own"


def test_tabs_and_read_out(pages: dict[str, Path], tmp_path: Path) -> None:
    with browser.listener() as (proxy, _), browser.browser(tmp_path / "profile", proxy=proxy) as tab:
        tab.look(width=1360, dark=False)
        tab.open(pages["one"])
        shown = "[...document.querySelectorAll('#loss svg')].map(s => s.checkVisibility())"
        assert tab.evaluate(shown) == [True, False, False]
        tab.evaluate("document.querySelector('label[for=loss-tokens]').click()")
        assert tab.evaluate(shown) == [False, True, False]
        # The learning rate of this run is 1e-5 times the step: under the middle of the axis, which ends at
        # 1.01 x 200, stands step 101 or 102.
        x, y = tab.evaluate(
            "(() => { const s = document.querySelector('#lr svg'); s.scrollIntoView({block: 'center'}); "
            "const {box} = JSON.parse(s.dataset.scales);"
            " const p = new DOMPoint((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)"
            ".matrixTransform(s.getScreenCTM()); return [p.x, p.y]; })()"
        )
        assert tab.evaluate("document.getElementById('tip').hidden")
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        lines = tab.evaluate("[...document.getElementById('tip').children].map(line => line.textContent)")
        step = int(lines[0].removeprefix("step "))
        assert 100 <= step <= 102
        assert float(lines[1].removeprefix("learning rate ")) == pytest.approx(1e-5 * step, rel=0.01)
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        assert tab.evaluate("document.getElementById('tip').hidden")
        assert tab.complaints() == []


def test_without_scripts_and_with_several_runs(pages: dict[str, Path], tmp_path: Path) -> None:
    with browser.listener() as (proxy, heard), browser.browser(tmp_path / "profile", proxy=proxy) as tab:
        tab.look(width=1360, dark=False)
        tab.send("Emulation.setScriptExecutionDisabled", value=True)
        tab.open(pages["several"])
        sizes = {name: (w, h) for name, w, h in tab.evaluate(SIZES)}
        assert {"loss", "eval_loss", "grad_norm", "throughput"} <= set(sizes)
        assert all(w > 400 and h > 200 for w, h in sizes.values())
        assert tab.evaluate(OVERFLOW) == 0
        assert tab.requests() == [pages["several"].resolve().as_uri()]
        assert tab.complaints() == []
        assert not any(heard), "a connection that asked for nothing is the browser's own"


def test_a_page_that_asks_for_more_would_be_caught(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><title>x</title><script src='http://198.51.100.1/x.js'></script><script>console.error('y')</script>"
    )
    with browser.listener() as (proxy, heard), browser.browser(tmp_path / "profile", proxy=proxy) as tab:
        tab.open(page)
        assert tab.requests() == [page.as_uri(), "http://198.51.100.1/x.js"]
        assert any(first.startswith(b"GET http://198.51.100.1/x.js") for first in heard)
        assert len(tab.complaints()) >= 2
