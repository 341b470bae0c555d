"""AdamW over weights and moments in other formats: equal to torch's where nothing is rounded, and how much of
an update is realised where bf16 weights are."""

import pytest
import torch

from hybridtrain.config.schema import OptimConfig
from hybridtrain.optim import adam
from hybridtrain.optim.adam import Formats

SETTINGS = OptimConfig(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def trained(
    weight: torch.Tensor, formats: Formats, *, gradients: list[torch.Tensor], lr: float, decay: float = 0.0
) -> dict[str, torch.Tensor]:
    """Update `weight` in place; returns the state."""
    state = adam.allocate(weight, whole=weight.shape, formats=formats)
    whole = [slice(0, size) for size in weight.shape]
    where = adam.place(weight.shape, whole, key=3, device=weight.device)
    for gradient in gradients:
        adam.update(
            weight, gradient, state, settings=SETTINGS, formats=formats, where=where, lr=lr, decay=decay,
            divide=ONE, skip=ZERO,
        )  # fmt: skip
    return state


def noise(*shape: int, count: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (600, 256), (2, 3, 4)])
def test_in_fp32_it_is_torchs_adamw(shape):
    (weight,), gradients = noise(*shape), noise(*shape, count=4, seed=1)
    theirs = torch.nn.Parameter(weight.clone())
    other = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    state = trained(weight, Formats("fp32", "kahan", 0), gradients=gradients, lr=1e-2, decay=0.1)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        other.step()
    torch.testing.assert_close(weight, theirs.detach(), rtol=1e-5, atol=1e-7)
    for field in adam.PLAIN:
        torch.testing.assert_close(state[field], other.state[theirs][field], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("rounding", "least", "most"), [("kahan", 0.99, 1.01), ("stochastic", 0.99, 1.01), ("nearest", 0.3, 0.5)]
)
def test_the_realised_share_of_an_update(rounding, least, most):
    """sum(actual * intended) / sum(intended^2) over 20 steps at a rate at which most updates are smaller than
    half a step of bf16."""
    weight = (noise(256, 256)[0] * 0.02).bfloat16()
    exact, gradients = weight.float(), noise(256, 256, count=20, seed=1)
    before = exact.clone()
    drift = noise(256, 256, seed=2)[0]
    gradients = [gradient + drift for gradient in gradients]
    trained(weight, Formats("fp32", rounding, 0), gradients=gradients, lr=2e-5)
    trained(exact, Formats("fp32", rounding, 0), gradients=gradients, lr=2e-5)
    intended, actual = exact - before, weight.float() - before
    share = float((actual * intended).sum() / intended.square().sum())
    assert least < share < most, share
