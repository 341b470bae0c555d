"""`hybridtrain compare`: models, dtypes and quantisation schemes beside a reference, on held-out rows.

candidates.py   each model, made one after the other
measure.py      what it predicts, beside the reference
speed.py        how long it takes, in turn with the reference, and in how much memory
table.py        <run>/compare.json, and the table; report/quantised.py: the page beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hybridtrain import evaluate
from hybridtrain.config.command_checks import has_matplotlib
from hybridtrain.config.schema import CompareRoot, ModelConfig
from hybridtrain.errors import install, refusal
from hybridtrain.evaluate import harness, held_out
from hybridtrain.evaluate.held_out import HeldOut
from hybridtrain.models import adapter_folder, classifier, encoder
from hybridtrain.models.source import read_config
from hybridtrain.models.tokens import load_tokenizer
from hybridtrain.quantize import candidates, speed, table
from hybridtrain.quantize.calibration import batches
from hybridtrain.quantize.candidates import SOURCES, Candidate, Candidates
from hybridtrain.quantize.measure import Measured, measure
from hybridtrain.runtime import energy, log
from hybridtrain.runtime.files import write_json

_log = log.get("compare")


def run(config: CompareRoot) -> int:
    """Print the table, and write it as JSON and as a page."""
    run_dir, options = Path(config.run.dir), config.compare
    settings = held_out.settings_of(config, run_dir=run_dir)
    data, plan, rows = held_out.data_for(settings, rows=options.rows, field="compare.rows")
    speed.check(options.speed, seq_len=plan.seq_len)
    out = options.out or (str(run_dir / "compare.json") if (run_dir / "config.yaml").is_file() else "")
    page = _page(out)
    names = options.sources or [""]
    with ExitStack() as opened:
        folders = [opened.enter_context(_folder(name, run_dir=run_dir)) for name in names]
        for folder in folders:
            _check_kind(folder, config)
            held_out.check_tokenizer(folder, settings)
        if config.lm_eval.tasks:
            harness.index_of(config.lm_eval)
        first = Path(names[0]) if names[0] else run_dir
        of_run = first if (first / "config.yaml").is_file() else None
        name = names[0] or str(run_dir / "export")
        others = Candidates(config, [name, *names[1:]], folders, run=of_run)
        own = candidates.loaded(name, folders[0], trust_remote_code=config.model.trust_remote_code)
        held = held_out.of_model(
            own.model.config,
            settings,
            vocab=own.model.get_input_embeddings().num_embeddings,
            data=data,
            plan=plan,
            rows=rows,
        )
        calibration = []
        if others.calibrate:
            calibration = batches(held, rows=options.calibration_rows, seed=config.run.seed)
        others.check(calibration)
        work = _Work(config, own, folders[0], held)
        for number, candidate in enumerate(others.made(own, calibration=calibration), 1):
            work.add(candidate)
            _log.info("%d: %s", number, candidate.name)
        result = {"data": data.name, "rows": held.rows, "seq_len": plan.seq_len, **work.result()}
    print(table.text(result))
    _write(result, out, page=page)
    return 0


def _page(out: str) -> Path | None:
    """The page beside the JSON file; None without one, or without matplotlib. Raises UserError for a file
    that is none, or a folder that is not there.
    """
    if not out:
        return None
    if not Path(out).resolve().parent.is_dir():
        problem, instead = "there is no folder for it", "a file in a folder that is there"
        raise refusal("compare.out", out, problem, allowed="a file in a folder", instead=instead)
    if not has_matplotlib():
        return None
    from hybridtrain.report import quantised

    page = Path(out).with_suffix(".html")
    quantised.check(page)
    return page


def _write(result: dict[str, Any], out: str, *, page: Path | None) -> None:
    if not out:
        return
    write_json(Path(out), result)
    print(f"\n{out}")
    if page is None:
        print(f"no page is drawn: matplotlib is not installed; {install('report')}")
        return
    from hybridtrain.report import quantised

    rows = [result["reference"], *result["candidates"]]
    costs = [(str(each["name"]), *table.costs_of(each, rows)) for each in rows]
    scores = [(*words, f"{value:.4f}") for *words, value in table.scores(rows)]
    quantised.write(
        result,
        page,
        costs=(("", *table.costs_head(rows)), costs),
        scores=(("", "task", "metric", "value"), scores),
    )
    print(page)


def _folder(name: str, *, run_dir: Path) -> Any:
    """A folder or hub id that transformers can load; of a run its export."""
    is_run = name != "" and (Path(name) / "config.yaml").is_file()
    return evaluate.loadable("" if is_run else name, run_dir=Path(name) if is_run else run_dir, field=SOURCES)


def _check_kind(folder: str, config: CompareRoot) -> None:
    """Refuse models that are not compared, before one is loaded (raises UserError)."""
    if adapter_folder.is_adapter(Path(folder)):
        return
    trusts = config.model.trust_remote_code
    fields = read_config(ModelConfig(from_pretrained=folder, trust_remote_code=trusts))
    kind = classifier.kind_of(fields.get("architectures"))
    if kind == classifier.ANSWERS:
        problem = "it finds the ends of answers, whose probabilities are over positions"
        allowed = "models of tokens or classes"
        raise refusal(SOURCES, folder, problem, allowed=allowed, instead="hybridtrain evaluate for each")
    if config.lm_eval.tasks and (kind or encoder.is_encoder(fields)):
        raise harness.no_writer(folder, field=SOURCES)


class _Work:
    """What is measured of the reference and of each model beside it."""

    def __init__(self, config: CompareRoot, own: Candidate, folder: str, held: HeldOut):
        self.options, self.tasks, self.own, self.held = config.compare, config.lm_eval, own, held
        self.tokenizer: Any = None
        if self.tasks.tasks:
            trusts = config.model.trust_remote_code
            self.tokenizer = load_tokenizer(folder, field=SOURCES, trust_remote_code=trusts)
        gpus = [torch.cuda.get_device_properties(each).uuid for each in range(torch.cuda.device_count())]
        self.counter = energy.counter(energy.POWERCAP, gpus=[str(each) for each in gpus])
        self.rows: list[dict[str, Any]] = []
        self.first: Measured | None = None
        self.timings: list[speed.Timings] = []
        """Of the reference, beside each model."""
        self.row = next(iter(held.batches())).rows(0, 1) if self.options.speed else None

    def add(self, candidate: Candidate) -> None:
        """Measure a model. Raises UserError for one of other tokens or classes."""
        _check_same(self.own.model, candidate)
        measured = measure(self.own.model, candidate.model, self.held.batches())
        self.first = self.first or measured
        row = table.row(candidate.name, measured, stored=candidate.bytes, layers=candidate.layers)
        timings = None
        if self.options.speed and candidate.timed:
            pair = [self._passes(each) for each in (self.own, candidate)]
            base, timings = speed.in_turn(pair, counter=self.counter)
            self.timings.append(base)
            row["speed"] = speed.figures(timings, base)
        self.rows.append(row | self._more(candidate))

    def _passes(self, candidate: Candidate) -> dict[str, speed.Pass]:
        assert self.row is not None
        return speed.passes(candidate.model, self.row, decoded=self.options.speed)

    def _more(self, candidate: Candidate) -> dict[str, Any]:
        """What is measured of the reference, too."""
        found: dict[str, Any] = {
            "resident_bytes": speed.resident_bytes(candidate.model),
            "product": candidate.product,
        }
        if self.options.speed and candidate.timed:
            first = next(iter(self._passes(candidate).values()))
            found["peak_bytes"] = speed.peak_bytes(first)
        if self.tokenizer is not None:
            found["lm_eval"] = harness.measure(candidate.model, self.tokenizer, self.tasks)
        return found

    def result(self) -> dict[str, Any]:
        """For the table: reference and candidates, and how they were measured."""
        assert self.first is not None
        first = table.reference(self.own.name, self.first, stored=self.own.bytes) | self._more(self.own)
        result: dict[str, Any] = {"reference": first, "candidates": self.rows}
        if self.tokenizer is not None:
            result["lm_eval"] = {"tasks": list(self.tasks.tasks), "limit": self.tasks.limit}
        if self.options.speed:
            passes = self._passes(self.own)
            alone = [] if self.timings else speed.in_turn([passes], counter=self.counter)
            first["speed"] = speed.figures(_joined([*self.timings, *alone]), None)
            result["timed"] = {
                "tokens": {name: each.tokens for name, each in passes.items()},
                "rounds": speed.ROUNDS,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "threads": torch.get_num_threads(),
                "energy": self.counter.name if self.counter else None,
            }
        return result


def _joined(several: Sequence[speed.Timings]) -> speed.Timings:
    return {name: [timing for each in several for timing in each[name]] for name in several[0]}


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
