"""The fused head and loss against torch's cross-entropy over whole logits in fp64: losses and gradients,
one rank and several."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from hybridtrain.runtime.collectives import GroupRanks
from hybridtrain.tasks.linear_cross_entropy import (
    IDENTITY,
    HeadGradient,
    Terms,
    Transform,
    linear_cross_entropy,
)
from hybridtrain.types import IGNORE_INDEX
from tests.ranks import run_ranks

ROWS, POSITIONS, HIDDEN = 2, 12, 16
PLAIN = Terms(smoothing=0.0, z_loss=0.0)
TERMS = [PLAIN, Terms(0.1, 0.0), Terms(0.0, 0.01), Terms(0.2, 0.003)]


def inputs(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head weights, labels of which a third carries no loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, POSITIONS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (ROWS, POSITIONS), generator=generator)
    labels[:, ::3] = IGNORE_INDEX
    return hidden, weight, labels


def loss_of(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    transform=IDENTITY,
    terms=PLAIN,
    chunk=0,
    gradient=None,
    ranks=None,
    entries=0,
):
    return linear_cross_entropy(
        hidden,
        labels,
        weight_VD=weight,
        bias_V=bias,
        transform=transform,
        terms=terms,
        chunk=chunk,
        gradients=(gradient or HeadGradient(), HeadGradient()),
        ranks=ranks,
        entries=entries or len(weight),
        right=None,
    )


def expected(
    vocabulary: int, dtype: torch.dtype, factor: float = 1.0, terms: Terms = PLAIN
) -> list[torch.Tensor]:
    """Loss sum, gradient of hidden, gradient of weight: fp64, from logits rounded to `dtype` as a matrix
    product leaves them."""
    hidden, weight, labels = inputs(vocabulary, dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = hidden @ weight.t()
    rounded = exact + (exact.detach().to(dtype).double() - exact.detach())
    logits, targets = rounded.flatten(0, 1), labels.flatten()
    loss = F.cross_entropy(
        logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=terms.smoothing
    )
    loss = loss + terms.z_loss * torch.logsumexp(logits[targets != IGNORE_INDEX], dim=-1).square().sum()
    (loss * factor).backward()
    return [loss.detach(), hidden.grad, weight.grad]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("chunk", [0, 1, 7, 24, 100])
@pytest.mark.parametrize(
    ("dtype", "loss_limit", "limit"), [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 4e-3)]
)
@pytest.mark.parametrize("terms", TERMS)
def test_loss_and_gradients(terms, dtype, loss_limit, limit, chunk):
    hidden, weight, labels = inputs(1000, dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = loss_of(hidden, weight, labels, terms=terms, chunk=chunk)
    assert (loss.shape, loss.dtype) == ((1,), torch.float32)
    (loss * 0.125).sum().backward()
    wanted = expected(1000, dtype, factor=0.125, terms=terms)
    assert error(loss[0], wanted[0]) < loss_limit
    assert error(hidden.grad, wanted[1]) < limit
    assert error(weight.grad, wanted[2]) < limit


def test_a_device_that_is_neither_cpu_nor_gpu_is_no_reason_to_fail():
    hidden, weight, labels = (tensor.to("meta") for tensor in inputs(1000, torch.float32))
    assert loss_of(hidden, weight.requires_grad_(), labels).device.type == "meta"


def test_no_logits_outlive_the_forward_pass():
    """Of N = 24 tokens and 1,000 words it keeps N x D and V x D numbers for backward, not N x V."""
    hidden, weight, labels = (
        x.requires_grad_() if x.is_floating_point() else x for x in inputs(1000, torch.float32)
    )
    gradient = HeadGradient()
    loss = loss_of(hidden, weight, labels, chunk=4, gradient=gradient)
    (of_loss, _), (of_weight, _) = loss.grad_fn.next_functions
    assert (of_loss.gradient.numel(), gradient.total.numel()) == (ROWS * POSITIONS * HIDDEN, 1000 * HIDDEN)
    assert not of_loss.saved_tensors
    assert not of_weight.saved_tensors


def test_frozen_weights_and_evaluation_compute_no_gradients():
    hidden, weight, labels = inputs(50, torch.float32)
    loss = loss_of(hidden.requires_grad_(), weight, labels, chunk=5)
    loss.sum().backward()
    assert error(hidden.grad, expected(50, torch.float32)[1]) < 1e-6
    assert weight.grad is None
    with torch.no_grad():
        assert float(loss_of(hidden, weight, labels, chunk=5)) == pytest.approx(float(loss))


def test_a_token_without_a_label_leaves_no_trace():
    hidden, weight, labels = inputs(50, torch.float32)
    before = float(loss_of(hidden, weight, labels))
    hidden[:, ::3] = 1e3
    hidden.requires_grad_()
    loss = loss_of(hidden, weight, labels)
    loss.sum().backward()
    assert float(loss.detach()) == before
    assert not hidden.grad[:, ::3].any()


@pytest.mark.parametrize("transform", [Transform(0.0625, None), Transform(1.0, 5.0), Transform(3.0, 2.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_bias_a_scale_and_a_soft_cap(biased, transform):
    hidden, weight, labels = inputs(100, torch.float32)
    bias = torch.randn(100, generator=torch.Generator().manual_seed(2)) if biased else None
    given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    exact = [tensor.double().requires_grad_() for tensor in given]
    z = exact[0] @ exact[1].t() + (exact[2] if biased else 0)
    cap = transform.cap
    logits = z * transform.scale if cap is None else cap * torch.tanh(z * transform.scale / cap)
    wanted = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    wanted.backward()
    for tensor in given:
        tensor.requires_grad_()
    found = loss_of(hidden, weight, labels, bias=bias, transform=transform, chunk=7)
    found.sum().backward()
    assert error(found[0], wanted.detach()) < 1e-6
    for tensor, other in zip(given, exact, strict=True):
        assert error(tensor.grad, other.grad) < 1e-6


def on_rank(vocabulary: int, chunk: int, terms: Terms) -> list[torch.Tensor]:
    ranks = GroupRanks(dist.group.WORLD)
    hidden, whole, labels = inputs(vocabulary, torch.float32)
    parts = torch.chunk(whole, ranks.size)
    weight = parts[ranks.rank].clone() if ranks.rank < len(parts) else whole[:0].clone()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = loss_of(hidden, weight, labels, terms=terms, chunk=chunk, ranks=ranks, entries=vocabulary)
    (loss * 0.125).sum().backward()
    gradients = [torch.empty(0)] * ranks.size
    dist.all_gather_object(gradients, weight.grad)
    return [loss.detach()[0], hidden.grad, torch.cat(gradients)]


SHARED = [
    (1000, 0, PLAIN),
    (1000, 5, PLAIN),
    (7, 7, PLAIN),
    (5, 0, PLAIN),
    (1000, 5, Terms(0.1, 0.01)),
    (5, 0, Terms(0.1, 0.01)),
]


@pytest.mark.parametrize(("vocabulary", "chunk", "terms"), SHARED)
def test_a_vocabulary_shared_by_ranks(vocabulary, chunk, terms):
    """Odd sizes too: of 7 words the fourth rank has one, of 5 it has none."""
    wanted = expected(vocabulary, torch.float32, factor=0.125, terms=terms)
    for found in run_ranks(4, on_rank, vocabulary, chunk, terms):
        for ours, theirs in zip(found, wanted, strict=True):
            assert error(ours, theirs) < 1e-6
