"""What quantize.plan=auto promises holds on rows that it has not seen: the sets of rows, the search for the
most steps, and plans of a trained model (slow)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridtrain.errors import UserError
from hybridtrain.quantize import search, sets
from hybridtrain.quantize.measure import Measured
from hybridtrain.types import IGNORE_INDEX, Batch
from tests.runs import four_parts

ROOT = Path(__file__).parents[2]


def micro_batches(rows: int) -> list[Batch]:
    """Of four rows; row n is all n. The last two of all have no labels, as those that fill a batch up."""
    ids = torch.arange(rows)[:, None].expand(rows, 3).clone()
    labels = ids.clone()
    labels[-2:] = IGNORE_INDEX
    whole = Batch(ids, labels, torch.arange(3).expand(rows, 3))
    return [whole.rows(at, at + 4) for at in range(0, rows, 4)]


def rows_of(batches) -> list[int]:
    return torch.cat([batch.input_ids_BT[:, 0] for batch in batches]).tolist()


def test_a_seed_draws_three_sets_that_share_no_row() -> None:
    found = {seed: sets.drawn(micro_batches(44), rows=0, seed=seed) for seed in (0, 1)}
    for each in found.values():
        parts = [rows_of(part) for part in (each.search, each.verify, each.report)]
        assert [len(part) for part in parts] == [8, 17, 17]
        assert sorted(row for part in parts for row in part) == list(range(42))
        assert all(len(batch.labels_BT) <= 4 for batch in each.verify)
        assert all(torch.equal(batch.labels_BT, batch.input_ids_BT) for batch in each.report)
    assert all(
        set(rows_of(getattr(found[0], name))) != set(rows_of(getattr(found[1], name)))
        for name in ("search", "verify", "report")
    )
    assert "42 held-out rows, in the order of run.seed=1: 8 to search on, 17 to verify" in found[1].words
    fewer = sets.drawn(micro_batches(44), rows=30, seed=0)
    assert rows_of(fewer.search) == rows_of(found[0].search)
    with pytest.raises(UserError) as caught:
        sets.drawn(micro_batches(44), rows=15, seed=0)
    assert "too few to search a plan on" in four_parts(str(caught.value), "quantize.eval_rows")


def measured(change: float, spread: float) -> Measured:
    """32 rows of 10 tokens, whose losses change by this on average."""
    rows = np.zeros((32, 7))
    rows[:, 0] = 10
    rows[:, 2] = 10 * (change + spread * np.where(np.arange(32) % 2, 1, -1))
    return Measured(rows)


@pytest.mark.parametrize("most", [-1, 0, 1, 7, 40])
def test_as_many_steps_are_kept_as_the_budget_allows(most: int) -> None:
    tried = []

    def after(count: int) -> Measured:
        tried.append(count)
        return measured(1e-4 * count + (0.0 if most >= 0 else 1.0), 0.0)

    number, found = search.kept(40, after, budget=1e-4 * most + 5e-5)
    assert number == max(most, 0)
    assert found.change.value == pytest.approx(1e-4 * max(most, 0) + (0.0 if most >= 0 else 1.0))
    assert len(tried) <= 7
    assert tried[0] == 40


def test_the_bound_is_three_errors_and_says_how_many_tokens_it_needs(caplog) -> None:
    found = measured(0.001, 0.01)
    error = found.change.error
    assert error == pytest.approx(0.01 / math.sqrt(31))
    assert search.at_most(found) == pytest.approx(math.expm1(0.001 + 3 * error))
    assert search.tokens_needed(found, 6 * error) == pytest.approx(found.tokens, abs=1)
    with caplog.at_level("WARNING"):
        search.kept(1, lambda count: found if count else measured(0.0, 0.0), budget=0.002)
    assert "320 tokens are few for a budget of 0.2 %" in caplog.text


@pytest.mark.slow
def test_plans_keep_their_budget(tmp_path: Path) -> None:
    """The program of docs/inference.md, in small."""
    words = ["--seeds", "2", "--budgets", "0.01", "--schemes", "int8", "int4-g32-gptq", "int4-g32"]
    program = [sys.executable, ROOT / "launch/quantise_figures.py", tmp_path, *words]
    subprocess.run(program, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    tables = {row["name"]: row for row in map(json.loads, (tmp_path / "tables.jsonl").open())}
    assert abs(tables["int8"]["loss_change"]["mean"]) < 0.002
    assert tables["int4-g32"]["kl"]["mean"] > 5 * tables["int4-g32-gptq"]["kl"]["mean"]
    plans = [json.loads(line) for line in (tmp_path / "plans.jsonl").open()]
    assert [plan["seed"] for plan in plans] == [0, 1]
    assert plans[0]["verified"] != plans[1]["verified"]
    for plan in plans:
        assert plan["written"]["mean"] <= 0.01
        rows = {each["name"]: each for each in plan["candidates"]}
        mixed = rows.pop("plan")
        rows.pop("as written")
        near = [each for each in rows.values() if each["kl"]["mean"] <= mixed["kl"]["mean"]]
        assert near
        assert all(mixed["bits"] <= each["bits"] for each in near)  # it may be one of them
