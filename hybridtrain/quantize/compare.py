"""`hybridtrain compare`: models, dtypes and quantisation schemes beside a reference, on held-out rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridtrain import evaluate
from hybridtrain.config.schema import CompareRoot, Config, ModelConfig
from hybridtrain.errors import refusal
from hybridtrain.evaluate import held_out
from hybridtrain.models import build, classifier
from hybridtrain.models.init import draw
from hybridtrain.models.load import pretrained
from hybridtrain.models.source import read_config
from hybridtrain.quantize import plan as plans
from hybridtrain.quantize import schemes, stored, table, walk
from hybridtrain.quantize.calibration import batches
from hybridtrain.quantize.experts import linears_of
from hybridtrain.quantize.measure import Measured, measure
from hybridtrain.quantize.schemes import Scheme
from hybridtrain.quantize.walk import Quantised
from hybridtrain.runtime import log
from hybridtrain.runtime.files import write_json
from hybridtrain.types import Batch

SOURCES, SCHEMES, ROWS = "compare.sources", "compare.schemes", "compare.calibration_rows"
_log = log.get("compare")


@dataclass(frozen=True)
class Candidate:
    """A model that is compared."""

    name: str
    model: Any
    bytes: int
    """Of its weights, as stored."""
    layers: Sequence[Quantised]
    """Its quantised linear layers."""


def run(config: CompareRoot) -> int:
    """Print the table, and write it as JSON."""
    run_dir, options = Path(config.run.dir), config.compare
    parsed = [schemes.parse(name, field=SCHEMES) for name in options.schemes]
    settings = held_out.settings_of(config, run_dir=run_dir)
    data, plan, rows = held_out.data_for(settings, rows=options.rows, field="compare.rows")
    names = options.sources or [""]
    with ExitStack() as opened:
        folders = [opened.enter_context(_folder(name, run_dir=run_dir)) for name in names]
        for folder in folders:
            held_out.check_tokenizer(folder, settings)
        trusts = config.model.trust_remote_code
        reference = evaluate.load_model(folders[0], field=SOURCES, trust_remote_code=trusts)
        of_model = held_out.of_model(
            reference.config,
            settings,
            vocab=reference.get_input_embeddings().num_embeddings,
            data=data,
            plan=plan,
            rows=rows,
        )
        if settings.task.kind == "question_answering":
            problem = "it finds the ends of answers, whose probabilities are over positions"
            allowed = "models of tokens or classes"
            raise refusal(
                SOURCES, folders[0], problem, allowed=allowed, instead="hybridtrain evaluate for each"
            )
        calibrates = any(scheme.calibrates for scheme in parsed)
        seed = config.run.seed
        calibration = batches(of_model, rows=options.calibration_rows, seed=seed) if calibrates else []
        _check_schemes(folders[0], config, parsed=parsed, calibration=calibration)
        found: list[tuple[Candidate, Measured]] = []
        own = Candidate(names[0] or str(run_dir / "export"), reference, _bytes(reference), [])
        others = _others(own, names, folders, config, parsed=parsed, calibration=calibration)
        for number, candidate in enumerate(others, 1):
            _check_same(reference, candidate)
            found.append((candidate, measure(reference, candidate.model, of_model.batches())))
            _log.info("%d: %s", number, candidate.name)
    rows_of_table = [
        table.row(each.name, measured, stored=each.bytes, layers=each.layers) for each, measured in found
    ]
    first = table.reference(own.name, found[0][1], stored=own.bytes)
    result = {
        "reference": first,
        "data": data.name,
        "rows": of_model.rows,
        "seq_len": plan.seq_len,
        "candidates": rows_of_table,
    }
    print(table.text(result))
    out = options.out or (str(run_dir / "compare.json") if (run_dir / "config.yaml").is_file() else "")
    if out:
        write_json(Path(out), result)
        print(f"\n{out}")
    return 0


def _folder(name: str, *, run_dir: Path) -> Any:
    """A folder or hub id that transformers can load; of a run its export."""
    is_run = name != "" and (Path(name) / "config.yaml").is_file()
    return evaluate.loadable("" if is_run else name, run_dir=Path(name) if is_run else run_dir, field=SOURCES)


def _others(
    own: Candidate,
    names: Sequence[str],
    folders: Sequence[str],
    config: CompareRoot,
    *,
    parsed: Sequence[Scheme],
    calibration: Sequence[Batch],
) -> Iterator[Candidate]:
    """What is compared with the reference, one after the other."""
    for name, folder in list(zip(names, folders, strict=True))[1:]:
        model = evaluate.load_model(folder, field=SOURCES, trust_remote_code=config.model.trust_remote_code)
        yield Candidate(name, model, _bytes(model), [])
    for dtype in config.compare.dtypes:
        model = copy.deepcopy(own.model)
        for parameter in model.parameters():  # and no buffers, such as rotary frequencies, as in a load
            parameter.data = parameter.data.to(getattr(torch, dtype))
        yield Candidate(dtype, model, _bytes(model), [])
    if parsed:
        yield from _schemes(own, folders[0], config, parsed=parsed, calibration=calibration)


def _schemes(
    own: Candidate, folder: str, config: Config, *, parsed: Sequence[Scheme], calibration: Sequence[Batch]
) -> Iterator[Candidate]:
    model = ModelConfig(from_pretrained=folder, trust_remote_code=config.model.trust_remote_code)
    built = build.hf_config(read_config(model), chosen={}, attention="sdpa")
    source, linears = pretrained(model, built, fresh=draw(built, seed=0)), linears_of(built)
    for scheme in parsed:
        changed, layers = copy.deepcopy(own.model), []
        rows, plan = calibration if scheme.calibrates else [], plans.uniform(scheme, linears)
        for found in walk.layers(
            built,
            source,
            plans.choice(plan),
            rows=rows,
            device=own.model.device,
            field=SCHEMES,
        ):
            for each in found:
                walk.place(changed, each)
            layers += found
        yield Candidate(scheme.name, changed, table.stored_bytes(own.model, layers), layers)


def _check_schemes(
    folder: str, config: Config, *, parsed: Sequence[Scheme], calibration: Sequence[Batch]
) -> None:
    """Refuse schemes that do not fit the reference, before anything is measured (raises UserError)."""
    if not parsed:
        return
    model = ModelConfig(from_pretrained=folder, trust_remote_code=config.model.trust_remote_code)
    fields = read_config(model)
    if fields.get("quantization_config"):
        raise stored.already(folder, field=SOURCES)
    linears = linears_of(build.hf_config(fields, chosen={}, attention="sdpa"))
    walk.check_any(linears, folder, field=SOURCES)
    tokens = sum(batch.input_ids_BT.numel() for batch in calibration)
    for scheme in parsed:
        plan = plans.uniform(scheme, linears)
        walk.check(linears, plans.choice(plan), tokens=tokens, field=SCHEMES, rows_field=ROWS)


def _bytes(model: Any) -> int:
    """Of a model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _check_same(reference: Any, candidate: Candidate) -> None:
    """Refuse a model of other tokens or classes (raises UserError)."""
    here, there = (_outputs(model) for model in (reference, candidate.model))
    if here != there:
        raise refusal(
            SOURCES,
            candidate.name,
            f"it has {there}, the reference {here}",
            allowed="models of the same tokens and classes",
            instead="hybridtrain evaluate for each",
        )


def _outputs(model: Any) -> str:
    tokens = f"{model.get_input_embeddings().num_embeddings} tokens"
    kind = classifier.kind_of(model.config.architectures)
    return f"{tokens}, {kind} of {', '.join(model.config.id2label.values())}" if kind else tokens
