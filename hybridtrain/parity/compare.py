"""The command: train the reference, then each layout on ranks of this machine, and print the differences."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import engine as engines
from hybridtrain import tasks
from hybridtrain.analysis.facts import facts_of
from hybridtrain.config import schema
from hybridtrain.data import blend as blends
from hybridtrain.data import compatibility
from hybridtrain.data.blend import Blend
from hybridtrain.errors import UserError, refusal
from hybridtrain.models.classifier import labels_of
from hybridtrain.models.source import read_config, with_head
from hybridtrain.parity import plan as plans
from hybridtrain.parity import verdict
from hybridtrain.parity.plan import Comparison, LayoutCase
from hybridtrain.parity.verdict import Row
from hybridtrain.plan import capabilities
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.precision.rules import described
from hybridtrain.runtime import host, launch, ranks

if TYPE_CHECKING:
    from hybridtrain.parity.measure import LayoutJob, Measurement, ReferenceResult
    from hybridtrain.tasks.task import Task

LARGE = 500_000_000
"""Number of parameters above which the time and disk space of the reference deserve a note."""


@dataclass(frozen=True)
class _Machine:
    """How ranks run: backend, modules imported before they fork, timeout, folder for
    files, the caller's inputs.
    """

    backend: str
    preload: tuple[str, ...]
    timeout_s: float
    folder: str
    inputs: UserInputs


@dataclass(frozen=True)
class UserInputs:
    """A task and rows that a program passes besides its config; sent to the ranks."""

    task: Task | None
    data: Blend | None


@dataclass(frozen=True)
class Parity:
    """The result of a comparison."""

    rows: tuple[Row, ...]
    """One for each layout and engine, in the order of the table."""
    path: Path
    """parity.json."""

    @property
    def passed(self) -> bool:
        """Whether every layout passes."""
        return all(row.passed for row in self.rows)


def compare(config: schema.ParityRoot, *, train: Callable[[LayoutJob, float], Measurement]) -> int:
    """`compare_layouts` for the command line. Exit code 0: all pass, 1: some do not."""
    return 0 if compare_layouts(config, train=train, inputs=UserInputs(None, None)).passed else 1


def compare_layouts(
    config: schema.ParityRoot, *, train: Callable[[LayoutJob, float], Measurement], inputs: UserInputs
) -> Parity:
    """Compare every layout with the reference, print the table, and write parity.json.

    `train` runs on every rank of a layout: measure.train_layout, or in tests a faulty version of it. Raises
    UserError before anything starts if the config or a named layout cannot run.
    """
    devices = _devices()
    kinds = list(dict.fromkeys(config.parity.engines)) or [config.engine.kind]
    engines.check_device(kinds, precision=config.precision.kind)
    tasks.user_task(config)  # for what it refuses
    data = _data(config, inputs)
    config = _adapted(config, data, task=inputs.task)
    comparison = plans.prepare(
        config,
        capabilities={kind: capabilities.with_options(config.engine, kind=kind) for kind in kinds},
        devices=devices,
    )
    if data:
        with _or_random(config):
            compatibility.check_vocab(data, vocab=comparison.facts.vocab)
            compatibility.check_train_rows(data, seq_len=config.data.seq_len)
            compatibility.check_cuts(data, config)
            compatibility.check_documents(data, facts=comparison.facts)
    config = comparison.config
    path = _result_path(config)
    tokens = data.name if data else ""
    print(_opening(comparison, devices, tokens=tokens), flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        machine = _Machine(
            "cpu:gloo,cuda:nccl" if devices else "gloo",
            _preload(comparison),
            config.engine.timeout_s,
            folder,
            inputs,
        )
        reference, seconds = _reference(comparison, machine)
        facts = _facts(comparison, tokens=tokens)
        reference_facts = {
            "losses": reference.steps.losses,
            "grad_norms": reference.steps.grad_norms,
            "seconds": round(seconds, 2),
        }
        width = max(
            len(name)
            for name in (
                "at most, without tp",
                *(f"{case.name} ({case.engine})" for case in comparison.cases),
            )
        )
        print(_header(comparison, reference, width=width), flush=True)
        for case in comparison.cases:
            rows.append(_layout(case, comparison, machine, reference=reference, train=train))
            print(verdict.line(rows[-1], width=width), flush=True)
            verdict.write(path, rows=rows, reference=reference_facts, facts=facts)
    print(f"\n{_outcome(rows)}\n{path}", flush=True)
    return Parity(tuple(rows), path)


def _adapted(config: schema.ParityRoot, data: Blend | None, *, task: Task | None) -> schema.ParityRoot:
    """`config` with what the data decides. Raises UserError if model, data and task do not go together."""
    config = with_head(config)
    if data:
        known = labels_of(read_config(config.model))
        config = compatibility.with_classes(config, data, known=known)
        facts = facts_of(config.model)
        config = compatibility.adapt_model(config, data, facts=facts)
        if task is None:
            config = compatibility.adapt_task(config, data, encoder=facts.encoder)
    if task is None:
        engines.check_task(config, facts=facts_of(config.model))
    return config


def _header(comparison: Comparison, reference: ReferenceResult, *, width: int) -> str:
    by_kind = {
        "with tp" if case.layout.tp > 1 else "without tp": _tolerance(case, comparison, reference)
        for case in comparison.cases
    }
    return verdict.header(by_kind, width=width)


def _outcome(rows: list[Row]) -> str:
    failed = [row.name for row in rows if not row.passed]
    return f"{len(rows) - len(failed)} of {len(rows)} layouts pass" + (
        f"; FAILED: {', '.join(failed)}" if failed else ""
    )


def _tolerance(case: LayoutCase, comparison: Comparison, reference: ReferenceResult) -> dict[str, float]:
    """Tolerances of a layout.

    AdamW moves an element by about the learning rate per step; for others it is measured. Lion moves one
    whose direction is nearly 0 by the rate either way, as rounding has it.
    """
    config, optim = comparison.config, comparison.config.optim
    steps = config.parity.steps * max(optim.lr, *(float(rule.get("lr", 0.0)) for rule in optim.rules), 0.0)
    moved = steps if optim.kind == "adamw" else reference.moved
    found = verdict.tolerances(config.precision, tp=case.layout.tp, moved=moved, noise=reference.noise)
    return {**found, "param_abs": 2.1 * steps} if optim.kind == "lion" else found


def _devices() -> int | None:
    """Number of GPUs; None: run on the CPU."""
    if launch.world_size() > 1:
        raise refusal(
            "parity",
            f"WORLD_SIZE={launch.world_size()}",
            "parity starts the processes of every layout itself",
            allowed="one process",
            instead="hybridtrain parity, without torchrun",
        )
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else None


@contextlib.contextmanager
def _or_random(config: schema.Config) -> Iterator[None]:
    """Add to a UserError about the corpus that random tokens do for a comparison."""
    try:
        yield
    except UserError as error:
        raise (
            UserError(f"{error}\n           or data.path='' for random tokens from the seed")
            if config.data.path
            else error
        ) from None


def _data(config: schema.ParityRoot, inputs: UserInputs) -> Blend | None:
    """The rows to train on; None: random tokens."""
    if inputs.data or not config.data.named:
        return inputs.data
    with _or_random(config):
        return blends.data_of(config, timeout_s=config.engine.timeout_s)


def _result_path(config: schema.ParityRoot) -> Path:
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(
            "run.dir",
            folder,
            f"it cannot be written: {error}",
            allowed="a folder that you can write",
            instead="run.dir=FOLDER",
        ) from error
    path = folder / "parity.json"
    if path.exists() and not verdict.is_result(path):
        problem, allowed = "parity.json there is not of this command and would be replaced", "another folder"
        raise refusal("run.dir", folder, problem, allowed=allowed, instead="run.dir=FOLDER")
    return path


def _opening(comparison: Comparison, devices: int | None, *, tokens: str) -> str:
    """The first lines of the output: what is compared, and what was changed in the user's config."""
    config, facts, plan = comparison.config, comparison.facts, comparison.plan
    source = (
        f"{'the corpus at' if config.data.path or config.data.blend else 'rows of'} {tokens}"
        if tokens
        else f"random tokens from run.seed={config.run.seed} (data.path is empty)"
    )
    where = f"{devices} GPUs" if devices else "the CPU"
    kinds = ", ".join(dict.fromkeys(case.engine for case in comparison.cases))
    lines = [
        (
            f"{facts.model_type} with {facts.parameters:,} parameters, "
            f"{described(config.precision)}, engine {kinds}, on {where}"
        ),
        f"{config.parity.steps} steps of {plan.global_batch_size} rows x {plan.seq_len} tokens from {source}",
        *comparison.changes,
    ]
    if facts.parameters > LARGE:
        lines.append(
            f"the reference trains all {facts.parameters:,} parameters in one process; "
            "parity.shrink=true cuts layers and width"
        )
    if comparison.left_out:
        lines.append("left out of the default set:")
        lines += [f"  {name}: {why}" for name, why in comparison.left_out.items()]
    return "\n".join(lines) + "\n"


def _preload(comparison: Comparison) -> tuple[str, ...]:
    family = comparison.facts.model_type
    engine = (
        {"hybridtrain.engine.torch_native"}
        if any(case.engine == "torch" for case in comparison.cases)
        else set()
    )
    return ("hybridtrain.parity.measure", *engine, f"transformers.models.{family}.modeling_{family}")


def _facts(comparison: Comparison, *, tokens: str) -> dict[str, Any]:
    """Keys of parity.json besides the results."""
    config, plan = comparison.config, comparison.plan
    return {
        "model": asdict(comparison.facts),
        "steps": config.parity.steps,
        "lr": config.optim.lr,
        "eps": config.optim.eps,
        "tokens_per_step": plan.tokens,
        "tokens": tokens or "synthetic",
        "changed": comparison.changes,
        "left_out": comparison.left_out,
        "versions": host.versions(),
    }


def _reference(comparison: Comparison, machine: _Machine) -> tuple[ReferenceResult, float]:
    """Train the reference; returns its result and its time in seconds. Raises UserError if it fails."""
    from hybridtrain.parity.measure import train_reference

    began = time.monotonic()
    job = _job(comparison.config, ParallelLayout(1, 1, 1, 1, 1), comparison, comparison.plan, machine)
    try:
        [reference] = ranks.run_ranks(
            1,
            train_reference,
            job,
            preload=machine.preload,
            backend=machine.backend,
            timeout_s=machine.timeout_s,
        )
    except ranks.RankFailed as error:
        raise UserError(
            f"the plain reference process failed, so there is nothing to compare with:\n{error}"
        ) from error
    seconds = time.monotonic() - began
    print(
        f"reference: losses {', '.join(f'{loss:.6f}' for loss in reference.steps.losses)}; {seconds:.1f} s\n",
        flush=True,
    )
    return reference, seconds


def _job(
    config: schema.Config, layout: ParallelLayout, comparison: Comparison, plan: Any, machine: _Machine
) -> LayoutJob:
    from hybridtrain.parity.measure import LayoutJob

    steps, vocab, inputs = comparison.config.parity.steps, comparison.facts.vocab, machine.inputs
    return LayoutJob(
        config=config,
        layout=layout,
        plan=plan,
        steps=steps,
        vocab=vocab,
        folder=machine.folder,
        task=inputs.task,
        data=inputs.data,
    )


def _layout(
    case: LayoutCase,
    comparison: Comparison,
    machine: _Machine,
    *,
    reference: ReferenceResult,
    train: Callable[[LayoutJob, float], Measurement],
) -> Row:
    """Run one layout and return its row, also if it crashes."""
    config = copy.deepcopy(comparison.config)
    config.parallel, config.engine.kind = case.parallel, case.engine
    job = _job(config, case.layout, comparison, case.plan, machine)
    processes = case.layout.world_size
    began = time.monotonic()
    try:
        measurements = ranks.run_ranks(
            processes,
            train,
            job,
            reference.steps.grad_norms[0],
            preload=machine.preload,
            backend=machine.backend,
            timeout_s=machine.timeout_s,
        )
        measured, worst, error = verdict.merge(measurements, reference)
    except ranks.RankFailed as failure:
        measured, worst, error = {}, {}, str(failure)
    return Row(
        case.name,
        case.engine,
        processes,
        described(config.precision),
        _tolerance(case, comparison, reference),
        time.monotonic() - began,
        measured,
        worst,
        error,
    )
