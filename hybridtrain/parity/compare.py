"""The command: train the reference, then layout after layout on ranks of this machine, and say what differs."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import engine as engines
from hybridtrain.config import schema
from hybridtrain.data import blend as blends
from hybridtrain.errors import UserError, refusal
from hybridtrain.models.facts import facts_of
from hybridtrain.parity import plan as plans
from hybridtrain.parity import verdict
from hybridtrain.parity.plan import Comparison, Entry
from hybridtrain.parity.verdict import Row
from hybridtrain.plan import capabilities
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.runtime import host, launch, ranks

if TYPE_CHECKING:
    from hybridtrain.parity.measure import Measured, Reference, Task

LARGE = 500_000_000
"""Parameters from which on the reference's files and minutes deserve a warning."""


@dataclass(frozen=True)
class _Machine:
    """Where ranks run, and what they find imported."""

    backend: str
    preload: tuple[str, ...]
    timeout_s: float
    folder: str


def compare(config: schema.ParityRoot, *, train: Callable[[Task, float], Measured]) -> int:
    """Compare every layout with the reference; print the table, write parity.json. 0: all pass, 1: some do not.

    `train` runs on every rank of a layout; it is measure.train_layout unless a test wants it broken. Raises UserError before
    anything starts when the config or a named layout cannot run.
    """
    devices = _devices()
    kinds = list(dict.fromkeys(config.parity.engines)) or [config.engine.kind]
    engines.check_device(kinds, precision=config.precision.kind)
    config = _fitted(config)
    comparison = plans.prepare(config, capabilities={kind: capabilities.able(config.engine, kind=kind) for kind in kinds}, devices=devices)
    _check_tokens(comparison)
    config = comparison.config
    path = _result_path(config)
    print(_opening(comparison, devices), flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        machine = _Machine("cpu:gloo,cuda:nccl" if devices else "gloo", _preload(comparison), config.engine.timeout_s, folder)
        reference, seconds = _reference(comparison, machine)
        facts = _facts(comparison)
        told = {"losses": reference.steps.losses, "grad_norms": reference.steps.grad_norms, "seconds": round(seconds, 2)}
        width = max(len(name) for name in ("at most, without tp", *(f"{entry.name} ({entry.engine})" for entry in comparison.entries)))
        by_kind = {"with tp" if entry.layout.tp > 1 else "without tp": _tolerance(entry, comparison) for entry in comparison.entries}
        print(verdict.header(by_kind, width=width), flush=True)
        for entry in comparison.entries:
            rows.append(_layout(entry, comparison, machine, reference=reference, train=train))
            print(verdict.line(rows[-1], width=width), flush=True)
            verdict.write(path, rows=rows, reference=told, facts=facts)
    failed = [row.name for row in rows if not row.passed]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} layouts pass" + (f"; FAILED: {', '.join(failed)}" if failed else "") + f"\n{path}", flush=True)
    return 1 if failed else 0


def _tolerance(entry: Entry, comparison: Comparison) -> dict[str, float]:
    config = comparison.config
    return verdict.tolerances(config.precision.kind, tp=entry.layout.tp, lr=config.optim.lr, steps=config.parity.steps)


def _devices() -> int | None:
    """Number of GPUs; None: the CPU computes."""
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


def _check_tokens(comparison: Comparison) -> None:
    config = comparison.config
    if not _has_data(config):
        return
    try:
        data = blends.open_data(config.data, timeout_s=config.engine.timeout_s)
        blends.check_vocab(data, vocab=comparison.facts.vocab)
        blends.check_train_rows(data, seq_len=config.data.seq_len)
    except UserError as error:
        raise UserError(f"{error}\n           or data.path='' for random tokens from the seed") from error


def _fitted(config: schema.ParityRoot) -> schema.ParityRoot:
    """The model that `train` would make: new weights have every token of the corpus. What cannot be opened is refused later."""
    if not _has_data(config):
        return config
    try:
        data = blends.open_data(config.data, timeout_s=config.engine.timeout_s)
    except UserError:
        return config
    return blends.fitted(config, data, facts=facts_of(config.model))


def _has_data(config: schema.Config) -> bool:
    return bool(_corpus(config))


def _corpus(config: schema.Config) -> str:
    return config.data.path or " + ".join(config.data.blend)


def _result_path(config: schema.ParityRoot) -> Path:
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal("run.dir", folder, f"it cannot be written: {error}", allowed="a folder that you can write", instead="run.dir=FOLDER") from error
    return folder / "parity.json"


def _opening(comparison: Comparison, devices: int | None) -> str:
    """What is compared with what, and what was changed in the user's config."""
    config, facts, plan = comparison.config, comparison.facts, comparison.plan
    tokens = f"the corpus at {_corpus(config)}" if _has_data(config) else f"random tokens from run.seed={config.run.seed} (data.path is empty)"
    where = f"{devices} GPUs" if devices else "the CPU"
    kinds = ", ".join(dict.fromkeys(entry.engine for entry in comparison.entries))
    lines = [
        f"{facts.model_type} with {facts.parameters:,} parameters, {config.precision.kind}, engine {kinds}, on {where}",
        f"{config.parity.steps} steps of {plan.global_batch_size} rows x {plan.seq_len} tokens from {tokens}",
        *comparison.said,
    ]
    if facts.parameters > LARGE:
        lines.append(f"the reference trains all {facts.parameters:,} parameters in one process; parity.shrink=true cuts layers and width")
    if comparison.left_out:
        lines.append("left out of the default set:")
        lines += [f"  {name}: {why}" for name, why in comparison.left_out.items()]
    return "\n".join(lines) + "\n"


def _preload(comparison: Comparison) -> tuple[str, ...]:
    family = comparison.facts.model_type
    engine = {"hybridtrain.engine.torch_native"} if any(entry.engine == "torch" for entry in comparison.entries) else set()
    return ("hybridtrain.parity.measure", *engine, f"transformers.models.{family}.modeling_{family}")


def _facts(comparison: Comparison) -> dict[str, Any]:
    """What parity.json tells besides the results."""
    config, plan = comparison.config, comparison.plan
    return {
        "model": asdict(comparison.facts),
        "steps": config.parity.steps,
        "lr": config.optim.lr,
        "eps": config.optim.eps,
        "tokens_per_step": plan.tokens,
        "tokens": _corpus(config) or "synthetic",
        "changed": comparison.said,
        "left_out": comparison.left_out,
        "versions": host.versions(),
    }


def _reference(comparison: Comparison, machine: _Machine) -> tuple[Reference, float]:
    """Train the plain process; how it went, and the seconds it took. Its failure is nobody's parity: it is raised."""
    from hybridtrain.parity.measure import train_reference

    began = time.monotonic()
    task = _task(comparison.config, ParallelLayout(1, 1, 1, 1, 1), comparison, comparison.plan, machine)
    try:
        [reference] = ranks.run_ranks(1, train_reference, task, preload=machine.preload, backend=machine.backend, timeout_s=machine.timeout_s)
    except ranks.RankFailed as error:
        raise UserError(f"the plain reference process did not get through, so there is nothing to compare with:\n{error}") from error
    seconds = time.monotonic() - began
    print(f"reference: losses {', '.join(f'{loss:.6f}' for loss in reference.steps.losses)}; {seconds:.1f} s\n", flush=True)
    return reference, seconds


def _task(config: schema.Config, layout: ParallelLayout, comparison: Comparison, plan: Any, machine: _Machine) -> Task:
    from hybridtrain.parity.measure import Task

    return Task(config=config, layout=layout, plan=plan, steps=comparison.config.parity.steps, vocab=comparison.facts.vocab, folder=machine.folder)


def _layout(entry: Entry, comparison: Comparison, machine: _Machine, *, reference: Reference, train: Callable[[Task, float], Measured]) -> Row:
    """Run one layout; one that crashes is a row like any other."""
    config = copy.deepcopy(comparison.config)
    config.parallel, config.engine.kind = entry.parallel, entry.engine
    task = _task(config, entry.layout, comparison, entry.plan, machine)
    processes = entry.layout.world_size
    began = time.monotonic()
    try:
        found = ranks.run_ranks(
            processes, train, task, reference.steps.grad_norms[0], preload=machine.preload, backend=machine.backend, timeout_s=machine.timeout_s
        )
        measured, worst, error = verdict.merge(found, reference)
    except ranks.RankFailed as failure:
        measured, worst, error = {}, {}, str(failure)
    return Row(entry.name, entry.engine, processes, config.precision.kind, _tolerance(entry, comparison), time.monotonic() - began, measured, worst, error)
