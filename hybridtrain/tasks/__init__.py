"""What is learned: the seam (task.py), one file for each task, and the head that computes its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridtrain import registry
from hybridtrain.errors import refusal

if TYPE_CHECKING:
    from hybridtrain.config.schema import Config
    from hybridtrain.tasks.task import Task

_PARTS = ("collate", "counts", "loss", "loss_of_logits", "evaluate")


def of(config: Config, *, labels: int) -> Task:
    """The task that task.kind names, for a model with `labels` classes (0: its head predicts tokens)."""
    from hybridtrain.tasks.causal_lm import CausalLM
    from hybridtrain.tasks.classification import Classification
    from hybridtrain.tasks.linear_cross_entropy import Terms

    if (registered := own(config)) is not None:
        return registered
    chunk = config.engine.loss_chunk
    task = Classification(labels=labels, loss_chunk=chunk) if config.task.kind == "classification" else CausalLM(loss_chunk=chunk)
    task.terms = Terms(config.task.label_smoothing, config.task.z_loss)
    return task


def own(config: Config) -> Task | None:
    """The task that a user's module has registered as task.kind; None for one of ours. Raises UserError for what is no task."""
    factory = registry.own("task", config.task.kind)
    if factory is None:
        return None
    task = factory(config)
    missing = [name for name in _PARTS if not callable(getattr(task, name, None))] + ([] if getattr(task, "weights", None) else ["weights"])
    if missing:
        problem = f"its factory returned {type(task).__name__}, which has no {', '.join(missing)}"
        raise refusal("task.kind", config.task.kind, problem, allowed="what hybridtrain/tasks/task.py lists", instead="a class that inherits ht.CausalLM")
    return task
