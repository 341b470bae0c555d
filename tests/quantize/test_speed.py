"""What is timed, in which order, and what memory is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.models.build import logits
from hybridtrain.quantize import speed, table
from hybridtrain.quantize.speed import Pass, Timing
from hybridtrain.runtime import energy
from tests.quantize.folders import plain, rows, write
from tests.runtime.test_energy import zone


def test_the_passes_of_a_model_that_writes_text(tmp_path: Path) -> None:
    """Prefill and decoding feed the row once, and the last token sees all before it."""
    model, row = plain(write(tmp_path, "llama"), torch.float32), rows(4)[0].rows(0, 1)
    seen: list[torch.Tensor] = []
    given: list[torch.Tensor] = []

    def note(_module: object, _args: object, options: dict[str, torch.Tensor], result: Any) -> None:
        given.append(options["input_ids"])
        seen.append(result.logits)

    model.register_forward_hook(note, with_kwargs=True)
    passes = speed.passes(model, row, decoded=5)
    assert {name: each.tokens for name, each in passes.items()} == {"prefill": 27, "decode": 5}
    given.clear()
    seen.clear()
    with torch.inference_mode():
        passes["decode"].run(passes["decode"].prepare())
        whole = logits(model, row.input_ids_BT, position_ids_BT=row.position_ids_BT)
    assert [ids.shape[1] for ids in given[:-1]] == [27, 1, 1, 1, 1, 1]
    assert torch.equal(torch.cat(given[:-1], 1), row.input_ids_BT)
    torch.testing.assert_close(seen[5][:, -1], whole[:, -1], atol=1e-5, rtol=1e-5)


def test_an_encoder_takes_whole_rows(tmp_path: Path) -> None:
    model = plain(write(tmp_path, "bert"), torch.float32)
    assert {name: each.tokens for name, each in speed.passes(model, rows(4)[0], decoded=5).items()} == {
        "forward": 32
    }


def test_two_models_are_timed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round in the opposite order of the one before; what a pass prepares is not timed; the energy that
    a pass takes is counted, in joules for a token."""
    monkeypatch.setattr(speed, "_LEAST_S", 1e-9)  # once a round
    count, order = zone(tmp_path / "intel-rapl:0", "package-0", 0), []

    def spend(name: str, microjoules: int) -> None:
        order.append(name)
        count.write_text(str((int(count.read_text()) + microjoules) % 1_000_000))

    passes = [
        {"prefill": Pass(4, lambda: spend("-", 500_000), lambda _, each=each: spend(each, 200_000))}
        for each in "ab"
    ]
    a, b = speed.in_turn(passes, counter=energy.counter(tmp_path, gpus=[]))
    timed = "".join(order).replace("-", "")
    assert timed == "aabb" + "abba" * (speed.ROUNDS // 2) + "ab"  # two of each to warm up
    assert [len(each["prefill"]) for each in (a, b)] == [speed.ROUNDS] * 2
    joules = [timing.joules for timing in a["prefill"]]
    assert joules == pytest.approx([0.05] * speed.ROUNDS)


def test_figures_are_medians_of_ratios_of_the_same_round() -> None:
    """A machine that gets four times as slow in the middle changes no ratio."""
    own = {"prefill": [Timing(seconds, 2.0) for seconds in (0.01, 0.01, 0.04)]}
    base = {"prefill": [Timing(seconds, None) for seconds in (0.02, 0.03, 0.08)]}
    found = speed.figures(own, base)["prefill"]
    assert found["tokens_per_s"] == pytest.approx(100)
    assert (found["tokens_per_s_least"], found["tokens_per_s_most"]) == pytest.approx((25, 100))
    assert (found["ratio"], found["ratio_least"], found["ratio_most"]) == pytest.approx((2, 2, 3))
    assert found["joules_per_token"] == 2.0
    assert "ratio" not in speed.figures(base, None)["prefill"]
    row = {"name": "own", "resident_bytes": 3 * 10**6, "product": "bf16 product", "speed": {"prefill": found}}
    [head, line] = table.costs([row])
    assert "J/token" in head
    assert "2.00 (2.00 to 3.00)" in line


def test_memory_is_counted_once_and_at_its_peak(tmp_path: Path) -> None:
    model = plain(write(tmp_path, "qwen3"), torch.float32)  # tied
    own = sum(parameter.numel() * 4 for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert speed.resident_bytes(model) == own + buffers
    x = torch.zeros(1_000_000)

    def work(_: None) -> None:
        y = x + 1  # 4 MB
        z = y * 2  # and 4 more
        del y
        z.add_(1)
        x + z

    assert speed.peak_bytes(Pass(1, lambda: None, work)) == pytest.approx(8e6, rel=1e-3)
