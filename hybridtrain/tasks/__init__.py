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
    task = Classification(labels=labels) if config.task.kind == "classification" else CausalLM()
    task.terms = Terms(config.task.label_smoothing, config.task.z_loss)
    return task


def own(config: Config) -> Task | None:
    """The task that a user's module has registered as task.kind; None for one of ours. Raises UserError for what is no task."""
    if registry.lookup("task", config.task.kind) is None:
        return None
    task = registry.make("task", config.task.kind, config)
    if missing := _missing(task):
        problem = f"its factory returned {type(task).__name__}, which has no {missing}"
        raise refusal("task.kind", config.task.kind, problem, allowed="what hybridtrain/tasks/task.py lists", instead="a class that inherits ht.CausalLM")
    return task


def check_given(task: object, config: Config) -> None:
    """Refuse what is no task, and options that a task given by a program does not read (raises UserError)."""
    if missing := _missing(task):
        allowed, instead = "what hybridtrain/tasks/task.py lists", "an object of a class that inherits ht.CausalLM"
        raise refusal("task", type(task).__name__, f"it has no {missing}", allowed=allowed, instead=instead)
    options = config.task
    for name, value, standard in (("kind", options.kind, "causal_lm"), ("label_smoothing", options.label_smoothing, 0), ("z_loss", options.z_loss, 0)):
        if value != standard:
            problem = f"a task is given as `task`, {type(task).__name__}, and does not read it"
            raise refusal(f"task.{name}", value, problem, allowed=str(standard), instead=f"task.{name}={standard}, or no `task`")


def _missing(task: object) -> str:
    lacking = [name for name in _PARTS if not callable(getattr(task, name, None))]
    return ", ".join(lacking + ([] if getattr(task, "weights", None) else ["weights"]))
