"""The dtypes of each precision.kind.

    kind         parameters  compute  gradient reduction, accumulation
    fp64         fp64        fp64     fp64
    fp32, tf32   fp32        fp32     fp32
    bf16_mixed   fp32        bf16     fp32
    fp16_mixed   fp32        fp16     fp32
    bf16_pure    bf16        bf16     fp32, then cast to bf16

Parameters are the master weights. RMS norms, softmax and the loss compute in fp32 or fp64 with every kind
(the models' own modules and the task's loss upcast). Linear layers may multiply in narrower formats
(rules.py), which says too whether there is a loss scale. Mixed Precision Training: arXiv:1710.03740.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from hybridtrain.config.schema import PrecisionConfig


@dataclass(frozen=True)
class PrecisionPolicy:
    param: torch.dtype
    """dtype of parameters (the master weights) and optimizer state."""
    compute: torch.dtype
    """dtype of forward and backward."""
    reduce: torch.dtype
    """dtype in which gradients are reduced over data ranks and accumulated over micro-batches."""

    def fsdp(self) -> MixedPrecisionPolicy:
        """The FSDP2 policy, which does all casts on engine=torch."""
        return MixedPrecisionPolicy(
            param_dtype=self.compute if self.compute != self.param else None,
            reduce_dtype=self.reduce if self.reduce != self.compute else None,
        )


_KINDS = {
    "fp64": PrecisionPolicy(torch.float64, torch.float64, torch.float64),
    "tf32": PrecisionPolicy(torch.float32, torch.float32, torch.float32),
    "fp32": PrecisionPolicy(torch.float32, torch.float32, torch.float32),
    "bf16_mixed": PrecisionPolicy(torch.float32, torch.bfloat16, torch.float32),
    "fp16_mixed": PrecisionPolicy(torch.float32, torch.float16, torch.float32),
    "bf16_pure": PrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.float32),
}


def policy(precision: PrecisionConfig) -> PrecisionPolicy:
    """The dtypes of a config (config/checks.py refuses unknown kinds)."""
    return _KINDS[precision.kind]
