"""The updates of adamw, lion and sgd, element by element in fp32, and the moments that each keeps.

    adamw   w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)     arXiv 1711.05101
            m, v: means of g and g^2
    lion    w - lr (sign(b1 m + (1 - b1) g) + decay w)                           arXiv 2302.06675
            m: b2 m + (1 - b2) g
    sgd     w - lr (m + decay w), nesterov: g + momentum m in the place of m
            m: momentum m + g; without momentum g itself

Weight decay is decoupled in all three: a share of lr x decay of each weight, apart from the moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hybridtrain.config.schema import OptimConfig

Moments = tuple[Tensor, ...]
Element = Callable[[Tensor, Tensor, Moments], tuple[Tensor, Moments]]
"""(weights, gradients, moments) -> (weights, moments) after the update; fp32, of one shape."""


def moments_of_kind(settings: OptimConfig) -> Sequence[str]:
    """Names in checkpoints of what a built-in optimizer keeps for each weight, in the format of
    precision.state.
    """
    if settings.kind in ("sgd", "adafactor"):
        return (("momentum",) if settings.kind == "sgd" else ("exp_avg",)) if settings.momentum else ()
    return {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "muon": ("momentum",)}[settings.kind]


def element(settings: OptimConfig, *, step: Tensor, lr: float, decay: float) -> Element:
    """The update of optim.kind. `step`: updates with this one, 0-d fp32."""
    return {"adamw": _adamw, "lion": _lion, "sgd": _sgd}[settings.kind](settings, step, lr, decay)


def _adamw(settings: OptimConfig, step: Tensor, lr: float, decay: float) -> Element:
    beta1, beta2 = settings.betas
    # in double precision, as in torch: in fp32, 1 - 0.999 is off by 6e-5
    rate = lr / (1 - beta1 ** step.double())
    root = (1 - beta2 ** step.double()).sqrt()

    def updated(old: Tensor, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        first, second = moments
        first = first.lerp(gradient, 1 - beta1)
        second = (second * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        kept, speed = root.to(old.dtype), rate.to(old.dtype)
        value = old - (first / (second.sqrt() / kept + settings.eps) * speed + old * (lr * decay))
        return value, (first, second)

    return updated


def _lion(settings: OptimConfig, step: Tensor, lr: float, decay: float) -> Element:  # noqa: ARG001
    beta1, beta2 = settings.betas

    def updated(old: Tensor, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        (mean,) = moments
        direction = mean.lerp(gradient, 1 - beta1).sign()
        return old - (direction * lr + old * (lr * decay)), (mean.lerp(gradient, 1 - beta2),)

    return updated


def _sgd(settings: OptimConfig, step: Tensor, lr: float, decay: float) -> Element:  # noqa: ARG001
    def updated(old: Tensor, gradient: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
        direction, now = gradient, moments
        if moments:
            now = (moments[0] * settings.momentum + gradient,)
            direction = gradient + now[0] * settings.momentum if settings.nesterov else now[0]
        return old - (direction * lr + old * (lr * decay)), now

    return updated
