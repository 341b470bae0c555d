"""What is learned: the seam (task.py), one file for each task, and the head that computes its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridtrain.config.schema import Config
    from hybridtrain.tasks.task import Task


def of(config: Config, *, labels: int) -> Task:
    """The task that task.kind names, for a model of so many classes (0: of tokens)."""
    from hybridtrain.tasks.causal_lm import CausalLM
    from hybridtrain.tasks.classification import Classification
    from hybridtrain.tasks.linear_cross_entropy import Terms

    chunk = config.engine.loss_chunk
    task = Classification(labels=labels, loss_chunk=chunk) if config.task.kind == "classification" else CausalLM(loss_chunk=chunk)
    task.terms = Terms(config.task.label_smoothing, config.task.z_loss)
    return task
