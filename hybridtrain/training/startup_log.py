"""The first lines that a run logs, on rank 0: model, layout, batch, precision, data, and
what it resumes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import registry
from hybridtrain.analysis.facts import places
from hybridtrain.config import compose
from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.data import vocabulary
from hybridtrain.data.blend import tokenizer_dir
from hybridtrain.data.user_rows import UserRows
from hybridtrain.plan import memory, notation, optimizer_states, stages
from hybridtrain.plan.formats import HIGH, SCHEMES
from hybridtrain.plan.tensor import sequence_parallel
from hybridtrain.precision import rules
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object
from hybridtrain.training import metrics
from hybridtrain.types import Progress

if TYPE_CHECKING:
    import torch

    from hybridtrain.run.directory import RunDir
    from hybridtrain.training.job import Job


_log = log.get("train")
_ENDS = ("steps", "tokens", "epochs")
_BF16_BETA = 1 - 2**-9
_WORTH_SAYING = 0.02
"""Share of a step's time; the estimate is no more accurate."""


def write(job: Job, *, run_dir: RunDir, engine: Any, start: Progress) -> None:
    """Log the first lines of a run. Called on rank 0."""
    from hybridtrain.runtime import cpu

    _log_job(job, engine=engine)
    for corpus in job.data.corpora:
        if isinstance(corpus, UserRows):
            _log.info(
                "data      %d rows of %s%s",
                corpus.count("train", seq_len=job.plan.seq_len),
                corpus.path,
                ", given by the program" if corpus.field == "data" else "",
            )
    for line in (*_plugin_lines(job), f"backend   {cpu.describe(job.config.engine, device=engine.device)}"):
        _log.info("%s", line)
    _log.info("run       %s", run_dir.path)
    for line in _tokenizer_notes(job, model=run_dir.model):
        _log.info("tokenizer %s", line)
    _compare_tokenizers(job, run_dir=run_dir, start=start)
    if job.config.schedule.warmup_steps >= job.total_steps:
        _log.warning(
            "schedule.warmup_steps=%d: the run ends before its warm-up does", job.config.schedule.warmup_steps
        )
    for line in rules.idle_options(job.config.precision):
        _log.warning("%s", line)
    _log_start(job, run_dir=run_dir, start=start)


def _log_job(job: Job, *, engine: Any) -> None:
    """Model, layout, batch and precision."""
    config, layout, precision = job.config, job.layout, engine.precision
    public = compose.public(config)
    name, source = (
        public["model"]["name"] or job.facts.model_type,
        public["model"]["from_pretrained"] or "new weights",
    )
    _log.info("model     %s, %s parameters (%s)", name, f"{job.facts.parameters:,}", source)
    if config.adapters.kind != "none":
        from hybridtrain.models import adapters

        chosen = adapters.chosen(engine.model_config, config.adapters)
        own = adapters.saved(engine.model_config, config.adapters)
        trained = adapters.line(chosen, config.adapters, own=own, of=job.facts.parameters)
        _log.info("adapters  %s", trained)
        _log.info(
            "adapters  what is not trained is stored in %s", str(precision.compute).removeprefix("torch.")
        )
    for capability, why in job.facts.refused.items():
        _log.info("analysis  no %s: %s", capability, why)
    world, device = layout.world_size, engine.device.type
    _log.info(
        "layout    %s on %d %s process%s, %s",
        notation.write(config.parallel, layout),
        world,
        device,
        "es" if world > 1 else "",
        config.engine.kind,
    )
    if job.facts.dropped:
        _log.info("dropout   %s", places(job.facts.dropped))
    if (line := _tensor_line(job)) is not None:
        _log.info("tensor    %s", line)
    for line in _stage_lines(job, schedules=engine.capabilities.schedules):
        _log.info("stages    %s", line)
    for line in _batch_lines(job):
        _log.info("batch     %s", line)
    short = {
        key: str(getattr(precision, key)).removeprefix("torch.") for key in ("param", "compute", "reduce")
    }
    _log.info(
        "precision %s: %s, compute %s, gradients %s",
        config.precision.kind,
        _stored(job, engine=engine, weights=short["param"]),
        short["compute"],
        short["reduce"],
    )
    if config.engine.offload_optimizer == "cpu":
        _log.info("offload   %s", _offload_line(job, on=engine.device))
    for line in _format_lines(formats(job, engine=engine), config.precision, on=engine.device):
        _log.info("precision %s", line)


def _offload_line(job: Job, *, on: torch.device) -> str:
    if on.type == "cpu":
        return (
            "the training device is the CPU: engine.offload_optimizer=cpu saves no memory, and costs copies"
        )
    config = job.config
    need = memory.needs(config, parallel=config.parallel, layout=job.layout, plan=job.plan, facts=job.facts)
    return (
        f"before activations, a rank needs {need.host / memory.GIB:.1f} GiB of host memory "
        f"and {need.total / memory.GIB:.1f} GiB on its device"
    )


def formats(job: Job, *, engine: Any) -> list[rules.Row]:
    """In which formats the linear layers of the whole model multiply; empty if all are as precision.kind."""
    from hybridtrain.models.linears import linears_of

    precision = job.config.precision
    if not rules.names_of(precision):
        return []
    return rules.table(linears_of(engine.model_config), precision, head=job.facts.outputs * job.facts.hidden)


def rounded(job: Job, *, engine: Any) -> dict[str, Any]:
    """What training rounds for quantisation: dtype of the weights before, path -> scheme; empty: nothing."""
    from hybridtrain.models.linears import linears_of

    precision = job.config.precision
    if not rules.names_of(precision) & SCHEMES.keys():
        return {}
    dtype = str(engine.precision.compute).removeprefix("torch.")
    return {"dtype": dtype, "layers": rules.schemes(linears_of(engine.model_config), precision)}


def _format_lines(rows: Sequence[rules.Row], precision: PrecisionConfig, *, on: torch.device) -> list[str]:
    """How many linear layers multiply in which format. `on`: the device that computes."""
    from hybridtrain.precision import device

    lines = []
    for row in rows:
        how = ", emulated" if device.is_emulated(row.format, precision, device=on) else ""
        if row.format in SCHEMES:
            how = f", weights rounded as {SCHEMES[row.format]} stores them"
        what = "linear layers" if row.format != HIGH else "linear layers with the head"
        lines.append(
            f"{row.format}: {row.modules} {what}, {metrics.quantity(row.parameters)} parameters, "
            f"{row.share:.1%} of the products with weights{how}"
        )
    return lines


def _stored(job: Job, *, engine: Any, weights: str) -> str:
    """How weights and optimizer state are stored. `weights`: dtype of the master weights."""
    from hybridtrain.models.parameters import trained_shapes

    config = job.config
    state, rounding = config.precision.state, config.precision.rounding
    kind, rounds = config.optim.kind, False
    if kind in registry.BUILT_IN["optimizer"]:
        rounds = weights == "bfloat16"
    in_bf16 = state == "bf16" or (state == "auto" and rounds)
    by_betas = kind not in ("sgd", "adafactor")
    slowest = max(config.optim.betas[1] * by_betas, config.optim.momentum * (not by_betas or kind == "muon"))
    if kind in registry.BUILT_IN["optimizer"] and in_bf16 and slowest > _BF16_BETA:
        _log.warning(
            "optim.%s: a moment in bf16 cannot decay by %.2g a step, less than half a step of bf16 (2^-9); "
            "precision.state=fp32 can%s, as can a decay rate of at most %.3f",
            f"betas={config.optim.betas}" if by_betas else f"momentum={config.optim.momentum}",
            1 - slowest,
            ", and 8bit" if kind == "adamw" else "",
            _BF16_BETA,
        )
    if state == "auto" and not rounds:
        return f"master weights and optimizer state {weights}"
    words = {"kahan": "compensated (kahan)", "stochastic": "rounded stochastically", "nearest": "rounded"}
    line = f"master weights {weights}{f' {words[rounding]}' if rounds else ''}, optimizer state "
    if state != "8bit":
        kept = weights if state == "auto" else state
        momentum = f", momentum {kept}" if config.optim.momentum else ""
        return line + (f"float32{momentum}" if kind == "adafactor" else kept)
    shapes = trained_shapes(
        engine.model_config, freeze=config.model.freeze, settings=config.adapters
    ).values()
    coded = [math.prod(shape) for shape in shapes if optimizer_states.in_eight_bits(shape)]
    share = sum(coded) / sum(math.prod(shape) for shape in shapes)
    rest = len(shapes) - len(coded)
    return line + f"8bit in {len(coded)} parameters ({share:.1%} of the elements), fp32 in {rest} small ones"


def _tensor_line(job: Job) -> str | None:
    """What tensor parallelism cuts, where that is not everything."""
    facts, tp = job.facts, job.layout.tp
    if tp == 1:
        return None
    parts = []
    if facts.sliced is not None:
        parts.append(f"{facts.sliced:.0%} of the layers' matrix products cut over {tp} ranks")
        parts += [f"whole on every rank: {name} ({why})" for name, why in facts.whole.items()]
    parallel = job.config.parallel
    if not sequence_parallel(parallel, plan=job.plan, tp=tp) and parallel.sequence_parallel == "auto":
        parts.append(f"no sequence parallelism: rows are not cut evenly into {tp}")
    return "; ".join(parts) or None


def _log_start(job: Job, *, run_dir: RunDir, start: Progress) -> None:
    """The checkpoint that the run resumes from, and what has changed since."""
    if run_dir.checkpoint and run_dir.checkpoint.parent != run_dir.checkpoints:
        other = f"; with other data: {job.data.name}" if _other_data(job, start=start) else ""
        _log.info(
            "branched  from %s at step %d, %d tokens%s",
            run_dir.checkpoint,
            start.step,
            start.tokens_seen,
            other,
        )
    elif run_dir.checkpoint:
        other = f"; with other data: {job.data.name}" if _other_data(job, start=start) else ""
        same = f"model, {'' if other else 'data, '}optimizer, schedule, seed and batch are unchanged{other}"
        _log.info(
            "resumed   %s at step %d, %d tokens; %s",
            run_dir.checkpoint.name,
            start.step,
            start.tokens_seen,
            same,
        )
    elif run_dir.continued:
        _log.info("resumed   without a complete checkpoint: from the beginning")
    for field, (before, now) in run_dir.changed.items():
        _log.info("changed   %s: %s -> %s", field, before, now)
    if (
        start.step
        and job.config.schedule.kind != "constant"
        and any(field.startswith("train.") and field[6:] in _ENDS for field in run_dir.changed)
    ):
        _log.warning(
            (
                "the %s schedule now ends at step %d: from here on, "
                "learning rates differ from those of the run before"
            ),
            job.config.schedule.kind,
            job.total_steps,
        )


def _stage_lines(job: Job, *, schedules: frozenset[str]) -> list[str]:
    """The layers of each pipeline rank, how even their work is, and whether more stages would save time."""
    config, pp, plan = job.config, job.layout.pp, job.plan
    if pp == 1:
        return []
    cut = stages.cut(config, parallel=config.parallel, pp=pp, plan=plan, facts=job.facts)
    names = [f"{part.start}-{part[-1]}" if len(part) > 1 else str(part.start) for part in cut.layers]
    ranks = ", ".join(" + ".join(names[index] for index in numbers) for numbers in cut.ranks)
    lines = [f"layers {ranks}; with the head, the heaviest rank is {cut.imbalance:.1%} above the mean"]
    number, saved = stages.virtual(config, pp=pp, plan=plan, facts=job.facts)
    if saved >= _WORTH_SAYING and "interleaved_1f1b" in schedules:
        lines.append(
            f"parallel.schedule=interleaved_1f1b parallel.virtual_stages={number} would take about "
            f"{saved:.0%} less time, if sending hidden states takes none"
        )
    return lines


def _batch_lines(job: Job) -> list[str]:
    """The batch of a step, and how it grows."""
    plan = job.plan
    batch = (
        f"{plan.global_batch_size} rows of {plan.seq_len} = {plan.micro_batch_size} "
        f"x {job.layout.dp} data ranks x {plan.grad_accum} micro-batches"
    )
    lines = [f"{batch}; {job.total_steps} steps"]
    if plan.ramp:
        first, second, *_ = plan.ramp.values
        lines.append(
            f"ramp: {first} rows at first, {second - first} more at a time, "
            f"full size after {plan.ramp.steps} steps"
        )
    if plan.cuts:
        length = plan.first_length
        lines.append(
            f"warm-up: rows in pieces of {length} tokens at first, which double in length; "
            f"whole after {plan.cuts.steps} steps"
        )
    return lines


def _plugin_lines(job: Job) -> list[str]:
    """The modules of run.plugins with what they register, and options of registered
    optimizers and schedules."""
    config, lines = job.config, []
    if config.run.plugins:
        lines.append(f"plugins   {', '.join(compose.public_value(config.run.plugins))} ({registry.listed()})")
    for name, kind, options in (
        ("optimizer", config.optim.kind, config.optim.options),
        ("schedule", config.schedule.kind, config.schedule.options),
    ):
        if options:
            lines.append(f"{name:<9} {kind} {compose.public_value(options)}")
    return lines


def _other_data(job: Job, *, start: Progress) -> bool:
    """Whether the data differ from those of the checkpoint at `start`; their path does not matter."""
    return any(
        start.fingerprints.get(name, now) != now
        for name, now in job.fingerprints.items()
        if name in ("data", "tokens")
    )


def _compare_tokenizers(job: Job, *, run_dir: RunDir, start: Progress) -> None:
    """Warn if the weights were trained with another tokenizer than that of the data: for a new run, or after
    a change of data.
    """
    from hybridtrain.checkpoint import marker

    source = job.config.model.from_pretrained
    if run_dir.checkpoint is None and source:
        vocabulary.compare(Path(source), tokenizer_dir(job.config.data))
    elif run_dir.checkpoint is not None and _other_data(job, start=start):
        vocabulary.compare(run_dir.checkpoint / marker.TOKENIZER, tokenizer_dir(job.config.data))


def _tokenizer_notes(job: Job, *, model: Path) -> list[str]:
    """Disagreements of model, tokenizer and chat template: on vocabulary and end tokens.

    `model`: the run's folder model/.
    """
    from hybridtrain.models import tokens

    facts = next((corpus.facts for corpus in job.data.corpora if corpus.facts is not None), None)
    if facts is None:
        return []
    text, turn = vocabulary.end_tokens(facts)
    config, generation = (
        read_object(model / name, field="run.dir") for name in ("config.json", tokens.GENERATION)
    )
    ends = tokens.Ends(begin=None, end=text, pad=None, turn=turn)
    lines = tokens.with_end_tokens(
        config, generation, of_tokenizer=ends, new=not job.config.model.from_pretrained
    )[2]
    if facts["vocab_size"] > job.facts.vocab:
        lines.append(
            f"it has {facts['vocab_size']} tokens, the model's embedding {job.facts.vocab} rows: "
            "the model cannot read the other tokens"
        )
    return lines
