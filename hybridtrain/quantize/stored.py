"""How quantised layers are written: in the format of a library, with which transformers loads them.

compressed-tensors  all but e5m2; vLLM loads it too. It packs the codes and describes them in config.json
                    (extra `quantize`)
torchao             8-bit floats, of which only it has e5m2 (floats8.py; extra `torchao`)

Of compressed-tensors:

    weight_packed       integers of 2 to 8 bits in int32 words, or two 4-bit floats in a byte
    weight              8-bit codes, where inputs have 8 bits too
    weight_scale        in bf16; of nvfp4 in e4m3, of mxfp4 the exponent in a byte
    input_scale         of inputs with one scale
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybridtrain.errors import UserError, install, refusal
from hybridtrain.plan.formats import E4M3
from hybridtrain.quantize import experts, floats8
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.walk import Quantised

WRITTEN = (
    "bf16, fp16; int2, int3, int4, int8, fp8_e4m3, fp8_e5m2, nvfp4, mxfp4, also -tensor, -row, -gN, -gptq; "
    "-a8 and -a8s with int8 and fp8_e4m3"
)
EXPERTS = r"re:.*\.experts\..*"
_CAST: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NF4 = (
    "nf4 is stored by bitsandbytes alone, which multiplies in kernels of its own: on CPUs with AVX512-BF16 "
    "the logits are others than those of the weights that it stores"
)


def check(schemes: Iterable[Scheme], *, field: str, transposed: bool) -> None:
    """Refuse schemes that no folder can hold as they are, or not beside one another (raises UserError)."""
    chosen = sorted(set(schemes), key=lambda scheme: scheme.name)
    for scheme in chosen:
        _check(scheme, field=field, transposed=transposed)
    torchao = next((scheme for scheme in chosen if scheme.codes == "e5m2"), None)
    other = next((scheme for scheme in chosen if scheme.share and not floats8.holds(scheme)), None)
    if torchao and other:
        raise refusal(
            field,
            f"{torchao.name}, {other.name}",
            f"{torchao.name} is stored by torchao, {other.name} by compressed-tensors: a folder has one "
            "format",
            allowed="fp8_e5m2 beside fp8_e4m3 and layers without codes",
            instead="fp8_e4m3 in the place of fp8_e5m2",
        )


def _check(scheme: Scheme, *, field: str, transposed: bool) -> None:
    problem = ""
    if scheme.codes == "nf4":
        problem = _NF4
    elif scheme.codes == "codebook" or (scheme.bits == 16 and scheme.codes == "int"):
        problem = f"no format has {scheme.name.partition('-')[0]}"
    elif scheme.affine or scheme.rank or scheme.bias:
        problem = "zero points, products that are added and changed biases are not stored"
    elif scheme.codes == "e5m2" and scheme.inputs:
        problem = "torchao rounds inputs on GPUs alone"
    elif transposed and scheme.share:
        problem = "the model stores weights transposed, as GPT-2, which the formats do not know"
    if problem:
        raise refusal(
            field,
            scheme.name,
            f"{problem}: hybridtrain compare can study it",
            allowed=WRITTEN,
            instead=f"{field}=bf16" if transposed else f"{field}=int4-g32-gptq",
        )


def check_layout(meta: nn.Module, source: str, *, field: str) -> None:
    """Refuse a model (on meta) whose experts files do not hold as a matrix each (raises UserError)."""
    if name := experts.unknown(meta):
        raise refusal(
            field,
            source,
            f"{name} holds the weights of all experts in one parameter, in files too",
            allowed="models whose files hold a matrix for each expert",
            instead="hybridtrain compare, which studies the linear layers beside them",
        )


def check_experts(plan: Mapping[str, Scheme | None], dtype: str, *, field: str) -> None:
    """Refuse experts that transformers would load as others (raises UserError). `plan`: path of the experts
    of a layer -> their scheme, None: without codes.
    """
    chosen = sorted({each.name if each and each.share else "" for each in plan.values()})
    scheme = next((each for each in plan.values() if each and each.share), None)
    if scheme is None:
        return
    problem, instead = "", "int4-g32-gptq"
    if len(chosen) > 1:
        problem = (
            f"experts of other layers are in {chosen[0] or 'no codes'}: transformers reads all in one scheme"
        )
        instead = f"{scheme.name} for all"
    elif scheme.codes in ("nvfp4", "e5m2") or scheme.inputs:
        problem = "transformers does not read experts in it"
        instead = "int8, or a plan (quantize.plan) with another scheme for experts"
    elif dtype != "bfloat16":
        problem = f"transformers computes the weights of experts in bfloat16, the rest would be in {dtype}"
        instead = "quantize.dtype=bfloat16"
    if problem:
        allowed = "for experts int2, int3, int4, int8, fp8_e4m3, mxfp4, without -a8; one scheme for all"
        raise refusal(field, scheme.name, problem, allowed=allowed, instead=instead)


def cast(scheme: Scheme) -> torch.dtype | None:
    """The dtype of a scheme that only casts."""
    return _CAST.get(scheme.codes)


def name_of(dtype: torch.dtype) -> str:
    """The scheme that casts to a dtype; empty: none."""
    return next((name for name, each in _CAST.items() if each == dtype), "")


def check_cast(scheme: Scheme, rest: str, *, field: str) -> None:
    """Refuse to store a layer in another format than `rest`, that of all others without codes (UserError)."""
    if scheme.name != rest:
        raise refusal(
            field,
            scheme.name,
            f"all layers without codes are in one dtype, {rest or 'float32'}",
            allowed=rest or "codes",
            instead=f"quantize.dtype={_CAST[scheme.codes]}".replace("torch.", ""),
        )


class Format(Protocol):
    """Writes layers of the schemes of a model."""

    metadata: Mapping[str, str]
    """Of each safetensors file."""

    def description(self, schemes: Mapping[str, Scheme], *, ignored: Iterable[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. `schemes`: path of a linear layer -> its scheme; `ignored`:
        paths of other linear layers.
        """

    def tensors(self, layer: Quantised) -> dict[str, Tensor]:
        """Name inside the layer -> what is stored of it, without its bias."""


def format_of(
    schemes: Mapping[str, Scheme], meta: nn.Module, *, dtype: torch.dtype, field: str
) -> Format | None:
    """The format of a model (on meta) in these schemes, all with codes; None: of none. `dtype`: of its other
    weights. Raises UserError if its library is not installed.
    """
    if not schemes:
        return None
    e5m2 = next((scheme.name for scheme in schemes.values() if scheme.codes == "e5m2"), "")
    module, extra = ("torchao", "torchao") if e5m2 else ("compressed_tensors", "quantize")
    if importlib.util.find_spec(module) is None:
        raise refusal(
            field,
            e5m2 or next(iter(schemes.values())).name,
            f"the package {module.replace('_', '-')}, in whose format it is stored, is not installed here",
            allowed="bf16 and fp16 without it",
            instead=install(extra),
        )
    return floats8.Format(schemes, meta, dtype=dtype) if e5m2 else _CompressedTensors()


class _CompressedTensors:
    metadata: Mapping[str, str] = {}

    def __init__(self) -> None:
        import compressed_tensors.compressors
        import compressed_tensors.quantization

        self._library: Any = compressed_tensors

    def description(self, schemes: Mapping[str, Scheme], *, ignored: Iterable[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. `schemes`: path of a linear layer -> its scheme; `ignored`:
        paths of other linear layers.
        """
        quantization = self._library.quantization
        by_scheme: dict[Scheme, list[str]] = {}
        for path, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(path)
        groups = {}
        for number, (scheme, paths) in enumerate(by_scheme.items()):
            group = self._scheme(scheme, _targets(paths) if len(by_scheme) > 1 else ["Linear"])
            group.format = self._format(group)
            groups[f"group_{number}"] = group
        formats = {group.format for group in groups.values()}
        config = quantization.QuantizationConfig(
            config_groups=groups,
            ignore=sorted(ignored),
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status="compressed",
        )
        return {**config.model_dump(mode="json"), "version": self._library.__version__}

    def tensors(self, layer: Quantised) -> dict[str, Tensor]:
        """Name inside the layer -> what is stored of it, without its bias."""
        assert layer.grid is not None
        group = self._scheme(layer.scheme, ["Linear"])
        compressor = self._library.compressors.BaseCompressor.get_value_from_registry(self._format(group))
        given = {"weight": layer.weight(), **_scales(layer)}
        stored = compressor.compress(given, group)
        if layer.input_scale is not None:
            stored["input_scale"] = layer.input_scale.reshape(1).bfloat16()
        return {name: value.data.cpu() for name, value in stored.items() if isinstance(value, Tensor)}

    def _format(self, group: Any) -> str:
        return str(self._library.compressors.format.infer_module_format(nn.Linear, group).value)

    def _scheme(self, scheme: Scheme, targets: Sequence[str]) -> Any:
        quantization = self._library.quantization
        floats = scheme.codes != "int"
        strategy = {"tensor": "tensor", "row": "channel", "group": "group"}[scheme.share]
        strategy = "tensor_group" if scheme.codes == "nvfp4" else strategy
        weights = quantization.QuantizationArgs(
            num_bits=scheme.bits,
            type="float" if floats else "int",
            symmetric=True,
            strategy=strategy,
            group_size=scheme.group or None,
            **({"scale_dtype": torch.float8_e4m3fn} if scheme.codes == "nvfp4" else {}),
            **({"scale_dtype": torch.uint8} if scheme.codes == "mxfp4" else {}),
        )
        inputs = None
        if scheme.inputs:
            one = scheme.inputs != "token"
            inputs = quantization.QuantizationArgs(
                num_bits=8,
                type="float" if floats else "int",
                symmetric=True,
                strategy="tensor" if one else "token",
                dynamic=not one,
            )
        return quantization.QuantizationScheme(
            targets=list(targets), weights=weights, input_activations=inputs
        )


def _targets(paths: Sequence[str]) -> list[str]:
    """What names the layers: those of experts, in one scheme, by the pattern that transformers looks for."""
    return list(dict.fromkeys(EXPERTS if path.endswith(".experts") else path for path in paths))


def _scales(layer: Quantised) -> dict[str, Tensor]:
    """As the package takes them."""
    assert layer.grid is not None
    scale = layer.grid.scale_NG
    if layer.scheme.codes == "nvfp4":
        whole = _whole(scale)
        return {"weight_scale": scale / whole, "weight_global_scale": (1 / whole).reshape(1)}
    if layer.scheme.codes == "mxfp4":
        return {"weight_scale": scale}
    return {"weight_scale": (scale.reshape(1) if layer.scheme.share == "tensor" else scale).bfloat16()}


def _whole(scale: Tensor) -> Tensor:
    """The scale of scales in e4m3, of which the largest is as large as these can be."""
    return scale.max() / E4M3.largest


def already(source: str, *, field: str) -> UserError:
    """The refusal of a quantised folder as a source."""
    return refusal(
        field,
        source,
        "its weights are quantised already, and would lose twice",
        allowed="weights in float32, bfloat16 or float16",
        instead="the folder that it was made from",
    )
