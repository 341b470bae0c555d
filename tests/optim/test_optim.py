"""The learning rate as a function of the step; AdamW's groups, clipping, skips and shards."""

import pytest
import torch
from torch import nn

from hybridtrain.config.schema import OptimConfig, ScheduleConfig
from hybridtrain.optim.optimizer import AdamW, local_shards
from hybridtrain.optim.schedule import lr_at

WARM_UP = [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("kind", "total", "decay", "wanted"),
    [
        ("constant", 7, 0, [*WARM_UP, 1.0, 1.0, 1.0]),
        ("linear", 10, 0, [*WARM_UP, 1.0, 0.82, 0.64, 0.46, 0.28, 0.1]),
        (
            "cosine",
            9,
            0,
            [*WARM_UP, 1.0, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), 0.1],
        ),
        ("wsd", 9, 3, [*WARM_UP, 1.0, 1.0, 0.7, 0.4, 0.1]),
        ("wsd", 20, 0, [*WARM_UP, *[1.0] * 14, 0.55, 0.1]),  # a tenth of the run
    ],
)
def test_learning_rates(kind, total, decay, wanted):
    schedule = ScheduleConfig(kind=kind, warmup_steps=4, min_lr_ratio=0.1, decay_steps=decay)
    assert [
        lr_at(step, peak=1.0, schedule=schedule, total_steps=total) for step in range(total)
    ] == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_the_rate_stays_at_its_floor_after_the_end(kind):
    schedule = ScheduleConfig(kind=kind, min_lr_ratio=0.2)
    assert lr_at(0, peak=3.0, schedule=schedule, total_steps=50) == pytest.approx(3.0)
    assert lr_at(80, peak=3.0, schedule=schedule, total_steps=50) == pytest.approx(0.6)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"proj": nn.Linear(5, 3), "norm": nn.LayerNorm(3), "embed_tokens": nn.Embedding(4, 3)}
    )


def with_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_norms_and_biases_are_not_decayed():
    settings = OptimConfig(no_decay=["*norm*", "*.bias", "embed_*"])
    module = small_model()
    ours = AdamW(local_shards(module.named_parameters()), settings)
    names = {id(item.shard): item.name for item in ours.shards}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in ours.optimizer.param_groups
    }
    assert groups == {
        settings.weight_decay: {"proj.weight"},
        0.0: {"proj.bias", "norm.weight", "norm.bias", "embed_tokens.weight"},
    }


def test_steps_equal_those_of_torch_with_the_gradient_divided():
    settings = OptimConfig(lr=1e-2)
    ours, theirs = small_model(), small_model()
    mine = AdamW(local_shards(ours.named_parameters()), settings)
    plain = [
        p for name, p in theirs.named_parameters() if name != "proj.weight" and name != "embed_tokens.weight"
    ]
    groups = [
        {"params": [theirs["proj"].weight, theirs["embed_tokens"].weight], "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step, lr in enumerate((1e-2, 5e-3, 1e-3)):
        for module in (ours, theirs):
            with_gradients(module, step)
        for parameter in theirs.parameters():
            parameter.grad /= 8.0
        for group in other.param_groups:
            group["lr"] = lr
        mine.step(lr=lr, divide=torch.tensor(8.0), skip=torch.tensor(0.0))
        other.step()
        assert all(parameter.grad is None for parameter in ours.parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_a_skipped_step_changes_nothing_and_does_not_count():
    module = small_model()
    optimizer = AdamW(local_shards(module.named_parameters()), OptimConfig())
    with_gradients(module, 0)
    optimizer.step(lr=1e-2, divide=torch.tensor(1.0), skip=torch.tensor(0.0))
    before = {
        key: value.clone() for key, value in {**dict(module.named_parameters()), **optimizer.state()}.items()
    }
    with_gradients(module, 1)
    module["proj"].weight.grad[0, 0] = float("inf")
    optimizer.step(lr=1e-2, divide=torch.tensor(1.0), skip=torch.tensor(1.0))
    after = {**dict(module.named_parameters()), **optimizer.state()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert float(after["optim.proj.weight.step"]) == 1.0


def test_frozen_parameters_have_no_state():
    module = small_model()
    module["proj"].weight.requires_grad_(False)
    optimizer = AdamW(local_shards(module.named_parameters()), OptimConfig())
    with_gradients(module, 0)
    before = module["proj"].weight.clone()
    optimizer.step(lr=1e-2, divide=torch.tensor(1.0), skip=torch.tensor(0.0))
    assert torch.equal(module["proj"].weight, before)
    assert not any("proj.weight" in key for key in optimizer.state())
