"""AdamW over weights and moments in other formats: equal to torch's where nothing is rounded, and how much of
an update is realised where bf16 weights are."""

import pytest
import torch

from hybridtrain.config.schema import OptimConfig
from hybridtrain.optim import stored
from hybridtrain.optim.stored import Formats
from hybridtrain.precision import rounding

SETTINGS = OptimConfig(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
MOMENTS = ("exp_avg", "exp_avg_sq")
ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def trained(
    weight: torch.Tensor, formats: Formats, *, gradients: list[torch.Tensor], lr: float, decay: float = 0.0
) -> dict[str, torch.Tensor]:
    """Update `weight` in place; returns the state."""
    state = stored.allocate(weight, whole=weight.shape, moments=MOMENTS, formats=formats)
    whole = [slice(0, size) for size in weight.shape]
    where = stored.place(weight.shape, whole, key=3, device=weight.device)
    for gradient in gradients:
        stored.update(
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
    for field in MOMENTS:
        torch.testing.assert_close(state[field], other.state[theirs][field], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("rounding", "least", "most"), [("kahan", 0.99, 1.01), ("stochastic", 0.99, 1.01), ("nearest", 0.2, 0.4)]
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


ALL = [
    Formats(state, rounding, 0)
    for state in ("auto", "fp32", "bf16", "8bit")
    for rounding in ("kahan", "stochastic", "nearest")
]


@pytest.mark.parametrize("formats", ALL, ids=lambda formats: f"{formats.state}-{formats.rounding}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_changes_nothing(formats, dtype):
    weight = noise(32, 256)[0].to(dtype)
    state = trained(weight, formats, gradients=noise(32, 256), lr=1e-3)
    before = {field: value.clone() for field, value in {**state, "weight": weight}.items()}
    where = stored.place(weight.shape, [slice(0, size) for size in weight.shape], key=3, device=weight.device)
    options = {"settings": SETTINGS, "formats": formats, "where": where, "lr": 1e-3, "decay": 0.1}
    broken = torch.full_like(weight, float("inf"))
    stored.update(weight, broken, state, **options, divide=ONE, skip=ONE)
    assert all(torch.equal(value, before[field]) for field, value in {**state, "weight": weight}.items())
    stored.update(weight, noise(32, 256, seed=5)[0], state, **options, divide=ONE, skip=ZERO)
    assert not any(torch.equal(value, before[field]) for field, value in {**state, "weight": weight}.items())


@pytest.mark.parametrize("formats", ALL, ids=lambda formats: f"{formats.state}-{formats.rounding}")
@pytest.mark.parametrize("place", [(slice(0, 8), slice(0, 256)), (slice(33, 64), slice(128, 256))])
def test_a_shard_is_updated_like_the_same_elements_of_the_whole(formats, place):
    whole = noise(64, 256)[0].bfloat16()
    part, gradients = whole[place].clone(), noise(64, 256, count=3, seed=1)
    state = trained(whole, formats, gradients=gradients, lr=1e-3, decay=0.1)
    ours = stored.allocate(part, whole=whole.shape, moments=MOMENTS, formats=formats)
    where = stored.place(whole.shape, place, key=3, device=part.device)
    for gradient in gradients:
        stored.update(
            part, gradient[place], ours, settings=SETTINGS, formats=formats, where=where, lr=1e-3, decay=0.1,
            divide=ONE, skip=ZERO,
        )  # fmt: skip
    assert torch.equal(part, whole[place])
    for field, value in ours.items():
        rows, columns = place
        scales = (rows, slice(columns.start // 128, columns.stop // 128))
        chosen = ... if field == "step" else scales if field.endswith("_scales") else place
        assert torch.equal(value, state[field][chosen]), field
        assert value.shape == stored.shape_of(field, part.shape)


def test_the_place_of_a_shard_of_three_dimensions():
    index = torch.arange(2 * 3 * 8).view(2, 3, 8)
    slices = (slice(1, 2), slice(1, 3), slice(4, 8))
    first = stored.place(index.shape, slices, key=0, device=index.device).first
    assert torch.equal(first.long(), index[slices][..., :1].reshape(-1, 1))


def test_an_element_with_small_gradients_in_a_block_of_large_ones_is_not_thrown_about():
    """Its gradient is 1e-4 of the others, and then 0. In exp_avg_sq, 1e-8 of the block's largest value would
    have the code 0, and the update would be exp_avg / eps: 2,265 times what it should be."""
    weight, gradients = torch.zeros(32, 128), noise(32, 128, count=20)
    for gradient in gradients:
        gradient[:, 0] = 1e-4
    gradients += [gradient.index_fill(1, torch.tensor([0]), 0.0) for gradient in noise(32, 128, count=5)]
    trained(weight, Formats("8bit", "nearest", 0), gradients=gradients, lr=1e-3)
    exact = torch.zeros(32, 128)
    trained(exact, Formats("fp32", "nearest", 0), gradients=gradients, lr=1e-3)
    assert (weight[:, 0] - exact[:, 0]).abs().max() < exact[:, 0].abs().max()


def test_what_torch_does_itself_is_left_to_torch():
    plain = {(f.state, f.rounding) for f in ALL if f.plain(torch.bfloat16)}
    assert plain == {("auto", "nearest"), ("bf16", "nearest")}
    assert {f.state for f in ALL if f.plain(torch.float32)} == {"auto", "fp32"}


def test_compensated_weights_are_fp32_masters_bit_for_bit():
    weight = noise(32, 256)[0].bfloat16()
    master, gradients = weight.float(), noise(32, 256, count=20, seed=1)
    state = trained(weight, Formats("fp32", "kahan", 0), gradients=gradients, lr=1e-6, decay=0.1)
    trained(master, Formats("fp32", "kahan", 0), gradients=gradients, lr=1e-6, decay=0.1)
    assert torch.equal(rounding.joined(weight, state[stored.COMPENSATION]), master)
    assert not torch.equal(weight.float(), master)
