"""A run's first lines, on rank 0: what trains, in which layout and precision, and what it continues."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import registry
from hybridtrain.config import compose
from hybridtrain.data import vocabulary
from hybridtrain.data.blend import tokenizer_dir
from hybridtrain.data.user_rows import UserRows
from hybridtrain.plan import notation
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object
from hybridtrain.types import Progress

if TYPE_CHECKING:
    from hybridtrain.run.directory import RunDir
    from hybridtrain.training.job import Job


_log = log.get("train")
_ENDS = ("steps", "tokens", "epochs")


def introduce(job: Job, *, run_dir: RunDir, engine: Any, start: Progress) -> None:
    """What runs, in which precision, and what a resumed run goes on from: rank 0's first lines."""
    from hybridtrain.runtime import cpu

    _say_job(job, engine=engine)
    for corpus in job.data.corpora:
        if isinstance(corpus, UserRows):
            _log.info(
                "data      %d rows of %s%s",
                corpus.count("train", seq_len=job.plan.seq_len),
                corpus.path,
                ", given by the program" if corpus.field == "data" else "",
            )
    for line in (*_of_plugins(job), f"backend   {cpu.describe(job.config.engine, device=engine.device)}"):
        _log.info("%s", line)
    _log.info("run       %s", run_dir.path)
    for line in _of_tokenizer(job, model=run_dir.model):
        _log.info("tokenizer %s", line)
    _compare_tokenizers(job, run_dir=run_dir, start=start)
    if job.config.schedule.warmup_steps >= job.total_steps:
        _log.warning("schedule.warmup_steps=%d: the run ends before its warm-up does", job.config.schedule.warmup_steps)
    _say_start(job, run_dir=run_dir, start=start)


def _say_job(job: Job, *, engine: Any) -> None:
    """Model, layout, batch and precision."""
    config, layout, precision = job.config, job.layout, engine.precision
    public = compose.public(config)
    name, source = public["model"]["name"] or job.facts.model_type, public["model"]["from_pretrained"] or "new weights"
    _log.info("model     %s, %s parameters (%s)", name, f"{job.facts.parameters:,}", source)
    world, device = layout.world_size, engine.device.type
    _log.info("layout    %s on %d %s process%s, %s", notation.write(config.parallel, layout), world, device, "es" if world > 1 else "", config.engine.kind)
    for line in _of_batch(job):
        _log.info("batch     %s", line)
    short = {key: str(getattr(precision, key)).removeprefix("torch.") for key in ("param", "compute", "reduce")}
    _log.info(
        "precision %s: master weights and optimizer state %s, compute %s, gradients %s",
        config.precision.kind,
        short["param"],
        short["compute"],
        short["reduce"],
    )


def _say_start(job: Job, *, run_dir: RunDir, start: Progress) -> None:
    """What the run goes on from, and what is other than before."""
    if run_dir.checkpoint and run_dir.checkpoint.parent != run_dir.checkpoints:
        other = f"; the data are other than there: {job.data.name}" if _other_data(job, start=start) else ""
        _log.info("branched  from %s at step %d, %d tokens%s", run_dir.checkpoint, start.step, start.tokens_seen, other)
    elif run_dir.checkpoint:
        other = f"; the data are other than before: {job.data.name}" if _other_data(job, start=start) else ""
        same = f"model, {'' if other else 'data, '}optimizer, schedule, seed and batch are as they were{other}"
        _log.info("resumed   %s at step %d, %d tokens; %s", run_dir.checkpoint.name, start.step, start.tokens_seen, same)
    elif run_dir.continued:
        _log.info("resumed   no complete checkpoint was there: from the beginning")
    for field, (before, now) in run_dir.changed.items():
        _log.info("changed   %s: %s -> %s", field, before, now)
    if start.step and job.config.schedule.kind != "constant" and any(field.startswith("train.") and field[6:] in _ENDS for field in run_dir.changed):
        _log.warning(
            "the %s schedule now ends at step %d: learning rates from here on are not those of the run that was interrupted",
            job.config.schedule.kind,
            job.total_steps,
        )


def _of_batch(job: Job) -> list[str]:
    """The batch of a step, and how it grows."""
    plan = job.plan
    cut = f"{plan.global_batch_size} rows of {plan.seq_len} = {plan.micro_batch_size} x {job.layout.dp} data ranks x {plan.grad_accum} micro-batches"
    lines = [f"{cut}; {job.total_steps} steps"]
    if plan.ramp:
        first, second, *_ = plan.ramp.values
        lines.append(f"ramp: {first} rows at first, {second - first} more at a time, full size after {plan.ramp.steps} steps")
    if plan.cuts:
        length = plan.seq_len // plan.cuts.values[0]
        lines.append(f"warm-up: rows in pieces of {length} tokens at first, which double in length; whole after {plan.cuts.steps} steps")
    return lines


def _of_plugins(job: Job) -> list[str]:
    """What modules of the user's add, and the settings that theirs read."""
    config, lines = job.config, []
    if config.run.plugins:
        lines.append(f"plugins   {', '.join(compose.public_value(config.run.plugins))} ({registry.listed()})")
    for name, kind, options in (("optimizer", config.optim.kind, config.optim.options), ("schedule", config.schedule.kind, config.schedule.options)):
        if options:
            lines.append(f"{name:<9} {kind} {compose.public_value(options)}")
    return lines


def _other_data(job: Job, *, start: Progress) -> bool:
    """Whether the data are not those of the checkpoint at `start`, which may lie at another place."""
    return any(start.fingerprints.get(name, now) != now for name, now in job.fingerprints.items() if name in ("data", "tokens"))


def _compare_tokenizers(job: Job, *, run_dir: RunDir, start: Progress) -> None:
    """Warn where weights that were trained with one tokenizer meet data of another: at a run's beginning, or with other data than before."""
    from hybridtrain.checkpoint import marker

    source = job.config.model.from_pretrained
    if run_dir.checkpoint is None and source:
        vocabulary.compare(Path(source), tokenizer_dir(job.config.data))
    elif run_dir.checkpoint is not None and _other_data(job, start=start):
        vocabulary.compare(run_dir.checkpoint / marker.TOKENIZER, tokenizer_dir(job.config.data))


def _of_tokenizer(job: Job, *, model: Path) -> list[str]:
    """Where model, tokenizer and chat template disagree: on the tokens there are, and those that end a text. `model`: the run's folder of that name."""
    from hybridtrain.models import tokens

    facts = next((corpus.facts for corpus in job.data.corpora if corpus.facts is not None), None)
    if facts is None:
        return []
    text, turn = vocabulary.end_tokens(facts)
    config, generation = (read_object(model / name, field="run.dir") for name in ("config.json", tokens.GENERATION))
    ends = tokens.Ends(begin=None, end=text, pad=None, turn=turn)
    lines = tokens.with_end_tokens(config, generation, of_tokenizer=ends, new=not job.config.model.from_pretrained)[2]
    if facts["vocab_size"] > job.facts.vocab:
        lines.append(f"it has {facts['vocab_size']} tokens, the model {job.facts.vocab} rows: a text with one of the others cannot be given to the model")
    return lines
