"""Layer by layer: the same inputs as in the whole model, and the codes of each layer."""

from pathlib import Path

import pytest
import torch

from hybridtrain.models.build import logits
from hybridtrain.models.linears import linears_of
from hybridtrain.quantize import schemes, walk
from hybridtrain.quantize.measure import measure
from tests.quantize.folders import opened, plain, rows, write

CPU = torch.device("cpu")


def quantised(folder: Path, name: str, *, count: int) -> list[walk.Quantised]:
    config, source = opened(folder)
    scheme = schemes.parse(name, field="quantize.scheme")
    found = walk.layers(
        config, source, lambda _: scheme, rows=rows(count), device=CPU, field="quantize.scheme"
    )
    return [each for layer in found for each in layer]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "bert", "gpt2"])
def test_layers_are_calibrated_on_what_goes_into_them(kind: str, tmp_path: Path) -> None:
    """Means of inputs in the whole model, whose layers before are quantised: what bias correction takes."""
    folder = write(tmp_path, kind)
    layers = quantised(folder, "int4-row-bias", count=8)
    config, _ = opened(folder)
    assert [each.linear.path for each in layers] == [linear.path for linear in linears_of(config)]
    model = plain(folder, torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> None:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(
            lambda _, given: seen.update({path: seen.get(path, 0) + given[0].flatten(0, -2).sum(0)})
        )

    for each in layers:
        keep(each.linear.path)
    own = {each.linear.path: model.get_submodule(each.linear.path).weight.detach().clone() for each in layers}
    for number in range(2):  # a layer's inputs are seen before it is quantised itself, and after those before
        seen.clear()
        with torch.no_grad():
            for batch in rows(8):
                logits(model, batch.input_ids_BT, position_ids_BT=batch.position_ids_BT)
        for each in (each for each in layers if each.linear.layer == number):
            weight = own[each.linear.path].t() if kind == "gpt2" else own[each.linear.path]
            mean = seen[each.linear.path] / (8 * 32)
            expected = (weight - each.weight()) @ mean
            assert each.bias_change is not None
            torch.testing.assert_close(each.bias_change, expected, rtol=1e-3, atol=1e-5)
            walk.put(model.get_submodule(each.linear.path), each)


def test_each_compensation_helps(tmp_path: Path) -> None:
    """Divergence from the model in fp32, on other rows."""
    folder = write(tmp_path, "llama")
    reference = plain(folder, torch.float32)
    found = {}
    names = ("int3-g32", "int3-g32-gptq", "int3-g32-lr8", "int3-g32-affine", "int8-a8", "int8", "bf16")
    for name in names:
        model = plain(folder, torch.float32)
        for each in quantised(folder, name, count=16):
            walk.put(model.get_submodule(each.linear.path), each)
        found[name] = measure(reference, model, rows(24)[4:]).mean("kl").value
    assert found["int3-g32"] > 10 * found["int8"]
    assert found["int8-a8"] > found["int8"] > found["bf16"] > 0
    for name in ("int3-g32-gptq", "int3-g32-lr8", "int3-g32-affine"):
        assert found[name] < 0.9 * found["int3-g32"], found


def test_of_two_models_that_are_one(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama")
    model = plain(folder, torch.float32)
    same = measure(model, plain(folder, torch.float32), rows(8))
    assert (same.tokens, same.mean("same").value, same.snr) == (256, 1.0, float("inf"))
    assert abs(same.mean("kl").value) < 1e-7
    with torch.no_grad():
        for part in plain(folder, torch.float32).parameters():
            assert part.dtype == torch.float32
        losses = [
            torch.nn.functional.cross_entropy(
                logits(model, each.input_ids_BT, position_ids_BT=each.position_ids_BT).flatten(0, 1),
                each.labels_BT.flatten(),
            )
            for each in rows(8)
        ]
    assert same.mean("loss").value == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    changed = plain(folder, torch.float32)
    changed.lm_head.weight.data *= 1.1
    other = measure(model, changed, rows(8))
    assert other.mean("kl").value > 0
    assert other.change.value == pytest.approx(
        other.mean("other_loss").value - other.mean("loss").value, abs=1e-9
    )
    assert 0 < other.change.error < other.mean("other_loss").error + other.mean("loss").error
