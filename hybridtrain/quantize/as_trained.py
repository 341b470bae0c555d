"""compare.as_trained: a run's export whose linear layers multiply as they did in training.

Weights are cast to the dtype in which the run computed, and the operands of each linear layer are rounded to
the format that precision.compute and precision.rules gave it; with adaptive precision, that of the checkpoint
that was exported. Formats are emulated on every device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridtrain.checkpoint import export_record, marker
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config import compose
from hybridtrain.config.schema import CheckpointConfig, PrecisionConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models.linears import Linear, linears_of
from hybridtrain.parallel.convert import adaptive_of
from hybridtrain.plan.formats import FORMATS, HIGH
from hybridtrain.precision.policy import policy
from hybridtrain.precision.qlinear import Product, convert
from hybridtrain.precision.rules import described, format_of, high_if_same, names_of
from hybridtrain.quantize.source import Source
from hybridtrain.training.adapting import STATE
from hybridtrain.training.callbacks import stored_state

FIELD = "compare.as_trained"


def check(run: Path | None, source: str) -> PrecisionConfig:
    """How the run trained. `run`: None for a source that is none. Raises UserError for one without formats
    of its own for linear layers.
    """
    if run is None or not (run / "config.yaml").is_file():
        raise _refused(f"{source} is no run, so that it is not known how it was trained")
    config = compose.read_run(run / "config.yaml")
    if not names_of(config.precision):
        kind = config.precision.kind
        raise _refused(f"all linear layers of {source} multiplied in precision.kind={kind}, as served")
    if config.adapters.kind != "none":
        raise _refused(f"{source} trained adapters, whose products are not those of its export")
    return config.precision


def _refused(problem: str) -> UserError:
    allowed = "a run with precision.compute or precision.rules, such as precision=fp8_tensorwise"
    return refusal(FIELD, "true", problem, allowed=allowed, instead=f"{FIELD}=false")


class AsTrained:
    """The formats of a run's linear layers, and the model that has them."""

    def __init__(self, run: Path, source: Source, precision: PrecisionConfig):
        """`source`: the run's export. Raises UserError for formats that are not known any more."""
        self.precision = precision
        self.formats = _formats(run, source, precision)
        self.name = f"as trained, {described(self.precision)}"

    def of(self, served: Any) -> Any:
        """A copy of the export's model that multiplies so."""
        model = copy.deepcopy(served)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(policy(self.precision).compute)
        for path, name in self.formats.items():
            module = model.get_submodule(path)
            assert "forward" not in vars(module), f"{path} has a forward of its own, which stays"
            convert(module, Product(FORMATS[name], "", None, native=False))
        return model


def _formats(run: Path, source: Source, precision: PrecisionConfig) -> Mapping[str, str]:
    """Path -> format, of the linear layers that are not high."""

    def name(linear: Linear) -> str:
        return high_if_same(adapted.get(linear.path, format_of(linear, precision)), precision)

    adapted: Mapping[str, str] = {}
    if (controller := adaptive_of(precision, source.built)) is not None:
        controller.adopt(stored_state(_states(run, source.folder), STATE))
        adapted = controller.formats()
    linears = linears_of(source.built)  # experts in one parameter multiply as all else does
    return {linear.path: each for linear in linears if (each := name(linear)) != HIGH}


def _states(run: Path, export: str) -> Mapping[str, Any]:
    """The small states of the checkpoint that was exported."""
    step = export_record.step_of(Path(export))
    folder = Manager(run / "checkpoints", settings=CheckpointConfig()).path(step or 0)
    if step is None or not marker.is_complete(folder):
        raise _refused(
            f"its layers adapted, and their formats are in the checkpoint of step {step}, which is not there"
        )
    return marker.read_progress(folder).states
