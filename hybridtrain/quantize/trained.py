"""The schemes to which quantisation-aware training has rounded weights: an export records them, and
`hybridtrain quantize` stores them, so that the folder has the very weights that training multiplied by.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hybridtrain.checkpoint import export_record
from hybridtrain.models.init import Slices, WeightSource
from hybridtrain.models.linears import Linear
from hybridtrain.quantize import schemes
from hybridtrain.quantize.plan import Plan, check_paths
from hybridtrain.runtime import log

_log = log.get("quantize")


@dataclass(frozen=True)
class Trained:
    """What an export records."""

    plan: Plan
    """The scheme of each layer whose weights were rounded."""
    dtype: torch.dtype
    """To which they were cast before, the one that computes."""

    @property
    def stored(self) -> torch.dtype:
        """In which the codes stand for the numbers of training: fp32 for fp64, which folders do not have."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    def weights(self, base: WeightSource) -> WeightSource:
        """The weights of the export, with those of the plan as training cast them."""
        names = {f"{path}.weight" for path in self.plan}

        def part(name: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
            found = base(name, shape, slices)
            return found.to(self.dtype).to(found.dtype) if name in names else found

        return part

    def is_plan(self, plan: Plan) -> bool:
        """Whether a plan has the same schemes, by whatever names."""
        return {path: _nameless(scheme) for path, scheme in plan.items()} == {
            path: _nameless(scheme) for path, scheme in self.plan.items()
        }

    def say(self, plan: Plan) -> None:
        """Log that the schemes of training are taken, or warn that others are."""
        counts = Counter(scheme.name for scheme in self.plan.values())
        trained = ", ".join(f"{name} in {count} linear layers" for name, count in counts.items())
        if self.is_plan(plan):
            _log.info("scheme    %s, to which training rounded the weights", trained)
        else:
            others = ", ".join(sorted({scheme.name for scheme in plan.values()}))
            _log.warning(
                "the weights were trained to be stored as %s: with %s they are rounded to values that they "
                "were not trained for",
                trained,
                others,
            )


def of_source(source: str, linears: Sequence[Linear], *, field: str) -> Trained | None:
    """What the export in a folder records; None for other folders and models trained without.

    Warns of an export in fewer bits than training rounded. Raises UserError for layers that the model does
    not have, and unknown schemes.
    """
    record = export_record.rounded_in(Path(source), field=field)
    if record is None:
        return None
    check_paths(record["layers"], linears, field=field, value=source)
    plan = {path: schemes.parse(str(name), field=field) for path, name in record["layers"].items()}
    written, computes = record["written"], record["dtype"]
    if written not in ("float32", computes):
        _log.warning(
            "the export is in %s, and training rounded weights in %s: some codes may differ from those of "
            "training; export.dtype=float32 keeps them",
            written,
            computes,
        )
    return Trained(plan, getattr(torch, computes))


def _nameless(scheme: schemes.Scheme) -> schemes.Scheme:
    return dataclasses.replace(scheme, name="")
