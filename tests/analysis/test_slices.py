"""Slicings for tensor parallelism: what is found for eight model types, and faults that are planted in them,
each refused by the proof on a reduced copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from hybridtrain.analysis import analyse, slices
from hybridtrain.analysis.probe import Failure, Probe
from hybridtrain.models import slicing, stage
from hybridtrain.models.slicing import Slicing
from hybridtrain.models.structure import structure_of
from tests.families.copies import EIGHT, config_of

WHOLE = {"bloom": {"attention self_attention"}}
"""Blocks that stay whole: Bloom's attention builds its positions for all heads outside of itself."""


@pytest.mark.parametrize("model_type", EIGHT)
def test_eight_model_types_are_cut(model_type: str) -> None:
    found = slices.slicing_of(config_of(model_type), size=2, kind=slices.WITH_SEQUENCE)
    assert set(found.whole) - {"sequence"} == WHOLE.get(model_type, set())
    assert bool(found.slicing.sequence) == (model_type != "bloom")
    assert found.share > (0.99 if model_type not in WHOLE else 0.6)  # routers are whole


def test_more_ranks_than_key_value_heads() -> None:
    """Ranks share a head; 4 ranks, 2 of them for each."""
    config = config_of("qwen3", num_attention_heads=8, num_key_value_heads=2)
    found = slices.slicing_of(config, size=4, kind=slices.WITH_SEQUENCE).slicing
    shared = {name for name in found.partial if "k_proj" in name or "v_proj" in name}
    assert shared == {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}


def test_a_gradient_that_is_nothing_but_rounding_is_added() -> None:
    """Of a router that gives all weight to the one expert it chooses; else the ranks' copies drift apart."""
    config = config_of("hunyuan_v1_moe", head_dim=128, moe_topk=1)
    for kind in (slices.WITH_SEQUENCE, slices.WITHOUT_SEQUENCE):
        found = slices.slicing_of(config, size=2, kind=kind).slicing
        assert "mlp.gate.wg.weight" in found.partial
        assert "mlp.experts.down_proj" in found.cuts


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 9}, "attention self_attn"),
        ({"intermediate_size": 2049}, "mlp mlp"),
    ],
)
def test_sizes_that_do_not_divide_stay_whole(fields: dict[str, Any], left: str) -> None:
    config = config_of("gemma2", head_dim=32, hidden_size=288, **fields)
    found = slices.slicing_of(config, size=2, kind=slices.WITHOUT_SEQUENCE)
    assert left in found.whole
    assert 0 < found.share < 1


# -- faults --------------------------------------------------------------------------------------------------


def changed(found: Slicing, name: str, cut: str) -> Slicing:
    return dataclasses.replace(found, cuts={**found.cuts, name: cut})


def without(found: Slicing, name: str) -> Slicing:
    return dataclasses.replace(found, cuts={key: cut for key, cut in found.cuts.items() if key != name})


FAULTS: dict[str, tuple[str, Callable[[Slicing], Slicing], str]] = {
    "gate and up in turns, not one after the other": (
        "phi3",
        lambda found: changed(found, "mlp.gate_up_proj.weight", "0"),
        "loss differs",
    ),
    "interleaved gate and up as two parts": (
        "gpt_oss",
        lambda found: changed(
            changed(found, "mlp.experts.gate_up_proj", "2:e e"), "mlp.experts.gate_up_proj_bias", "1:e e"
        ),
        "loss differs",
    ),
    "query, key and value as one": (
        "gpt2",
        lambda found: changed(changed(found, "attn.c_attn.weight", "1:q"), "attn.c_attn.bias", "0:q"),
        "loss differs",
    ),
    "a bias added on every rank": (
        "gpt2",
        lambda found: without(found, "mlp.c_proj.bias"),
        "loss differs",
    ),
    "no sum at the end of the MLP": (
        "gemma2",
        lambda found: dataclasses.replace(found, outputs=("self_attn",)),
        "loss differs|same|size",
    ),
    "no sum of the gradient at its beginning": (
        "gemma2",
        lambda found: dataclasses.replace(found, inputs=("self_attn",), sequence=""),
        "the gradient of",
    ),
    "norm over a rank's own heads": (
        "olmo2",
        lambda found: dataclasses.replace(found, norms=()),
        "loss differs",
    ),
    "a head that ranks share counted as their own": (
        "qwen3",
        lambda found: changed(changed(found, "self_attn.k_proj.weight", "0"), "self_attn.v_proj.weight", "0"),
        "invalid for input",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_slicing_is_refused(fault: str) -> None:
    model_type, plant, words = FAULTS[fault]
    fields = {"num_attention_heads": 8, "num_key_value_heads": 2} if model_type == "qwen3" else {}
    size = 4 if fields else 2
    config = config_of(model_type, **fields)
    proof = Probe(analyse.copy_of(config, tp=size), size=size)
    found = slices.slicing_of(config, size=size, kind=slices.WITH_SEQUENCE).slicing
    proof.prove(found)
    with pytest.raises(Failure, match=words):
        proof.prove(plant(found))


def test_a_multiplier_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite divides its logits by a number of its config."""
    config = config_of("granite")
    proof = Probe(analyse.copy_of(config, tp=2), size=2)
    found = slices.slicing_of(config, size=2, kind=slices.WITH_SEQUENCE).slicing
    without = dataclasses.replace(structure_of(proof.copy.config), scale=1.0)
    monkeypatch.setattr(stage, "structure_of", lambda config: without)  # noqa: ARG005
    with pytest.raises(Failure, match="loss differs"):
        proof.prove(found)


def test_a_gradient_that_is_not_added_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sum in the backward pass, what comes before a block lacks a part of its gradient."""
    config = config_of("gemma2")
    found = slices.slicing_of(config, size=2, kind=slices.WITHOUT_SEQUENCE).slicing
    proof = Probe(analyse.copy_of(config, tp=2), size=2)
    # what comes in needs no sum; what goes back does
    monkeypatch.setattr(slicing, "_enter", lambda *given: given[3:])
    with pytest.raises(Failure, match=r"the gradient of model\."):
        proof.prove(found)


def test_a_slicing_of_another_degree_is_not_taken() -> None:
    """Five key/value heads: two ranks cannot share them out, five can."""
    config = config_of("qwen3", num_attention_heads=10, num_key_value_heads=5, head_dim=16)
    two, five = (slices.slicing_of(config, size=size, kind=slices.WITHOUT_SEQUENCE) for size in (2, 5))
    assert "attention self_attn" in two.whole
    assert "self_attn.q_proj.weight" in five.slicing.cuts
