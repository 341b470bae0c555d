"""`hybridtrain evaluate RUN lm_eval.tasks=[...]`: a model's scores in tasks of EleutherAI's
lm-evaluation-harness. The only file that imports it.

    export, checkpoint or hub id --load_model--> the harness's HFLM --simple_evaluate--> <run>/lm_eval.jsonl
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridtrain import evaluate
from hybridtrain.checkpoint import export_record
from hybridtrain.config.schema import EvaluateRoot, LmEvalConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.evaluate.guard import Guard
from hybridtrain.models import classifier, encoder
from hybridtrain.models.tokens import load_tokenizer
from hybridtrain.run.record import append_line, require_run

FIELD = "evaluate.source"


def run(config: EvaluateRoot) -> int:
    """Measure `evaluate.source`, print the scores, and append them to lm_eval.jsonl if run.dir is a run."""
    run_dir = Path(config.run.dir)
    is_run = (run_dir / "config.yaml").is_file()
    if not (is_run or config.evaluate.source or (run_dir / "export").is_dir()):
        require_run(run_dir, command="evaluate")
    with evaluate.loadable(config.evaluate.source, run_dir=run_dir, field=FIELD) as source:
        trust = config.model.trust_remote_code
        model = evaluate.load_within(config.inference, source, field=FIELD, trust_remote_code=trust)
        _check_writes(model, source=source)
        tokenizer = load_tokenizer(source, field=FIELD, trust_remote_code=trust)
        step = export_record.step_of(Path(source))
        watched = Guard(model, on=config.inference.guard)
        scores = measure(model, tokenizer, config.lm_eval)
    for task, values in scores.items():
        print("\n".join(f"{task:<24}{name:<24}{value:.4f}" for name, value in values.items()))
    print("".join(f"{line}\n" for line in watched.lines()), end="")
    if is_run:
        place = config.evaluate.source or str(run_dir / "export")
        result = {"source": place, "step": step, "time": time.time(), "limit": config.lm_eval.limit}
        append_line(run_dir / "lm_eval.jsonl", {**result, "scores": scores})
        print(f"\n{run_dir / 'lm_eval.jsonl'}")
    return 0


def measure(model: Any, tokenizer: Any, options: LmEvalConfig) -> dict[str, dict[str, float]]:
    """Task or group -> metric -> value, as the harness names them ("acc", "acc_stderr"; a filter that is not
    its default "none" is named: "exact_match,strict-match").

    Raises UserError for unknown tasks, and for what the harness fails with.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = index_of(options)
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=list(options.tasks),
            limit=options.limit or None,
            task_manager=manager,
            log_samples=False,
        )
    except Exception as error:  # a task is a program, which can raise anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        problem = f"the harness fails with {type(error).__name__}: {reason[:300]}"
        instead = "its data on this machine, or other tasks"
        raise refusal(
            "lm_eval.tasks", options.tasks, problem, allowed="tasks that run", instead=instead
        ) from error
    assert found is not None, "of the harness's rank 0"
    return {task: _numbers(values) for task, values in found["results"].items()}


def index_of(options: LmEvalConfig) -> Any:
    """The harness's index of tasks. Raises UserError for unknown ones."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(options.task_folder)
    unknown = [name for name in options.tasks if name not in manager.all_tasks]
    if unknown:
        problem = f"the harness has no {unknown[0]}" + (
            f", nor has {options.task_folder}" if options.task_folder else ""
        )
        allowed = f"one of its {len(manager.all_tasks):,} tasks and groups, or of lm_eval.task_folder"
        instead = "lm-eval ls tasks, which lists them"
        raise refusal("lm_eval.tasks", options.tasks, problem, allowed=allowed, instead=instead)
    return manager


@functools.cache
def _manager(task_folder: str) -> Any:
    """The harness's index of tasks, which takes it seconds."""
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=task_folder or None)
    except Exception as error:  # of its YAML files, which may hold anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise refusal(
            "lm_eval.task_folder",
            task_folder,
            f"the harness cannot read its tasks: {reason}",
            allowed="a folder of the harness's YAML files",
            instead="another folder",
        ) from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name != "sample_len"
    }


def _check_writes(model: Any, *, source: str) -> None:
    """The harness measures causal language models here (raises UserError)."""
    if classifier.is_classifier(model.config.architectures) or encoder.predicts(model.config):
        raise no_writer(source, field=FIELD)


def no_writer(source: str, *, field: str) -> UserError:
    """The refusal of a model that writes no text."""
    return refusal(
        field,
        source,
        "it is no causal language model",
        allowed="a causal language model",
        instead=f"hybridtrain {field.partition('.')[0]} without lm_eval.tasks",
    )
