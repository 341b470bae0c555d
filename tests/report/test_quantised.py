"""The page of `hybridtrain compare`, and its table in the page of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybridtrain import report
from hybridtrain.errors import UserError
from hybridtrain.report import history, quantised, single
from tests.report.folders import finished
from tests.runs import four_parts


def row(name: str, size: float, kl: float, change: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "bytes": size * 1e6,
        "bits": None,
        "perplexity": 20.0,
        "loss_change": {"mean": change, "error": 0.001},
        "kl": {"mean": kl, "error": None},
        "same_top1": 0.97,
        "logit_snr_db": None,
        "output_errors": {},
        **more,
    }


def result() -> dict[str, Any]:
    figure = {"tokens_per_s": 90.0, "ratio": 0.9, "ratio_least": 0.7, "ratio_most": 0.95}
    errors = {f"model.layers.{n}.mlp.up_proj": 10.0**-n for n in range(4)}
    return {
        "reference": {"name": "runs/<b>a</b>", "bytes": 2e6, "perplexity": 19.5, "tokens": 512},
        "data": "corpus",
        "rows": 16,
        "seq_len": 32,
        "candidates": [
            row("bfloat16", 1.0, 1e-5, -1e-4, speed={"prefill": figure, "decode": figure}),
            row("int8", 0.5, 2e-5, 3e-4, output_errors=errors),
            row("int4-g32", 0.3, 5e-3, 6e-3, output_errors=errors),
            row("worse", 0.4, 6e-3, 7e-3),
        ],
    }


def test_the_front_holds_what_no_other_beats() -> None:
    assert quantised.pareto([(1, 5), (2, 4), (2, 5), (3, 1), (1, 5)]) == {0, 1, 3, 4}
    drawn = {plot.name: plot for plot in quantised.tradeoffs(result()["candidates"])}
    assert drawn["kl"].title == "Divergence by size: 4 models, 3 on the front"
    axes = drawn["change"].figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    below = [line for line in axes.lines if line.get_marker() == "v"]  # a change below 0 has no logarithm
    assert [str(line.get_gid()) for line in below] == ["tip:0:bfloat16: -0.01"]


def test_the_page_holds_table_and_plots(tmp_path: Path) -> None:
    file = tmp_path / "compare.html"
    quantised.check(file)
    costs = (("", "loaded MB", "product"), [("bfloat16", "1.00", "bf16 product")])
    quantised.write(result(), file, costs=costs, scores=(("", "task", "metric", "value"), []))
    page = file.read_text()
    assert all(f'<figure id="{name}">' in page for name in ("kl", "change", "errors", "speed"))
    assert "model.layers.3.mlp.up_proj: int8 1.0e-03, int4-g32 1.0e-03" in page
    assert "runs/&lt;b&gt;a&lt;/b&gt;" in page
    assert '<td class="n">+0.030 ± 0.100</td>' in page
    assert 'id="benchmarks"' not in page
    quantised.check(file)  # its own
    file.write_text("mine")
    with pytest.raises(UserError) as caught:
        quantised.check(file)
    assert "it is no page of hybridtrain" in four_parts(str(caught.value), "compare.out")


def test_the_table_is_in_the_page_of_the_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert 'id="compared"' not in single.document(history.read(run), [])
    (run / "compare.json").write_text(json.dumps(result()))
    read = history.read(run)
    assert single.document(read, report.of_run(read)).count(">int4-g32</th>") == 1
    (run / "compare.json").write_text('{"reference": {')
    read = history.read(run)
    assert dict(read.unread) == {"compare.json": 1}
    assert "cannot be read: compare.json" in single.document(read, [])
