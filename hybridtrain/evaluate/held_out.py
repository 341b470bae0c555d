"""Held-out rows of a corpus for a plain transformers model, and the task that scores it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hybridtrain import tasks
from hybridtrain.config import compose, schema
from hybridtrain.data import vocabulary
from hybridtrain.data.blend import Blend, data_of, tokenizer_dir
from hybridtrain.data.compatibility import adapt_task, check_eval_rows, check_vocab
from hybridtrain.data.loader import eval_batches
from hybridtrain.errors import refusal
from hybridtrain.models import classifier, encoder
from hybridtrain.models.heads import is_encoder
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch

_KINDS = {
    classifier.TEXTS: "classification",
    classifier.TOKENS: "token_classification",
    classifier.ANSWERS: "question_answering",
}


@dataclass(frozen=True)
class HeldOut:
    """Rows for a model."""

    data: Blend
    task: Task
    plan: BatchPlan
    vocab: int
    rows: int

    def batches(self) -> Iterable[Batch]:
        """The rows, in micro-batches."""
        return chain.from_iterable(
            eval_batches(
                self.data,
                plan=self.plan,
                rows=self.rows,
                dp_rank=0,
                dp_size=1,
                micro_batches_per_step=1,
                vocab=self.vocab,
                collate=self.task.collate,
            )
        )


def settings_of(config: Any, *, run_dir: Path) -> schema.Config:
    """The options of the run in `run_dir`, if it is one, with those of the command line on top.

    With other data, all data options are the command's.
    """
    is_run = (run_dir / "config.yaml").is_file()
    of_run = compose.read_run(run_dir / "config.yaml") if is_run else config
    if config.data.path or config.data.blend:
        of_run = copy.deepcopy(of_run)
        of_run.data.kind, of_run.data.path, of_run.data.blend, of_run.data.eval_path = "prepared", "", {}, ""
    return compose.override(of_run, by=config)


def data_for(settings: schema.Config, *, rows: int, field: str) -> tuple[Blend, BatchPlan, int]:
    """(data, plan, number of rows), before a model is loaded. `rows`: 0 for as many as in training.

    Raises UserError without data or, if `field` names the option of `rows`, without held-out rows.
    """
    if not settings.data.named:
        raise refusal(
            "data.path",
            "(none)",
            "no data chosen",
            allowed="a folder that prepare completed",
            instead="data.path=FOLDER, or run.dir=RUN",
        )
    data, rows = data_of(settings, timeout_s=0), rows or settings.train.eval_rows
    size, seq_len = settings.batch.micro_batch_size, settings.data.seq_len
    plan = BatchPlan(micro_batch_size=size, seq_len=seq_len, grad_accum=1, global_batch_size=size)
    if field:
        check_eval_rows(data, seq_len=seq_len, field=field, value=rows)
    return data, plan, rows


def check_tokenizer(source: str, settings: schema.Config) -> None:
    """Refuse a model whose tokenizer is not the data's (raises UserError)."""
    if not settings.data.eval_path:
        vocabulary.compare(Path(source), tokenizer_dir(settings.data))


def of_model(
    config: Any, settings: schema.Config, *, vocab: int, data: Blend, plan: BatchPlan, rows: int
) -> HeldOut:
    """The rows for a model of a transformers config with `vocab` tokens, whose task `settings` then names:
    the plain loss, without label smoothing and z-loss.
    """
    classes = len(config.id2label) if classifier.is_classifier(config.architectures) else 0
    encodes = is_encoder(config)
    data = data.in_own_rows() if encodes else data
    classified = _KINDS.get(classifier.kind_of(config.architectures), "causal_lm")
    kind = "masked_lm" if encoder.predicts(config) else classified
    if kind == "masked_lm" and data.documents:
        problem = "transformers' encoders do not keep the documents of a row apart"
        instead = "data.document_mask=false"
        raise refusal("data.document_mask", True, problem, allowed="false with an encoder", instead=instead)
    settings.task = dataclasses.replace(settings.task, kind=kind, label_smoothing=0.0, z_loss=0.0)
    task = tasks.of(adapt_task(settings, data, encoder=encodes), labels=classes, vocab=vocab, encoder=encodes)
    check_vocab(data, vocab=vocab)
    return HeldOut(data, task, plan, vocab, min(rows, data.count("eval", seq_len=plan.seq_len)))
