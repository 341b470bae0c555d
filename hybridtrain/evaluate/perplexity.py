"""`hybridtrain evaluate`: perplexity or accuracy of a Hugging Face model on the held-out rows of training.

Shape suffixes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hybridtrain import evaluate
from hybridtrain.checkpoint import export_record
from hybridtrain.config.schema import EvaluateRoot
from hybridtrain.errors import refusal
from hybridtrain.evaluate import harness, held_out, placement
from hybridtrain.evaluate.guard import Guard
from hybridtrain.models.build import logits, pair_logits
from hybridtrain.models.heads import text_logits
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
    settings = held_out.settings_of(config, run_dir=run_dir)
    if not (is_run or config.evaluate.source or (run_dir / "export").is_dir()):
        require_run(run_dir, command="evaluate")
    data, plan, rows = held_out.data_for(settings, rows=config.evaluate.rows, field="evaluate.rows")
    with evaluate.loadable(config.evaluate.source, run_dir=run_dir, field="evaluate.source") as source:
        held_out.check_tokenizer(source, settings)
        trusts = config.model.trust_remote_code
        model = evaluate.load_within(
            config.inference, source, field="evaluate.source", trust_remote_code=trusts
        )
        of_model = held_out.of_model(
            model.config,
            settings,
            vocab=model.get_input_embeddings().num_embeddings,
            data=data,
            plan=plan,
            rows=rows,
        )
        step = export_record.step_of(Path(source))
        watched = Guard(model, on=config.inference.guard)
        sums = scores(model, of_model.batches(), device=placement.device_of(model), task=of_model.task)
    result = {
        "source": config.evaluate.source or str(run_dir / "export"),
        **({} if step is None else {"step": step}),
        "data": data.name,
        "seq_len": plan.seq_len,
        "rows": of_model.rows,
        **_figures(of_model.task.evaluate(sums), count=sums.counts["loss"], kind=settings.task.kind),
    }
    print("\n".join(f"{key:<12}{value}" for key, value in _rounded(result).items()))
    print("".join(f"{line}\n" for line in watched.lines()), end="")
    if is_run:
        _write(run_dir / "evaluation.json", result)
        print(f"\n{run_dir / 'evaluation.json'}")
    return 0


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
