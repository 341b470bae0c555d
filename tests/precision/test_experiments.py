"""The experiments of docs/precision.md, short."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def table(script: str, out: Path, *flags: str) -> dict[str, list[str]]:
    """Rows of the table that a script writes, by their first cell."""
    subprocess.run([sys.executable, LAUNCH / f"{script}.py", out, *flags], check=True, timeout=500)
    lines = (out / f"{script}.md").read_text().splitlines()[2:]
    return {
        cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    }


def test_losses_are_compared_seed_by_seed() -> None:
    """Seeds differ far more than recipes."""
    script = runpy.run_path(str(LAUNCH / "recipes.py"))
    losses = {name: [1.0, 2.0, 4.0] for name in script["RECIPES"]} | {"fp32": [1.01, 2.0, 4.04]}
    found = script["lines"]({"scratch": losses, "further": losses})
    assert found[2].startswith("| bf16_mixed | 2.3333 |  |  | 2.3333 |")
    assert found[3] == "| fp32 | 2.3500 | +0.667% | 0.333% | 2.3500 | +0.667% | 0.333% |"


@pytest.mark.slow
def test_the_recipes_are_trained(tmp_path: Path) -> None:
    found = table("recipes", tmp_path, "--seeds", "2", "--steps", "2", "--further", "1")
    assert len(found) == 7
    assert all(5.4 < float(row[0]) < 5.7 for row in found.values())
    others = [row for name, row in found.items() if name != "bf16_mixed"]
    assert all(abs(float(row[column].rstrip("%"))) < 0.5 for row in others for column in (1, 4))
    assert all(len({row[column] for row in found.values()}) > 1 for column in (0, 3))


@pytest.mark.slow
def test_adaptive_precision_finds_the_planted_layers(tmp_path: Path) -> None:
    found = table("adaptive", tmp_path, "--steps", "12")
    assert found["fp8_adaptive"][-1] == found["fp16_adaptive"][-1] == "7, 7 of the 7 planted"
    worse = {name: float(found[name][1].rstrip("%")) for name in ("fp8", "fp8_adaptive", "fp16_adaptive")}
    assert abs(worse["fp8_adaptive"]) < worse["fp8"]
    assert found["fp16"][0] == "not finite"
    assert (tmp_path / "adaptive.png").stat().st_size > 10_000
