"""The fuzzers of tests/fuzz, seeded: a few cases by default, more as slow tests,
everything in the table tier.

HYBRIDTRAIN_FUZZ_SEED chooses another seed, HYBRIDTRAIN_FUZZ_ROWS keeps the rows of the table tier (one JSON
object a case) in a folder.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.fuzz import harness

SEED = os.environ.get("HYBRIDTRAIN_FUZZ_SEED", "0")
pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("gcc") is None,
        reason="faults are planted with LD_PRELOAD on Linux, compiled by gcc",
    ),
]
HOURS_S = 6 * 3600.0


def check(module: str, *more: str, count: int, folder: Path, timeout_s: float) -> list[dict[str, object]]:
    rows = harness.started(
        module, "--count", str(count), "--seed", SEED, *more, folder=folder, timeout_s=timeout_s
    )
    if keep := os.environ.get("HYBRIDTRAIN_FUZZ_ROWS"):
        shutil.copy(folder / "rows.jsonl", Path(keep) / f"{module}.jsonl")
    wrong = [row for row in rows if row["wrong"]]
    assert not wrong, (
        "\n".join(
            f"{ {key: value for key, value in row.items() if key != 'wrong'} }\n{row['wrong']}"
            for row in wrong[:10]
        )
        + f"\n{len(wrong)} of {len(rows)}"
    )
    return rows


@pytest.mark.parametrize(
    "count",
    [
        1,
        pytest.param(8, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param(60, marks=[pytest.mark.table, pytest.mark.timeout(HOURS_S)]),
    ],
)
def test_a_file_operation_that_fails_costs_nothing(tmp_path: Path, count: int) -> None:
    """Of each of seven commands (three by default) `count` operations fail, or kill it."""
    only = ["--only", "resume,export_again,prepare"] if count == 1 else []
    rows = check("file_faults", *only, count=count, folder=tmp_path, timeout_s=HOURS_S)
    assert len(rows) >= (3 if only else 7) * min(count, 15)


@pytest.mark.parametrize(
    "count",
    [
        6,
        pytest.param(80, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param(2000, marks=[pytest.mark.table, pytest.mark.timeout(HOURS_S)]),
    ],
)
def test_a_damaged_file_is_refused_or_harmless(tmp_path: Path, count: int) -> None:
    rows = check("corruption", count=count, folder=tmp_path, timeout_s=HOURS_S)
    assert len(rows) == count
