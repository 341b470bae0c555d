"""Which formats a device computes, and which are emulated.

format                          kernel                         on
fp8_tensorwise, fp8_rowwise     torch._scaled_mm               GPUs of compute capability 8.9 (Ada, Hopper)
fp16, bf16                      torch's own products           all; bf16 on GPUs from 8.0 (Ampere)
tf32                            torch's own fp32 products      GPUs from 8.0
mxfp8, int8                     none yet: emulated
qat_int8, qat_int4              torch's own products with rounded weights
"""

from __future__ import annotations

import torch

from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.errors import refusal
from hybridtrain.plan.formats import CARRIERS, FORMATS, HIGH, SCHEMES
from hybridtrain.precision.rules import names_of

_FP8, _AMPERE, _HOPPER = (8, 9), (8, 0), 9
_KERNELS = ("fp8_tensorwise", "fp8_rowwise")
KERNEL_MULTIPLE = 16
"""Of which the sizes of an fp8 product have to be multiples."""


def is_native(name: str, device: torch.device) -> bool:
    """Whether the device has a kernel of its own for a format with scales."""
    return name in _KERNELS and device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8


def is_emulated(name: str, precision: PrecisionConfig, *, device: torch.device) -> bool:
    """Whether a format that a kernel could multiply in is computed with rounded operands; never HIGH."""
    if name in SCHEMES:
        return False
    native = name in CARRIERS.values() or is_native(name, device)
    return name != HIGH and (precision.emulate or not native)


def check(precision: PrecisionConfig, *, device: torch.device, tokens: int) -> None:
    """Refuse formats that the device does not have, unless they are to be emulated (raises UserError).
    `tokens`: of a micro-batch.

    On a CPU the formats of 8 bits are emulated always: it is where recipes are tried out.
    """
    gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if gpu else (0, 0)
    kind, emulate = precision.kind, precision.emulate
    if kind == "tf32" and not emulate and capability < _AMPERE:
        where = "this GPU" if gpu else "a CPU"
        raise refusal(
            "precision.kind",
            kind,
            f"{where} has no TF32",
            allowed="GPUs from compute capability 8.0",
            instead="precision=fp32, or precision.emulate=true, which rounds the operands, slowly",
        )
    if gpu and CARRIERS[kind] == "bf16" and capability < _AMPERE:
        raise refusal(
            "precision.kind",
            kind,
            f"this GPU (compute capability {capability[0]}.{capability[1]}) has no bf16",
            allowed="GPUs from compute capability 8.0",
            instead="precision=fp16_mixed",
        )
    if gpu and capability[0] != _HOPPER and CARRIERS[kind] != "bf16" and not emulate:
        _check_rowwise(precision)
    for name in sorted(names_of(precision)):
        if is_native(name, device) and not emulate:
            check_sizes("*", name, multiple=KERNEL_MULTIPLE, **{"tokens of a micro-batch": tokens})
        scaled = FORMATS[name].scale and name not in SCHEMES
        if gpu and scaled and not emulate and not is_native(name, device):
            known = name in _KERNELS
            raise refusal(
                "precision.compute",
                name,
                f"this GPU (compute capability {capability[0]}.{capability[1]}) has no fp8"
                if known
                else "there is no kernel for it on GPUs yet",
                allowed="fp8 on GPUs from compute capability 8.9" if known else ", ".join(_KERNELS),
                instead="precision.emulate=true, which is slow, or precision=bf16_mixed",
            )


def _check_rowwise(precision: PrecisionConfig) -> None:
    """torch's row-wise kernel writes bf16 alone, but on Hopper."""
    if "fp8_rowwise" in names_of(precision):
        raise refusal(
            "precision.compute",
            "fp8_rowwise",
            f"this GPU's kernel gives bf16, and precision.kind={precision.kind} exchanges "
            f"{CARRIERS[precision.kind]}",
            allowed="fp8_tensorwise, or a precision.kind with bf16",
            instead="precision=fp8_rowwise, which has precision.kind=bf16_mixed",
        )


def check_sizes(path: str, name: str, *, multiple: int, **sizes: int) -> None:
    """Refuse a layer whose sizes do not fit a format (raises UserError). `sizes`: of this rank."""
    for what, size in sizes.items():
        if size % multiple:
            raise refusal(
                "precision.compute",
                name,
                f"{path}: {size} {what} on a rank are no multiple of {multiple}",
                allowed=f"multiples of {multiple}",
                instead=f"precision.rules=[{{match: '{path}', compute: high}}]",
            )
