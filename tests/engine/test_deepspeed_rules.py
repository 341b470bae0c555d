"""optim.rules act with engine=deepspeed as with engine=torch, also offloaded; pipelines refuse them."""

from __future__ import annotations

import dataclasses

import pytest

from hybridtrain.config import checks, compose
from hybridtrain.errors import UserError
from hybridtrain.optim.shards import rate_of
from tests.cases import Case, deepspeed, differences, model, on_ranks, reference

SLOW = pytest.mark.slow
RULES = [
    {"match": "*.embed_tokens.*", "lr": 1e-4, "weight_decay": 0.0},
    {"match": "*.layers.1.*", "lr": 3e-3},
    {"match": "*.q_proj.weight", "weight_decay": 0.5},
    {"match": "*norm*", "lr": 5e-3, "weight_decay": 0.3},
]
OFFLOADED = (("engine.offload_optimizer", "cpu"),)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp_shard2-zero3", ()),
        *(
            pytest.param(layout, options, marks=SLOW)
            for layout, options in (
                ("dp_shard2-zero1", ()),
                ("dp_shard2-zero2", OFFLOADED),
                ("tp2-nosp", ()),
            )
        ),
    ],
)
def test_rates_and_decays_of_parameters(layout: str, options: tuple[tuple[str, str], ...]) -> None:
    """Against one process with the same rules; without them it would be far away."""
    fields = model(tie_word_embeddings=layout.endswith("zero1"))
    ruled = (("optim.rules", RULES), ("optim.weight_decay", 0.1))
    case = dataclasses.replace(deepspeed(layout, fields, overrides=(*ruled, *options)), lr=1e-2, steps=3)
    ours, theirs = on_ranks(case), reference(case)
    assert differences(ours, theirs)["loss_rel"] < 1e-5
    for name, value in theirs.parameters.items():
        rate = case.lr * rate_of(name, settings=case.config().optim)
        assert (ours.parameters[name] - value).abs().max() < 0.01 * rate * case.steps, name
    plain = Case("single", fields, steps=3, lr=1e-2)
    assert differences(ours, reference(plain))["param_abs"] > 1e-2


def test_a_pipeline_refuses_them() -> None:
    """Its ranks would wait for each other: those of one stage have a group that the others do not have."""
    words = ["model=tiny", "data.path=x", "train.steps=1", "engine=deepspeed", "parallel=pp2"]
    rules = "optim.rules=[{match: '*.layers.1.*', lr: 1e-3}]"
    checks.check(compose.compose("train", words))
    with pytest.raises(UserError, match=r"(?s)optim\.rules=.*stages have other groups.*parallel\.pp=1"):
        checks.check(compose.compose("train", [*words, rules]))
