"""Which of Adam's moments are stored in 8 bits with precision.state=8bit, and the bytes of moments and of the
update of each optimizer. No torch.

A parameter's *whole* shape decides, so that the state has the same format under every layout:

    vectors, fewer than SMALLEST elements, rows shorter than BLOCK     fp32
    rows that are a multiple of BLOCK                                  8 bits
    other rows                                                         refused
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hybridtrain.config.schema import Config
from hybridtrain.errors import refusal
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.registry import BUILT_IN
from hybridtrain.types import ModelFacts

BLOCK = 128
"""Elements of a row that share a scale."""
SMALLEST = 4096
"""Elements from which on a parameter has moments in 8 bits."""


def in_eight_bits(shape: Sequence[int]) -> bool:
    """Whether a parameter of this whole shape has moments in 8 bits."""
    return len(shape) > 1 and math.prod(shape) >= SMALLEST and shape[-1] >= BLOCK


def check_rows(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError for trained parameters (name -> whole shape) that precision.state=8bit cannot store."""
    chosen = {name: shape for name, shape in shapes.items() if in_eight_bits(shape)}
    bad = [name for name, shape in chosen.items() if shape[-1] % BLOCK]
    if bad:
        more = f", nor are those of {len(bad) - 1} other parameters" if len(bad) > 1 else ""
        row = shapes[bad[0]][-1]
        problem = f"the rows of {bad[0]} have {row:,} elements, which is no multiple of {BLOCK}{more}"
    elif not chosen:
        problem = f"no trained parameter has {SMALLEST:,} elements or more in rows of {BLOCK} or more"
    else:
        return
    allowed = f"models whose matrices have rows of a multiple of {BLOCK} elements"
    raise refusal("precision.state", "8bit", problem, allowed=allowed, instead="precision.state=bf16")


def compensated(config: Config) -> bool:
    """Whether each bf16 weight has 16 bits beside it, which keep what rounding cuts off."""
    precision = config.precision
    ours = config.optim.kind in BUILT_IN["optimizer"]
    return ours and precision.kind == "bf16_pure" and precision.rounding == "kahan"


def bytes_of_moments(config: Config, *, stored: int) -> float:
    """Bytes of the moments of a parameter in the format of precision.state; 0 for a registered optimizer,
    whose state is unknown.

    `stored`: those of a master weight. For 8 bits, as if all parameters had them: an error of a few
    thousandths for large models.
    """
    momentum = int(config.optim.momentum > 0)
    # Of muon at most: matrices inside layers have one.
    count = {"adamw": 2, "muon": 2, "lion": 1, "sgd": momentum, "adafactor": momentum}.get(
        config.optim.kind, 0
    )
    return count * {"auto": stored, "fp32": 4, "bf16": 2, "8bit": 1 + 4 / BLOCK}[config.precision.state]


def bytes_of_factors(config: Config, *, facts: ModelFacts, layers: range) -> int:
    """Bytes of adafactor's numbers for rows and columns of the matrices of a stage, whole on every rank; 0
    for others. Layers of another kind than llama's count by their size.
    """
    if config.optim.kind != "adafactor":
        return 0
    hidden, queries, keys = facts.hidden, facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    sides = [queries, queries, keys, keys, facts.ffn, facts.ffn, facts.ffn]
    share = sum(hidden + side for side in sides) / (hidden * sum(sides))
    numbers = share * sum(facts.parameters_of_layers[layers.start : layers.stop])
    first, last = layers.start == 0, layers.stop == facts.layers
    numbers += first * (facts.vocab + hidden)
    numbers += (last and not (first and facts.tied)) * (facts.outputs + hidden)
    return math.ceil(numbers) * _computed(config)


def bytes_of_update(
    config: Config, *, layout: ParallelLayout, facts: ModelFacts, ends: Sequence[range]
) -> int:
    """Bytes that muon and adafactor need at least during an update, besides the state: one matrix is made
    orthogonal at a time while the parts of others wait (muon.py); one update is computed at a time, with
    momentum beside it. `ends`: the layers of a rank's stages.
    """
    kind, hidden = config.optim.kind, facts.hidden
    experts = max(facts.layer_inactive, default=0) // 2  # at least: of two or three matrices of each
    matrix = max(hidden * max(facts.ffn, facts.heads * facts.head_dim), experts)
    if kind == "muon":
        # Of the matrices that are exchanged together, three are as large: gate, up and down.
        copies, alone = min(3, layout.dp_replicate), layout.dp * layout.tp == 1
        return _computed(config) * matrix * (5 if alone else max(copies + 5, 3 * copies + 1))
    if kind == "adafactor":
        first, last = ends[0].start == 0, ends[-1].stop == facts.layers
        largest = max(matrix, first * facts.vocab * hidden, last * facts.outputs * hidden)
        tensors = 3 if config.optim.momentum else 1
        return tensors * _computed(config) * largest // (layout.dp_shard * layout.tp)
    return 0


def _computed(config: Config) -> int:
    """Bytes of a number in an update."""
    return 8 if config.precision.kind == "fp64" else 4
