"""Tasks: the interface (task.py), one file for each task, and the head module that computes the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridtrain import registry
from hybridtrain.errors import refusal

if TYPE_CHECKING:
    from hybridtrain.config.schema import Config
    from hybridtrain.tasks.task import Task

_METHODS = ("collate", "counts", "loss", "loss_of_logits", "evaluate")


def of(config: Config, *, labels: int, vocab: int, encoder: bool) -> Task:
    """The task of task.kind, for a model with a vocabulary of `vocab`, or `labels` classes (0: the head
    predicts tokens), whose tokens see those that follow them (`encoder`) or not.
    """
    from hybridtrain.tasks.causal_lm import CausalLM
    from hybridtrain.tasks.classification import Classification, TextClassification
    from hybridtrain.tasks.linear_cross_entropy import Terms
    from hybridtrain.tasks.masked_lm import MaskedLM
    from hybridtrain.tasks.next_sentence import NextSentence
    from hybridtrain.tasks.question_answering import QuestionAnswering
    from hybridtrain.tasks.token_classification import TextTokenClassification, TokenClassification

    if (registered := user_task(config)) is not None:
        return registered
    task = CausalLM()
    if config.task.kind == "classification":
        task = Classification(labels=labels)
        if encoder:
            task = TextClassification(labels=labels, tokens=config.task.tokens)
    elif config.task.kind == "token_classification":
        task = TokenClassification(labels=labels)
        if encoder:
            task = TextTokenClassification(labels=labels, tokens=config.task.tokens)
    elif config.task.kind == "question_answering":
        task = QuestionAnswering(tokens=config.task.tokens)
    elif config.task.kind == "masked_lm":
        task = (NextSentence if config.task.next_sentence else MaskedLM)(config.task, vocab=vocab)
    task.terms = Terms(config.task.label_smoothing, config.task.z_loss)
    return task


def user_task(config: Config) -> Task | None:
    """The task that a user's module registered as task.kind; None for a built-in one.

    Raises UserError if it is no task.
    """
    if registry.lookup("task", config.task.kind) is None:
        return None
    task = registry.call("task", config.task.kind, config)
    if missing := _missing(task):
        problem = f"its factory returned {type(task).__name__}, which has no {missing}"
        raise refusal(
            "task.kind",
            config.task.kind,
            problem,
            allowed="what hybridtrain/tasks/task.py lists",
            instead="a class that inherits ht.CausalLM",
        )
    return task


def check_given(task: object, config: Config) -> None:
    """Check a task passed as an argument.

    Raises UserError if it is no task, or if options are set that it does not read.
    """
    if isinstance(task, type):
        instead = f"task={task.__name__}(...)"
        raise refusal("task", task.__name__, "it is a class", allowed="an object of it", instead=instead)
    if missing := _missing(task):
        allowed, instead = (
            "what hybridtrain/tasks/task.py lists",
            "an object of a class that inherits ht.CausalLM",
        )
        raise refusal("task", type(task).__name__, f"it has no {missing}", allowed=allowed, instead=instead)
    options = config.task
    for name, value, default in (
        ("kind", options.kind, "causal_lm"),
        ("label_smoothing", options.label_smoothing, 0),
        ("z_loss", options.z_loss, 0),
    ):
        if value != default:
            problem = f"a task is given as `task`, {type(task).__name__}, and does not read it"
            raise refusal(
                f"task.{name}",
                value,
                problem,
                allowed=str(default),
                instead=f"task.{name}={default}, or no `task`",
            )


def _missing(task: object) -> str:
    methods = [name for name in _METHODS if not callable(getattr(task, name, None))]
    return ", ".join(methods + ([] if getattr(task, "weights", None) else ["weights"]))
