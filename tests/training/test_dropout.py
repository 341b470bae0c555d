"""Runs with dropout, from the command line."""

from __future__ import annotations

from pathlib import Path

from tests.runs import Ended, arguments, assert_equal_state, finished, rows


def run(folder: Path, data: Path, *, steps: int) -> Ended:
    rate = {"model__config__attention_dropout": 0.1, "model__attention": "eager"}
    return finished(1, arguments(folder, data, **rate, train__steps=steps, train__eval_every=2))


def test_a_run_says_where_it_acts_and_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = run(whole, data, steps=4)
    assert "dropout   0.1 in self_attn" in said.out + said.err
    for steps in (2, 4):
        run(parts, data, steps=steps)
    assert rows(parts) == rows(whole)
    assert_equal_state(parts / "checkpoints/step-00000004", whole / "checkpoints/step-00000004")
