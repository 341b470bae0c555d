"""Every causal language model of transformers, trained on real ranks as by one process, or refused.

    pytest -m table tests/families/test_table.py          a quarter of an hour; goes on where it was stopped

Each case adds a row to docs/models.jsonl, by the versions of torch, transformers and the analysis; a row that
is there is not measured again. launch/models_table.py writes docs/models.md from them.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain import engine as engines
from hybridtrain.errors import UserError
from launch.models_table import FIELDS, types
from tests.cases import Case, Outcome, on_ranks, reference
from tests.families.copies import own_fields_of

pytestmark = pytest.mark.table
ROWS = Path(__file__).resolve().parents[2] / "docs" / "models.jsonl"
LAYOUTS = {"pp2": (("parallel.cut", [1]),), "dp_shard2-zero3": (), "tp2": ()}
"""Layout -> options: the second stage begins at the second layer."""
VERSIONS = {
    "torch": version("torch").partition("+")[0],
    "transformers": version("transformers"),
    "search": 4,
}
VOCABULARY, FIRST = 131, 3
"""Tokens begin at FIRST: those below have a meaning, such as padding, in some models."""


@dataclasses.dataclass(frozen=True)
class OfType(Case):
    """A case of a config that may have its sizes in a config inside."""

    def rows(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        case = Case(**{**dataclasses.asdict(self), "fields": {"vocab_size": VOCABULARY - FIRST}})
        ids, labels = case.rows(step)
        return ids + FIRST, labels.where(labels < 0, labels + FIRST)


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def largest_difference(ours: Outcome, theirs: Outcome) -> float:
    """Relative, of the first step's loss, gradient norm and gradients; of a gradient that is less than a
    thousandth of all, to that.

    The second step divides by the size of gradients that may be nothing but rounding.
    """
    total = theirs.grad_norms[0]
    gradients = [
        float((ours.gradients.get(name, torch.zeros(())) - gradient).norm())
        / max(float(gradient.norm()), 1e-3 * total)
        for name, gradient in theirs.gradients.items()
    ]
    return max(
        *gradients,
        abs(ours.losses[0] / theirs.losses[0] - 1),
        abs(ours.grad_norms[0] / theirs.grad_norms[0] - 1),
    )


def result(case: Case) -> dict[str, Any]:
    try:
        settled = engines.settle(case.config(), world_size=case.world_size)
    except UserError as error:
        return {"result": "refused", "why": str(error).splitlines()[0]}
    theirs = reference(case)
    ours = on_ranks(case)
    row: dict[str, Any] = {"difference": largest_difference(ours, theirs)}
    row["second_loss"] = abs(ours.losses[1] / theirs.losses[1] - 1)
    row["result"] = "exact" if max(row.values()) <= 1e-5 else "wrong"
    if row["result"] == "wrong":  # thresholds and choices in a model amplify rounding, in one process as well
        alone = dataclasses.replace(case, layout="single", overrides=())
        row["one_process"] = largest_difference(on_ranks(alone), theirs)
        limit = max(1e-5, 2 * row["one_process"])
        row["result"] = "rounding" if row["difference"] <= limit and row["second_loss"] < 1e-3 else "wrong"
    if case.layout.startswith("tp"):
        cut = settled.facts.sliced
        row |= {"cut": 1.0 if cut is None else cut, "sequence": settled.facts.sequence}
        row["whole"] = [name for name in settled.facts.whole if name != "sequence"]
    return row


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", types())
def test_trained_as_by_one_process_or_refused(model_type: str, layout: str) -> None:
    key = {"type": model_type, "layout": layout, **VERSIONS}
    if any(key.items() <= row.items() for row in rows()):
        pytest.skip("measured already")
    try:
        fields = own_fields_of(model_type, **FIELDS.get(model_type, {}))
    except Exception as error:
        row = {"result": "refused", "why": f"transformers does not build it: {type(error).__name__}"}
    else:
        overrides = (*LAYOUTS[layout], ("parallel.allow_replicated", True))
        row = result(OfType(layout, fields, overrides=overrides))
    with ROWS.open("a") as file:
        file.write(json.dumps({**key, **row}) + "\n")
    assert row["result"] != "wrong", row
