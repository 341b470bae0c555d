"""The texts of train.samples in the page of a run."""

from __future__ import annotations

import json
from pathlib import Path

from hybridtrain.report import history, samples, single
from tests.report.folders import finished


def line(step: int, *texts: tuple[str, str]) -> str:
    values = [{"prompt": prompt, "text": text} for prompt, text in texts]
    return json.dumps({"step": step, "time": 1.7e9, "samples": values}) + "\n"


def test_the_newest_texts_are_first_and_earlier_ones_are_to_open(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    assert 'id="samples"' not in single.document(history.read(folder), [])
    lines = [line(100, ("if x", " == <b>1</b>:\n")), line(50, ("if x", "xx"), ("for", "for"))]
    torn = '{"step": 3}\n[1]\n{"step": 150, "samples": "no"}\n{"step": 200, "sam'
    (folder / "samples.jsonl").write_text("".join(lines) + torn)
    read = history.read(folder)
    assert [sample.step for sample in read.samples] == [50, 100]
    assert read.unread == {"samples.jsonl": 3}  # the last line is still being written
    shown = single.document(read, []).partition('<section id="samples">')[2].partition("</section>")[0]
    newest, _, earlier = shown.partition("<details>")
    assert "After step 100" in newest
    assert "<pre> == &lt;b&gt;1&lt;/b&gt;:\n</pre>" in newest
    assert "step 50" in earlier
    assert "<pre>for</pre>" in earlier


def test_a_page_has_the_newest_hundred() -> None:
    read, bad = samples.of_lines(line(step, ("a", f"text {step}.")) for step in range(1, 131))
    shown = samples.section(read)
    assert bad == 0
    assert "text 31." in shown
    assert "text 30." not in shown
    assert "30 more are in samples.jsonl" in shown
