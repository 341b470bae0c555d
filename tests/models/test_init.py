"""Initial weights: the model's own distributions, and the same numbers in every slice."""

from __future__ import annotations

import math

import pytest
import torch

from hybridtrain.models import build, init
from tests.families.copies import config_of, fields_of

TYPES = ("llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "bloom")


def whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


@pytest.mark.parametrize("model_type", TYPES)
def test_distributions_are_those_of_transformers(model_type: str) -> None:
    """Mean and deviation of each parameter, within what its number of elements allows."""
    config = build.hf_config(fields_of(model_type), chosen={}, attention="sdpa")
    source = init.draw(config, seed=5)
    torch.manual_seed(0)
    for name, expected in build.plain_model(config).named_parameters():
        drawn = source(name, tuple(expected.shape), whole(tuple(expected.shape)))
        expected, root = expected.detach(), math.sqrt(expected.numel())
        if expected.numel() > 1:
            std = float(expected.std())
            assert float((drawn.mean() - expected.mean()).abs()) <= 6 * std / root + 1e-7, name
            assert float(drawn.std()) == pytest.approx(std, rel=0.02 + 5 / root, abs=1e-7), name


def test_a_residual_projection_of_gpt2_is_smaller() -> None:
    """Set by a parent after its children: transformers scales it by the number of layers."""
    config = config_of("gpt2", n_layer=8, n_embd=64, n_head=4)
    source = init.draw(config, seed=0)
    std = float(source("transformer.h.3.mlp.c_proj.weight", (256, 64), whole((256, 64))).std())
    assert std == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)


def test_slices_have_the_numbers_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_BLOCK", 500)  # several blocks of rows
    config = build.hf_config(fields_of("llama"), chosen={}, attention="sdpa")
    source, name, shape = init.draw(config, seed=5), "model.embed_tokens.weight", (131, 48)
    all_of_it = source(name, shape, whole(shape))
    for rows, columns in (
        (slice(0, 131), slice(5, 9)),
        (slice(37, 90), slice(0, 48)),
        (slice(130, 131), slice(3, 4)),
    ):
        assert torch.equal(source(name, shape, (rows, columns)), all_of_it[rows, columns])
    assert source(name, shape, (slice(131, 131), slice(0, 48))).shape == (0, 48)
    assert not torch.equal(init.draw(config, seed=6)(name, shape, whole(shape)), all_of_it)
