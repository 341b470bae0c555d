"""Silent faults of parallel composition that were found in other systems: planted in ours,
`hybridtrain parity` finds each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.parity import compare, verdict
from hybridtrain.parity.measure import train_layout
from tests.cases import GPT2
from tests.parity.test_parity import root
from tests.sabotage import composition as planted

slow = pytest.mark.slow
CASES = [
    (planted.softmax_over_the_local_vocabulary, "llama", "tp2", {}, {"loss_rel", "grad_rel"}),
    (planted.local_token_counts, "llama", "dp_replicate2", {}, {"loss_rel", "grad_rel"}),
    (planted.a_sliced_parameter_counted_on_one_rank, "llama", "tp2", {}, {"grad_norm_rel"}),
    (planted.replicated_parameters_counted_on_every_rank, "llama", "tp2", {}, {"grad_norm_rel"}),
    (planted.partial_gradients_of_a_replicated_norm, "qwen3", "tp2-nosp", {}, {"grad_rel"}),
    (planted.identity_gradient_of_log_softmax, "llama", "tp2", {}, {"grad_rel"}),
    (planted.repeated_heads_not_reduced, "llama", "tp2", {"num_key_value_heads": 1}, {"grad_rel"}),
    (planted.tied_gradients_not_added, "llama", "pp2", {"tie_word_embeddings": True}, {"grad_rel"}),
]
# the others are slow tests
DEFAULT = (planted.partial_gradients_of_a_replicated_norm, planted.a_sliced_parameter_counted_on_one_rank)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("fault", "family", "layout", "fields", "columns"),
    [pytest.param(*case, id=case[0].__name__, marks=[] if case[0] in DEFAULT else [slow]) for case in CASES],
)
def test_a_fault_found_elsewhere_is_found_by_parity(
    run_dir: Path,
    fault: Callable[..., Any],
    family: str,
    layout: str,
    fields: dict[str, object],
    columns: set[str],
) -> None:
    config = root(run_dir, layout, family=family)
    config.model.config |= fields
    assert compare(config, train=fault) == 1
    written = json.loads((run_dir / "parity.json").read_text())
    [row] = written["layouts"]
    assert not written["errors"], "it is to be wrong, not to crash"
    found = {
        name
        for name in verdict.MEASURES
        if row[name] is not None and row[name] > written["tolerances"][layout][name]
    }
    assert columns <= found, row


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_dropout_passes_and_that_of_other_rows_in_recomputed_layers_is_found(
    run_dir: Path, recompute: str
) -> None:
    config = root(run_dir, "pp2")
    config.model.config, config.model.attention = dict(GPT2), "eager"
    config.recompute.kind = recompute
    assert compare(config, train=train_layout) == 0
    wrong = int(recompute == "full")
    assert compare(config, train=planted.dropout_of_the_rows_in_the_forward_pass) == wrong
    written = json.loads((run_dir / "parity.json").read_text())
    [row] = written["layouts"]
    assert (row["grad_rel"] > 100 * written["tolerances"]["pp2"]["grad_rel"]) == bool(wrong), row


def test_the_table_in_the_docs_names_every_planted_fault() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parity.md").read_text()
    faults = [*(case[0] for case in CASES), planted.dropout_of_the_rows_in_the_forward_pass]
    assert [fault.__name__ for fault in faults if fault.__name__ not in text] == []
