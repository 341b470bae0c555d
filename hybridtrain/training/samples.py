"""train.samples: what the model under training makes of prompts, at each evaluation.

    prompts --tokenizer--> tokens --a row each--> eval_step of NextTokens --> the next token of each
                             ^------------- appended, on every rank alike -----------+

Each token takes a forward pass over the rows so far: layouts have no cache of keys and values in common.
Only the pass of an evaluation is used, so that training goes on as without samples, bit for bit.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybridtrain.checkpoint import marker, tokenizer
from hybridtrain.data import vocabulary
from hybridtrain.engine.common import evaluating
from hybridtrain.errors import refusal
from hybridtrain.models import tokens
from hybridtrain.parallel.mesh import on_rank0
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.plan.schedules import micro_batches, stages_per_rank
from hybridtrain.precision.rules import names_of
from hybridtrain.run.directory import RunDir
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object
from hybridtrain.tasks.next_tokens import NextTokens
from hybridtrain.training.callbacks import Callback, Run
from hybridtrain.training.metrics import Meter
from hybridtrain.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from hybridtrain.training.job import Job

FIELD = "train.samples"


@dataclass(frozen=True)
class Shape:
    """The rows of a forward pass on each of `dp` data ranks."""

    micro_batches: int
    rows: int
    """Of a micro-batch."""
    length: int
    dp: int

    def batches(self, texts: Sequence[Sequence[int]], *, dp_rank: int) -> Iterator[list[Batch]]:
        """A data rank's micro-batches of each forward pass: rows filled up with zeros, or without a text."""
        share = self.micro_batches * self.rows
        for first in range(dp_rank * share, dp_rank * share + len(texts), share * self.dp):
            ids_BT = torch.zeros(share, self.length, dtype=torch.int64)
            labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
            for row, text in enumerate(texts[first : first + share]):
                ids_BT[row, : len(text)] = torch.tensor(text)
                labels_BT[row, len(text) - 1] = first + row
            batch = Batch(ids_BT, labels_BT, torch.arange(self.length).repeat(share, 1))
            yield [batch.rows(at, at + self.rows) for at in range(0, share, self.rows)]


def shape_of(job: Job, *, texts: int, length: int) -> Shape:
    """For `texts` rows of `length` tokens: of the length of training's where another would be compiled again,
    or may not fit a number format or DeepSpeed's pipeline.
    """
    config, layout, plan = job.config, job.layout, job.plan
    piped = config.engine.kind == "deepspeed" and layout.pp > 1
    if piped or config.engine.compile or names_of(config.precision):
        length = plan.seq_len
    length = min(plan.seq_len, -(-length // layout.tp) * layout.tp)  # sequence parallelism cuts it
    return Shape(_micro_batches(job, plan=plan, texts=texts), plan.micro_batch_size, length, layout.dp)


def _micro_batches(job: Job, *, plan: BatchPlan, texts: int) -> int:
    """As many as the schedule needs, and the texts, up to those of a step."""
    parallel, pp = job.config.parallel, job.layout.pp
    fits, _ = micro_batches(parallel.schedule, pp=pp, stages=pp * stages_per_rank(parallel))
    numbers = [number for number in range(1, plan.grad_accum + 1) if pp == 1 or fits(number)]
    needed = -(-texts // (plan.micro_batch_size * job.layout.dp))
    return next((number for number in numbers if number >= needed), numbers[-1])


class Samples(Callback):
    """Continues the prompts after each evaluation, and writes the texts on rank 0."""

    def __init__(self, job: Job, *, engine: Any, folder: RunDir, meter: Meter):
        """Collective. Raises UserError for prompts that cannot be continued."""
        self.engine, self.folder, self.meter = engine, folder, meter
        self.prompts, self.count = list(job.config.train.samples), job.config.train.sample_tokens
        self.tokenizer: Any = None
        """On rank 0."""
        self.ids, self.ends = on_rank0(lambda: self._read(job))
        longest = max(map(len, self.ids)) + self.count
        self.shape = shape_of(job, texts=len(self.ids), length=longest)

    def on_evaluate(self, run: Run, metrics: Mapping[str, float]) -> None:  # noqa: ARG002 - as its interface
        with self.meter.paused():
            texts = self._continued(run)
        if log.rank() == 0:
            pairs = zip(self.prompts, map(self._text, self.ids, texts), strict=True)
            samples = [{"prompt": prompt, "text": text} for prompt, text in pairs]
            self.folder.append_samples({"step": run.step, "time": time.time(), "samples": samples})

    def _continued(self, run: Run) -> list[list[int]]:
        """The prompts with their continuations, each up to an end token."""
        texts = [list(ids) for ids in self.ids]
        step, ended = self.engine.eval_step, [False] * len(texts)
        with evaluating(self.engine, NextTokens(len(texts))):
            for _ in range(self.count):
                passes = self.shape.batches(texts, dp_rank=self.engine.mesh.dp_rank)
                run.beat()
                found = functools.reduce(operator.add, map(step, passes)).values
                for number, text in enumerate(texts):
                    if not ended[number]:
                        text.append(int(found[str(number)]))
                        ended[number] = text[-1] in self.ends
                if all(ended):
                    break
        return texts

    def _text(self, prompt: Sequence[int], ids: list[int]) -> str:
        return tokens.continuation(ids, prompt=len(prompt), tokenizer=self.tokenizer)

    def _read(self, job: Job) -> tuple[list[list[int]], list[int]]:
        """(tokens of each prompt, those that end a text). On rank 0, which keeps the tokenizer."""
        folder = self.folder.model / marker.TOKENIZER
        source = folder if tokens.files_of(folder) else tokenizer.current(job.config)
        assert source is not None, "refused by job.resolve"
        self.tokenizer = tokens.load_tokenizer(str(source), field=FIELD, trust_remote_code=False)
        ids = [tokens.prompt_ids(text, tokenizer=self.tokenizer, field=FIELD) for text in self.prompts]
        for prompt, each in zip(self.prompts, ids, strict=True):
            tokens.check_ids(each, rows=job.facts.vocab, field=FIELD)
            _check_room(prompt, length=len(each), more=self.count, most=job.plan.seq_len)
        return ids, _ends(job, model=self.folder.model, tokenizer=self.tokenizer)


def _ends(job: Job, *, model: Path, tokenizer: Any) -> list[int]:
    """The tokens at which an export of this run ends a text. `model`: the run's folder model/."""
    facts = next((corpus.facts for corpus in job.data.corpora if corpus.facts is not None), None)
    turn = None if facts is None else vocabulary.end_tokens(facts)[1]
    config, generation = (
        read_object(model / name, field="run.dir") for name in (marker.CONFIG, tokens.GENERATION)
    )
    config, generation, _ = tokens.with_end_tokens(
        config,
        generation,
        of_tokenizer=tokens.ends(tokenizer, turn=turn),
        new=not job.config.model.from_pretrained,
    )
    own = tokenizer.eos_token_id
    return tokens.end_ids(config, generation) or ([] if own is None else [own])


def _check_room(prompt: str, *, length: int, more: int, most: int) -> None:
    if length + more > most:
        problem = (
            f"its {length} tokens and train.sample_tokens={more} are more than a row, data.seq_len={most}"
        )
        fewer = f"train.sample_tokens={most - length}" if length < most else "a shorter prompt"
        shown = repr(prompt[:60])
        raise refusal(FIELD, shown, problem, allowed=f"up to {most} tokens in all", instead=fewer)
