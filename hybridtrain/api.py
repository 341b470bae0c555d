"""The commands as functions for programs. `hybridtrain/__init__.py` lists the public names."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import tasks
from hybridtrain.config import checks
from hybridtrain.config import compose as composing
from hybridtrain.config.commands import ParityConfig
from hybridtrain.config.schema import Config, ExportConfig, ExportRoot, ParityRoot, RunFolder
from hybridtrain.errors import refusal

if TYPE_CHECKING:
    from hybridtrain.parity import Parity
    from hybridtrain.tasks.task import Task


def compose(*words: str) -> Config:
    """The config of `hybridtrain train WORD ...`: groups, experiments and `section.option=value`.

    Raises UserError.
    """
    return composing.train_config(list(words))


def export(
    run: str | Path,
    *,
    out: str | Path = "",
    dtype: str = "float32",
    weights: str = "last",
    merge: bool = False,
) -> Path:
    """Write the newest complete checkpoint of a run as a Hugging Face folder and return that folder.

    In one process. `out`: empty: <run>/export. `dtype` of the weights: float32, bfloat16
    or float16. `weights`: last, or ema, their average. `merge`: of a run with adapters, the
    whole model. Raises UserError.
    """
    from hybridtrain.export import hf

    folder, target = (os.path.expanduser(path) for path in (run, out))
    config = ExportRoot(
        run=RunFolder(dir=folder), export=ExportConfig(out=target, dtype=dtype, weights=weights, merge=merge)
    )
    checks.check(config)
    return hf.export_newest(config)


def parity(
    config: Config,
    *,
    task: Task | None = None,
    data: Any = None,
    layouts: Sequence[str] = (),
    engines: Sequence[str] = (),
    steps: int = 3,
) -> Parity:
    """`hybridtrain parity`, also with a task and rows of the program: compare layouts with one plain
    process, print the table.

    The result has `rows`, one for each layout, and `passed`. `layouts`: such as "tp2" or
    "pp2-dp_shard2-zero1"; empty: a set that fits the model. Starts processes, which import the modules of
    `task` and `data`. Raises UserError.
    """
    from hybridtrain.data.blend import of_rows
    from hybridtrain.parity import UserInputs, compare_layouts
    from hybridtrain.parity.measure import train_layout

    sections = {section.name: getattr(config, section.name) for section in dataclasses.fields(Config)}
    names, kinds = ([given] if isinstance(given, str) else list(given) for given in (layouts, engines))
    root = ParityRoot(**sections, parity=ParityConfig(layouts=names, engines=kinds, steps=steps))
    checks.check(root)
    if data is not None and config.data.kind != "prepared":
        raise refusal(
            "data.kind",
            config.data.kind,
            "rows are given as `data` too",
            allowed="one of the two",
            instead="data.kind=prepared, or no `data`",
        )
    if task is not None:
        tasks.check_given(task, config)
    for name, value, option in (("task", task, "task.kind"), ("data", data, "data.kind")):
        if value is not None:
            _check_travels(name, value, option=option)
    rows = (
        None
        if data is None
        else of_rows(data, None, fields=("data", "data"), documents=config.data.document_mask)
    )
    return compare_layouts(root, train=train_layout, inputs=UserInputs(task, rows))


class _Elsewhere(pickle.Unpickler):
    """Unpickles like another process, which cannot import `__main__`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__":
            raise pickle.PicklingError(
                f"{name} is defined in the program itself, which other processes do not import"
            )
        return super().find_class(module, name)


def _check_travels(field: str, value: object, *, option: str) -> None:
    """Refuse an object that cannot be pickled for other processes (raises UserError)."""
    try:
        _Elsewhere(io.BytesIO(pickle.dumps(value))).load()
    except Exception as error:
        problem = f"it cannot be given to the processes of the layouts: {error}"
        instead = (
            f"run.plugins=[MODULE] {option}=NAME, with a module that registers it; "
            "or its class in a module that the program imports"
        )
        raise refusal(
            field,
            type(value).__name__,
            problem,
            allowed="what pickle takes, of classes in modules",
            instead=instead,
        ) from error
