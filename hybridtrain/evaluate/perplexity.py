"""`hybridtrain evaluate`: perplexity or accuracy of a Hugging Face model on the held-out rows of training.

Shape suffixes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from hybridtrain import evaluate, tasks
from hybridtrain.checkpoint import export_record
from hybridtrain.config import compose, schema
from hybridtrain.config.schema import EvaluateRoot
from hybridtrain.data import vocabulary
from hybridtrain.data.blend import Blend, data_of, tokenizer_dir
from hybridtrain.data.compatibility import adapt_task, check_eval_rows, check_vocab
from hybridtrain.data.loader import eval_batches
from hybridtrain.errors import refusal
from hybridtrain.evaluate import harness
from hybridtrain.models import classifier, encoder
from hybridtrain.models.build import logits, pair_logits
from hybridtrain.models.heads import is_encoder, text_logits
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.run.record import require_run
from hybridtrain.runtime.files import write_json
from hybridtrain.tasks.next_sentence import NextSentence
from hybridtrain.tasks.task import Task
from hybridtrain.types import Batch, PairBatch, Sums, TextBatch


def run(config: EvaluateRoot) -> int:
    """Evaluate `evaluate.source`, print the results, and write <run>/evaluation.json if run.dir is a run.

    Data and number of rows are those of the run, unless the command line changes them. With lm_eval.tasks,
    harness.py measures those instead.
    """
    if config.lm_eval.tasks:
        return harness.run(config)
    run_dir = Path(config.run.dir)
    is_run = (run_dir / "config.yaml").is_file()
    settings = _settings(config, compose.read_run(run_dir / "config.yaml") if is_run else config)
    if not (is_run or config.evaluate.source or (run_dir / "export").is_dir()):
        require_run(run_dir, command="evaluate")
    data = _data(settings)
    rows = config.evaluate.rows or settings.train.eval_rows
    size = settings.batch.micro_batch_size
    plan = BatchPlan(
        micro_batch_size=size, seq_len=settings.data.seq_len, grad_accum=1, global_batch_size=size
    )
    check_eval_rows(data, seq_len=plan.seq_len, field="evaluate.rows", value=rows)
    with evaluate.loadable(config.evaluate.source, run_dir=run_dir, field="evaluate.source") as source:
        if not settings.data.eval_path:
            vocabulary.compare(Path(source), tokenizer_dir(settings.data))
        model = evaluate.load_model(
            source, field="evaluate.source", trust_remote_code=config.model.trust_remote_code
        )
        classes = len(model.config.id2label) if classifier.is_classifier(model.config.architectures) else 0
        vocab = model.get_input_embeddings().num_embeddings
        if is_encoder(model.config):
            data = data.in_own_rows()
        task = _task(settings, model, classes=classes, vocab=vocab, data=data)
        check_vocab(data, vocab=vocab)
        steps = eval_batches(
            data,
            plan=plan,
            rows=rows,
            dp_rank=0,
            dp_size=1,
            micro_batches_per_step=1,
            vocab=vocab,
            collate=task.collate,
        )
        step = export_record.step_of(Path(source))
        sums = scores(model, chain.from_iterable(steps), device=model.device, task=task)
    result = {
        "source": config.evaluate.source or str(run_dir / "export"),
        **({} if step is None else {"step": step}),
        "data": data.name,
        "seq_len": plan.seq_len,
        "rows": min(rows, data.count("eval", seq_len=plan.seq_len)),
        **_figures(task.evaluate(sums), count=sums.counts["loss"], kind=settings.task.kind),
    }
    print("\n".join(f"{key:<12}{value}" for key, value in _rounded(result).items()))
    if is_run:
        _write(run_dir / "evaluation.json", result)
        print(f"\n{run_dir / 'evaluation.json'}")
    return 0


def _task(settings: schema.Config, model: Any, *, classes: int, vocab: int, data: Blend) -> Task:
    """The model's task, which `settings` then names: the plain loss, without label smoothing and z-loss."""
    kinds = {
        classifier.TEXTS: "classification",
        classifier.TOKENS: "token_classification",
        classifier.ANSWERS: "question_answering",
    }
    classified = kinds.get(classifier.kind_of(model.config.architectures), "causal_lm")
    kind = "masked_lm" if encoder.predicts(model.config) else classified
    if kind == "masked_lm" and data.documents:
        problem = "transformers' encoders do not keep the documents of a row apart"
        instead = "data.document_mask=false"
        raise refusal("data.document_mask", True, problem, allowed="false with an encoder", instead=instead)
    settings.task = dataclasses.replace(settings.task, kind=kind, label_smoothing=0.0, z_loss=0.0)
    encodes = is_encoder(model.config)
    settings = adapt_task(settings, data, encoder=encodes)
    return tasks.of(settings, labels=classes, vocab=vocab, encoder=encodes)


def _data(settings: schema.Config) -> Blend:
    if not settings.data.named:
        raise refusal(
            "data.path",
            "(none)",
            "no data chosen",
            allowed="a folder that prepare completed",
            instead="data.path=FOLDER, or run.dir=RUN",
        )
    return data_of(settings, timeout_s=0)


def _settings(config: EvaluateRoot, of_run: schema.Config) -> schema.Config:
    """The run's config with the options of the command line on top.

    With other data, all data options are the command's.
    """
    if config.data.path or config.data.blend:
        of_run = copy.deepcopy(of_run)
        of_run.data.kind, of_run.data.path, of_run.data.blend, of_run.data.eval_path = "prepared", "", {}, ""
    return compose.override(of_run, by=config)


def scores(model: Any, batches: Iterable[Batch], *, device: torch.device, task: Task) -> Sums:
    """The task's sums of losses over `batches`, and their counts.

    Logits are cast to fp32 and losses summed as in the evaluation during training; batches are added in fp64
    on the host. Inputs go to `device`. Raises UserError if no token counts in the loss.
    """
    total = Sums(dict.fromkeys(task.weights, 0.0), dict.fromkeys(task.weights, 0))
    with torch.inference_mode():
        for batch in batches:
            here = batch.to(device)
            if isinstance(here, PairBatch):
                assert isinstance(task, NextSentence)
                sums = task.loss_of_pairs(*pair_logits(model, here), here)
            elif isinstance(here, TextBatch):
                sums = task.loss_of_logits(text_logits(model, here), here)
            else:
                logits_BTV = logits(model, here.input_ids_BT, position_ids_BT=here.position_ids_BT)
                sums = task.loss_of_logits(logits_BTV, here)
            counts = task.counts(here)
            total += Sums(
                {name: value.item() for name, value in sums.items()},
                {name: int(count) for name, count in counts.items()},
            )
    if not any(total.counts.values()):
        raise refusal(
            "data.path",
            "",
            "no held-out token carries a loss",
            allowed="data with held-out rows",
            instead="a larger data.eval_fraction",
        )
    return total


def _figures(metrics: dict[str, float], *, count: int, kind: str) -> dict[str, Any]:
    """Results to print: loss, and perplexity of a causal LM; of others accuracy, and what they add."""
    loss = metrics["eval_loss"]
    counted = {
        "classification": "documents",
        "masked_lm": "masked",
        "question_answering": "answers",
    }.get(kind, "tokens")
    figures = {counted: count, "loss": loss if math.isfinite(loss) else None}
    return figures | (
        {"perplexity": math.exp(loss) if loss < 700 else None}
        if kind == "causal_lm"
        else {name.removeprefix("eval_"): value for name, value in metrics.items() if name != "eval_loss"}
    )


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    return {
        key: f"{value:.{6 if key.endswith('loss') else 4}f}" if isinstance(value, float) else value
        for key, value in result.items()
    }


def _write(path: Path, result: dict[str, Any]) -> None:
    write_json(path, result)
