"""Options of the optimizer and of its learning rate."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from hybridtrain.config.options import Options, options


@options
class OptimConfig(Options):
    kind: str = "adamw"
    """Optimizer: adamw, adafactor, lion, muon, sgd, or one that a module of run.plugins registers."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """adamw, lion: decay rates of the moments; of lion, the first is that of the direction. muon: AdamW's."""
    eps: float = 1e-8
    """adamw, muon: AdamW's epsilon. A registered optimizer reads it as config.eps."""
    momentum: float = 0.9
    """sgd: decay rate of the sum of gradients; 0: no momentum, and no state. muon: of their mean.
    adafactor: of a mean of the updates; 0: none."""
    nesterov: bool = False
    """sgd, muon: look a step ahead (Nesterov's momentum)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, for matrices not matched by no_decay."""
    no_decay: list[str] = field(default_factory=lambda: ["*norm*", "*.bias"])
    """Shell-style patterns of parameter names without weight decay."""
    rules: list[dict[str, Any]] = field(default_factory=list)
    """Exceptions, e.g. [{match: "*.embed_tokens.*", lr: 1e-4, weight_decay: 0}]: shell-style patterns of
    parameter names, each with its own peak learning rate, weight decay or both. The first that matches
    counts."""
    clip: float = 1.0
    """Clip the global gradient norm to this; 0: do not clip."""
    ema: float = 0.0
    """Decay of an average of the weights, which is kept in fp32 beside them and exported by
    export.weights=ema, e.g. 0.999; 0: none. It has a smaller one in the first steps."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a registered optimizer (config.options in its function), e.g. {momentum: 0.9}."""


@options
class ScheduleConfig(Options):
    kind: str = "cosine"
    """Learning-rate schedule after warm-up: constant, linear, cosine, wsd (warm-up, stable, decay), or one
    that a module of run.plugins registers."""
    warmup_steps: int = 0
    """Steps of linear warm-up to optim.lr."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of optim.lr (linear, cosine, wsd)."""
    decay_steps: int = 0
    """wsd: steps of the final decay; 0: a tenth of the run."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a registered schedule (config.options in its function)."""
