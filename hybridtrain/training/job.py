"""A config, resolved once against a number of processes: layout, batch plan, model facts, data and number
of steps. No torch."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import TYPE_CHECKING

from hybridtrain import engine as engines
from hybridtrain import tasks
from hybridtrain.checkpoint.tokenizer import current
from hybridtrain.config import checks
from hybridtrain.config.schema import Config
from hybridtrain.data import blend as blends
from hybridtrain.data import compatibility
from hybridtrain.data.blend import Blend
from hybridtrain.errors import refusal
from hybridtrain.models import hub, weights
from hybridtrain.models.classifier import labels_of
from hybridtrain.models.source import read_config, with_head
from hybridtrain.plan import memory
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.run import identity
from hybridtrain.training import resume
from hybridtrain.types import ModelFacts

if TYPE_CHECKING:
    from hybridtrain.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Job:
    """A config, resolved against the world it runs in."""

    config: Config
    layout: ParallelLayout
    plan: BatchPlan
    facts: ModelFacts
    data: Blend
    total_steps: int
    task: Task | None
    """What is learnt; None: what task.kind names."""

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint must have been made with.

        Reads a little of foreign token files: for rank 0, which tells the others.
        """
        model = identity.model_fingerprint(self.facts)
        order = blends.order_fingerprint(self.data, plan=self.plan, seed=self.config.run.seed)
        sample = self.data.sample
        found = {"model": model, "data": self.data.fingerprint, "order": order} | (
            {} if sample is None else {"tokens": sample}
        )
        if self.config.adapters.kind != "none":
            found["base"] = weights.digest(hub.weights_folder(self.config.model))
        return (
            found
            if self.task is None
            else {**found, "task": f"{type(self.task).__name__} {dict(self.task.weights)}"}
        )

    @property
    def evaluated(self) -> dict[str, str]:
        """What ranks must have in common besides `fingerprints`: the rows of evaluations, which a
        resumed run may change."""
        held_out = self.data.evaluated if self.config.train.eval_every else None
        return {} if held_out is None else {"evaluation data": held_out.fingerprint}


def resolve(config: Config, *, world_size: int, here: bool, data: Blend | None, task: Task | None) -> Job:
    """Layout, batch plan, model facts and data of a config in a world of `world_size` processes; raises
    UserError for what does not fit. Imports no torch.

    `here`: it will run on this machine, whose memory is looked at, too. `data`: in place of
    what the config names.
    """
    config = with_head(config)
    if config.task.kind in compatibility.CLASSIFIED:  # the data's classes decide what model it is
        data = data or blends.data_of(config, timeout_s=config.engine.timeout_s)
        known = labels_of(read_config(resume.with_available_source(config).model))
        config = compatibility.with_classes(config, data, known=known)
    settled = engines.settle(resume.with_available_source(config), world_size=world_size)
    layout, plan, model = settled.layout, settled.plan, settled.facts
    if here:
        memory.check_host(config, layout=layout, plan=plan, facts=model)
    data = data or blends.data_of(config, timeout_s=config.engine.timeout_s)
    data = compatibility.own_rows(data, facts=model)
    task = task or tasks.user_task(config)
    fitted = compatibility.adapt_model(config, data, facts=model)
    if fitted is not config:
        config, settled = fitted, engines.settle(fitted, world_size=world_size)
        layout, plan, model = settled.layout, settled.plan, settled.facts
    if config.train.samples or "lm_eval" in config.run.callbacks:
        _check_texts(config, facts=model)
    if task is None:
        config = compatibility.adapt_task(config, data, encoder=model.encoder)
        compatibility.check_masks(config, facts=model)
        engines.check_task(config, facts=model)
        compatibility.check_labels(data, config)
    else:
        engines.check_encoder(config.task.kind, masks=getattr(task, "encoder", False), facts=model)
    compatibility.check_vocab(data, vocab=model.vocab)
    compatibility.check_train_rows(data, seq_len=plan.seq_len)
    compatibility.check_cuts(data, config)
    compatibility.check_documents(data, facts=model)
    if config.train.eval_every:
        compatibility.check_eval_rows(
            data, seq_len=plan.seq_len, field="train.eval_every", value=config.train.eval_every
        )
    _check_profile(config, world_size=world_size)
    total_steps = _total_steps(config, plan, rows=data.count("train", seq_len=plan.seq_len))
    checks.phases(config.schedule, steps=total_steps)
    return Job(config, layout, plan, model, data, total_steps, task)


def _check_texts(config: Config, *, facts: ModelFacts) -> None:
    """Raise UserError for prompts that nothing continues, and tasks of the harness that nothing measures."""
    samples, field, off = config.train.samples, "run.callbacks", "run.callbacks without lm_eval"
    if samples:
        field, off = "train.samples", "train.samples=[]"
    shown = f"[{samples[0][:40]!r}]" if samples else "[lm_eval]"
    problem = ""
    if facts.encoder or facts.labels:
        problem = f"the model is {'a classifier' if facts.labels else 'an encoder'}, which writes no text"
        allowed, instead = "with a causal language model", off
    elif samples and not config.train.eval_every:
        problem = "train.eval_every=0: they are continued at evaluations, and there are none"
        allowed, instead = "with evaluations", f"train.eval_every=100, or {off}"
    elif current(config) is None:
        problem, allowed = "the data have no tokenizer", "with data whose tokens are those of a tokenizer"
        instead = f"data.tokenizer=FOLDER, or {off}"
    if problem:
        raise refusal(field, shown, problem, allowed=allowed, instead=instead)


def _check_profile(config: Config, *, world_size: int) -> None:
    ranks = config.run.profile_ranks
    if config.run.profile and not (ranks and all(0 <= rank < world_size for rank in ranks)):
        raise refusal(
            "run.profile_ranks",
            ranks,
            f"there are {world_size} ranks",
            allowed=f"ranks of 0 to {world_size - 1}",
            instead="run.profile_ranks=[0]",
        )


def _total_steps(config: Config, plan: BatchPlan, *, rows: int) -> int:
    train = config.train
    if train.tokens:
        return max(1, plan.steps_of(math.ceil(train.tokens / plan.seq_len)))
    if train.epochs:
        return max(1, plan.steps_of(math.ceil(train.epochs * rows)))
    return train.steps
