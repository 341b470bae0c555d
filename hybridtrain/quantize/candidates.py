"""What `hybridtrain compare` compares with its reference, one model after the other."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridtrain import evaluate
from hybridtrain.config.quantize import AUTOCAST
from hybridtrain.config.schema import CompareRoot, ModelConfig
from hybridtrain.errors import refusal
from hybridtrain.evaluate import quantised
from hybridtrain.models import hub, weights
from hybridtrain.plan.formats import NUMBERS
from hybridtrain.quantize import as_trained, schemes, table, walk
from hybridtrain.quantize import plan as plans
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.source import Source
from hybridtrain.quantize.walk import Quantised
from hybridtrain.types import Batch

SOURCES, SCHEMES, DTYPES = "compare.sources", "compare.schemes", "compare.dtypes"
ROWS = "compare.calibration_rows"
EMULATED = "emulated here: no speed"


@dataclass(frozen=True)
class Candidate:
    """A model that is compared."""

    name: str
    model: Any
    bytes: int
    """Of its weights, as stored."""
    layers: Sequence[Quantised]
    """Its quantised linear layers."""
    product: str
    """What multiplies, in words."""
    timed: bool
    """Whether the time that it takes is that of a model in use."""


def loaded(name: str, folder: str, *, trust_remote_code: bool) -> Candidate:
    """The model of a folder or hub id."""
    model = evaluate.load_model(folder, field=SOURCES, trust_remote_code=trust_remote_code)
    method = quantised.method(model)
    dtype = dtype_of(model)
    product = f"{dtype} product"
    if quantised.is_dequantised(model):
        product = f"dequantised when loaded, {dtype} product: only the files are smaller"
    elif method:
        product = f"{method}'s own product"
    files = hub.weights_folder(ModelConfig(from_pretrained=folder)) if method else Path()
    in_files = method != "" and weights.has_weights(files)
    stored = weights.stored_bytes(files) if in_files else parameter_bytes(model)
    return Candidate(name, model, stored, [], product, timed=True)


def parameter_bytes(model: Any) -> int:
    """Tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def dtype_of(model: Any) -> str:
    """The name of the dtype of most of a model's parameters."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    name = str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")
    return next((each.name for each in NUMBERS.values() if each.dtype == name), name)


class Candidates:
    """All but the reference, in the order of their options; made one at a time."""

    def __init__(
        self, config: CompareRoot, names: Sequence[str], folders: Sequence[str], *, run: Path | None
    ):
        """`names` of the sources, and the folders that they are; `run`: the run that the first one is.
        Raises UserError, as far as no model is needed to see it.
        """
        self.options, self.trusts = config.compare, config.model.trust_remote_code
        self.others = list(zip(names, folders, strict=True))[1:]
        self.schemes = [schemes.parse(name, field=SCHEMES) for name in self.options.schemes]
        trains = self.options.as_trained
        precision = as_trained.check(run, names[0]) if trains else None
        self.trained: as_trained.AsTrained | None = None
        if self.schemes or trains:
            self.source = Source(folders[0], trust_remote_code=self.trusts, field=SOURCES)
        if precision is not None and run is not None:
            self.trained = as_trained.AsTrained(run, self.source, precision)
        for name in self.options.dtypes:
            if name in AUTOCAST:
                _check_autocast(name)

    @property
    def calibrate(self) -> bool:
        """Whether a scheme looks at the inputs of layers."""
        return any(scheme.calibrates for scheme in self.schemes)

    def check(self, calibration: Sequence[Batch]) -> None:
        """Refuse schemes that do not fit the reference (raises UserError)."""
        tokens = sum(batch.input_ids_BT.numel() for batch in calibration)
        for scheme in self.schemes:
            choose = plans.choice(plans.uniform(scheme, self.source.linears))
            walk.check(self.source.linears, choose, tokens=tokens, field=SCHEMES, rows_field=ROWS)

    def made(self, own: Candidate, *, calibration: Sequence[Batch]) -> Iterator[Candidate]:
        """`own`: the reference. With calibration rows, the errors of all schemes are measured on them."""
        for name, folder in self.others:
            yield loaded(name, folder, trust_remote_code=self.trusts)
        for name in self.options.dtypes:
            yield _autocast(own, name) if name in AUTOCAST else _cast(own, name)
        if self.trained is not None:
            model = self.trained.of(own.model)
            yield Candidate(self.trained.name, model, own.bytes, [], EMULATED, timed=False)
        for scheme in self.schemes:
            yield self._scheme(own, scheme, calibration)

    def _scheme(self, own: Candidate, scheme: Scheme, calibration: Sequence[Batch]) -> Candidate:
        changed, layers = copy.deepcopy(own.model), []
        for found in walk.layers(
            self.source.built,
            self.source.weights,
            plans.choice(plans.uniform(scheme, self.source.linears)),
            rows=calibration,
            device=own.model.device,
            field=SCHEMES,
        ):
            for each in found:
                walk.place(changed, each)
            layers += found
        stored = table.stored_bytes(own.model, layers)
        return Candidate(scheme.name, changed, stored, layers, EMULATED, timed=False)


def _cast(own: Candidate, name: str) -> Candidate:
    model = copy.deepcopy(own.model)
    for parameter in model.parameters():  # and no buffers, such as rotary frequencies, as in a load
        parameter.data = parameter.data.to(getattr(torch, name))
    stored = parameter_bytes(model)
    return Candidate(name, model, stored, [], f"{dtype_of(model)} product", timed=True)


def _autocast(own: Candidate, name: str) -> Candidate:
    """The reference itself, whose forward pass casts what products multiply."""
    if (dtype := dtype_of(own.model)) != "fp32":
        raise refusal(
            DTYPES,
            name,
            f"{own.name} has weights in {dtype}, and autocast casts fp32",
            allowed="with a reference in float32",
            instead=f"{DTYPES}=[bfloat16]",
        )
    model = copy.copy(own.model)
    device = own.model.device.type
    model.forward = torch.autocast(device, getattr(torch, AUTOCAST[name]))(own.model.forward)
    product = f"{name.removeprefix('autocast_')} product, fp32 weights cast in each forward pass"
    return Candidate(name, model, own.bytes, [], product, timed=True)


def _check_autocast(name: str) -> None:
    """Refuse what this device's autocast does not do (raises UserError)."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, AUTOCAST[name])
    ones = torch.ones(2, 2, device=device)
    with warnings.catch_warnings(), torch.autocast(device, dtype):
        warnings.simplefilter("ignore")  # torch warns, and goes on without
        found = torch.nn.functional.linear(ones, ones).dtype
    if found != dtype:
        raise refusal(
            DTYPES,
            name,
            f"torch.autocast leaves products on this device in {found}",
            allowed="what the device has",
            instead=f"{DTYPES}=[{AUTOCAST[name]}]",
        )
