"""The rules of the section lm_eval: where EleutherAI's lm-evaluation-harness is used, and what it needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hybridtrain.config import schema
from hybridtrain.config.section_checks import require

NAME = "lm_eval"
"""Of the package, of the section, and of the callback."""


def check(config: schema.Config, *, evaluates: bool, here: bool) -> None:
    """Raise UserError. `evaluates`: the command is evaluate or compare; `here`: it runs here."""
    options, used = config.lm_eval, evaluates or NAME in config.run.callbacks
    tasks = ",".join(options.tasks)
    require(
        bool(options.tasks) or NAME not in config.run.callbacks,
        "run.callbacks",
        config.run.callbacks,
        "lm_eval.tasks is empty: there is nothing to measure",
        allowed="with lm_eval.tasks",
        instead="lm_eval.tasks=[hellaswag]",
    )
    require(
        used or not options.tasks,
        "lm_eval.tasks",
        options.tasks,
        "nothing measures them in this command",
        allowed="with run.callbacks=[lm_eval], or in hybridtrain evaluate and compare",
        instead=f"run.callbacks=[lm_eval] lm_eval.tasks=[{tasks}]",
    )
    if not options.tasks:
        return
    require(
        not here or importlib.util.find_spec(NAME) is not None,
        "lm_eval.tasks",
        options.tasks,
        "the package lm_eval is not installed here",
        allowed="tasks of EleutherAI's lm-evaluation-harness, once it is",
        instead="pip install lm_eval",
    )
    require(
        not options.task_folder or Path(options.task_folder).is_dir(),
        "lm_eval.task_folder",
        options.task_folder,
        "there is no such folder",
        allowed="a folder of task files of the harness (YAML)",
        instead="lm_eval.task_folder=''",
    )
