"""DoRA of one layer: its definition, and peft's layer with the same masks of dropout."""

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybridtrain.config.schema import AdaptersConfig
from hybridtrain.models import adapters, dora, quantised
from hybridtrain.models.linears import Linear

INPUTS, OUTPUTS, SCALE = 64, 40, 2.0
X = torch.randn(2, 7, INPUTS, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "linear": lambda: nn.Linear(INPUTS, OUTPUTS),
    "no bias": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
    "transposed": lambda: Conv1D(OUTPUTS, INPUTS),
}


def fresh(kind: str) -> nn.Module:
    torch.manual_seed(1)
    layer = LAYERS[kind]()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.requires_grad_(False)


@torch.no_grad()
def adapted(layer: nn.Module, *, dropout: float = 0.0) -> nn.Module:
    """With an adapter that acts, and other lengths than the layer's own."""
    settings = AdaptersConfig("lora", 4, 8.0, dora=True, dropout=dropout)
    adapters.add(layer, settings, inputs=INPUTS, outputs=OUTPUTS)
    layer.lora_A.weight.normal_(0, 0.2)
    layer.lora_B.weight.normal_(0, 0.3)
    layer.lora_magnitude_vector.copy_(torch.rand(OUTPUTS) + 1)
    return layer


def gradients(module: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the input and of `parameters`."""
    x = X.clone().requires_grad_()
    torch.manual_seed(2)  # of dropout
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def trained(layer) -> list[Tensor]:
    return [layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector]


@pytest.mark.parametrize("stored", ["plain", "transposed", "nf4"])
def test_the_definition(stored):
    """Each output has the length m, and the lengths are constants in the backward pass."""
    layer = fresh("transposed" if stored == "transposed" else "linear")
    adapted(layer)
    weight = layer.weight.t() if stored == "transposed" else layer.weight
    if stored == "nf4":
        codes, largest = quantised.quantise(weight, "nf4", dtype=torch.float32)
        weight = quantised.values(codes, largest)
        quantised.convert(layer, "nf4")
        layer.weight.data, layer.weight_absmax.data = codes, largest
    found = gradients(layer, trained(layer))

    def plain(x: Tensor) -> Tensor:
        total = weight + SCALE * layer.lora_B.weight @ layer.lora_A.weight
        unit = total / total.detach().norm(dim=1, keepdim=True)
        return nn.functional.linear(x, layer.lora_magnitude_vector[:, None] * unit, layer.bias)

    for ours, theirs in zip(found, gradients(plain, trained(layer)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def kept(layer: nn.Module) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(X.clone().requires_grad_())
    return sum(found.values())


def test_what_is_kept_is_planned_for():
    """With a few vectors of the length of the output more."""
    found, linear = [], Linear("layer", 0, 1, INPUTS, OUTPUTS, router=False)
    for settings in (AdaptersConfig("lora", 4), AdaptersConfig("lora", 4, dora=True)):
        layer = fresh("linear")
        adapters.add(layer, settings, inputs=INPUTS, outputs=OUTPUTS)
        found.append(kept(layer))
    values = (found[1] - found[0]) / X.element_size()
    assert 0 <= values - X[..., 0].numel() * adapters.values_kept([linear], settings) <= 4 * OUTPUTS


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_of_peft(kind, dropout):
    from peft import LoraConfig, get_peft_model

    ours, transposed = fresh(kind), kind == "transposed"
    holder = nn.ModuleDict({"layer": copy.deepcopy(ours)})
    options = {"target_modules": ["layer"], "fan_in_fan_out": transposed, "lora_dropout": dropout}
    model = get_peft_model(holder, LoraConfig(r=4, lora_alpha=8, use_dora=True, **options))
    layer = model.base_model.model["layer"]
    theirs = [part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)]
    first = dora.initial(
        lambda name, shape, slices: ours.weight[slices],  # noqa: ARG005
        "layer",
        module=ours,
        outputs=slice(0, OUTPUTS),
        dtype=torch.float32,
    )
    torch.testing.assert_close(first, theirs[2].detach())
    adapted(ours, dropout=dropout)
    with torch.no_grad():
        for parameter, value in zip(theirs, trained(ours), strict=True):
            parameter.copy_(value)
    for mine, other in zip(gradients(ours, trained(ours)), gradients(layer, theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    a, b, magnitude = (parameter.detach() for parameter in trained(ours))
    merged = adapters.merged(ours.weight, a, b, magnitude, scale=SCALE, transposed=transposed)
    assert torch.equal(merged, model.merge_and_unload()["layer"].weight)
