"""Peak FLOP/s of GPUs from NVIDIA's data sheets. No torch."""

from __future__ import annotations

# Dense peaks in TFLOP/s (half of figures with sparsity): bf16/fp16, tf32, fp32.
# A name matches if all its words are in the device's name; the first match counts, so longer names come
# first.
# GeForce: with fp32 accumulation, which torch uses.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("GB300", 2500, 1250, 80),
    ("GB200", 2500, 1250, 80),
    ("B300", 2250, 1100, 75),
    ("B200", 2250, 1100, 75),
    ("GH200", 989.4, 494.7, 66.9),
    ("H200 NVL", 835.5, 417.5, 60),
    ("H200", 989.4, 494.7, 66.9),
    ("H100 PCIe", 756, 378, 51),
    ("H100 NVL", 835.5, 417.5, 60),
    ("H100", 989.4, 494.7, 66.9),
    ("H800", 989.4, 494.7, 66.9),
    ("H20", 148, 74, 44),
    ("A100", 312, 156, 19.5),
    ("A800", 312, 156, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("A30", 165, 82, 10.3),
    ("A10G", 70, 35, 35),
    ("A10", 125, 62.5, 31.2),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("L4", 121, 60, 30.3),
    ("V100", 125, 15.7, 15.7),
    ("T4", 65, 8.1, 8.1),
    ("RTX 6000 Ada", 364, 182, 91.1),
    ("RTX A6000", 154.8, 77.4, 38.7),
    ("RTX 5090", 209.5, 104.8, 104.8),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71.2, 35.6, 35.6),
)


def peak_of(name: str, *, dtype: str, tf32: bool) -> float | None:
    """Dense peak in FLOP/s of the GPU called `name` for matrix products in `dtype` (torch's
    name); None if unknown.

    `tf32`: fp32 products use TF32 tensor cores. MIG slices and laptop GPUs are unknown.
    """
    words = name.replace("-", " ").split()
    if "MIG" in words or "Laptop" in words:
        return None
    for known, half, tensor, single in _PEAKS:
        if set(known.split()) <= set(words):
            rates = {"bfloat16": half, "float16": half, "float32": tensor if tf32 else single}
            return rates[dtype] * 1e12 if dtype in rates else None
    return None
