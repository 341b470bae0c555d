"""Registry of what users' modules add under names for the config: tasks, data,
callbacks, optimizers, schedules, trackers.

    # mine.py        hybridtrain train run.plugins=[mine] schedule.kind=steps ...
    import hybridtrain as ht

    @ht.register("schedule", "steps")
    def steps(step, config, total_steps):
        return 0.1 ** (step * 3 // total_steps)

`run.plugins` is the only option that names code. docs/extending.md has the arguments that each
kind is called with.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hybridtrain.errors import PossiblyLocalError, UserError, refusal

T = TypeVar("T", bound=Callable[..., Any])

FIELDS = {
    "task": "task.kind",
    "data": "data.kind",
    "callback": "run.callbacks",
    "optimizer": "optim.kind",
    "schedule": "schedule.kind",
    "tracker": "tracker.kinds",
}
"""Kind -> the option that selects one by name."""
SIGNATURES = {
    "task": "a class that is made without arguments, or a function (config) that returns a task",
    "data": "a function (config) that returns rows, or (rows, evaluation rows)",
    "callback": "a class that is made without arguments, or a function (config) that returns a callback",
    "optimizer": "a function (parameter groups, config.optim) that returns an optimizer",
    "schedule": "a function (step, config.schedule, total_steps) that returns a factor of optim.lr",
    "tracker": "a subclass of ht.Tracker",
}
"""Kind -> what is registered."""
BUILT_IN: dict[str, tuple[str, ...]] = {
    "task": ("causal_lm", "classification", "masked_lm", "token_classification", "question_answering"),
    "data": ("prepared",),
    "callback": ("lm_eval",),
    "optimizer": ("adamw", "adafactor", "lion", "muon", "sgd"),
    "schedule": ("constant", "linear", "cosine", "wsd"),
    "tracker": ("wandb", "tensorboard", "mlflow", "trackio", "dvclive", "swanlab", "comet_ml", "clearml"),
}
"""Kind -> built-in names."""
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class _Entry:
    """One registration: the factory, and where it was registered."""

    factory: Callable[..., Any]
    module: str
    place: str
    """file:line."""


_entries: dict[tuple[str, str], _Entry] = {}
_loaded: set[str] = set()


def register(kind: str, name: str) -> Callable[[T], T]:
    """Decorator that registers a function or class under a name.

    Raises UserError for an unknown kind or a name in use.
    """
    frame = inspect.currentframe()
    caller = frame.f_back if frame else None
    module, place = (
        (caller.f_globals.get("__name__", ""), f"{caller.f_code.co_filename}:{caller.f_lineno}")
        if caller
        else ("", "")
    )
    if kind not in FIELDS:
        near = difflib.get_close_matches(str(kind), FIELDS, n=1, cutoff=0.0)[0]
        raise refusal(
            "ht.register",
            kind,
            f"no such kind (at {place})",
            allowed=", ".join(FIELDS),
            instead=f'ht.register("{near}", "{name}")',
        )
    field, instead = f'ht.register("{kind}", ...)', f'ht.register("{kind}", "my_{kind}")'
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise refusal(
            field,
            name,
            f"not a name (at {place})",
            allowed="letters, digits, _ . and -, a letter first",
            instead=instead,
        )
    if name in BUILT_IN[kind]:
        raise refusal(
            field,
            name,
            f"hybridtrain has a {kind} of this name itself (at {place})",
            allowed="another name",
            instead=instead,
        )

    def keep(factory: T) -> T:
        before, named = _entries.get((kind, name)), getattr(factory, "__qualname__", "")
        cell = (
            before is not None
            and before.module == module == "__main__"
            and getattr(before.factory, "__qualname__", "") == named
        )
        # a cell of a notebook, or a module, that is run again
        if before and not (cell or before.place == place):
            problem = f"it is registered twice: at {before.place} and at {place}"
            raise refusal(
                field,
                name,
                problem,
                allowed="each name once",
                instead=f"another name for one of the two, such as {name}_2",
            )
        _entries[kind, name] = _Entry(factory, module, place)
        return factory

    return keep


def load(modules: Sequence[str]) -> None:
    """Import each module of run.plugins once, from the working directory or sys.path.

    Raises UserError if that fails.
    """
    for name in modules:
        if name not in _loaded:
            try:
                _load(name)
            except UserError as error:
                raise PossiblyLocalError(str(error)) from error
            _loaded.add(name)


def _load(name: str) -> None:
    before = dict(_entries)
    if not _MODULE.fullmatch(name) or name.endswith(".py"):
        near = name.removesuffix(".py").strip("./").replace("/", ".") or "mine"
        raise refusal(
            "run.plugins",
            name,
            "not the name of a module",
            allowed="names as `import` takes them",
            instead=f"run.plugins=[{near}]",
        )
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except UserError as error:
        _forget(before)
        raise UserError(f"run.plugins={name}: {error}") from error
    except (Exception, SystemExit) as error:
        _forget(before)
        problem = (
            f"it cannot be imported: {traceback.format_exception_only(error)[-1].strip()}{_place(error)}"
        )
        allowed, instead = (
            "modules in the working directory or on sys.path",
            f"python -c 'import {name}', which shows the whole error",
        )
        raise refusal("run.plugins", name, problem, allowed=allowed, instead=instead) from error
    new = _entries.keys() - before.keys()
    if not new and not any(
        entry.module == name or entry.module.startswith(f"{name}.") for entry in _entries.values()
    ):
        instead = 'ht.register(kind, "NAME") above a function or class in it, or run.plugins without it'
        raise refusal(
            "run.plugins",
            name,
            "it registers nothing",
            allowed="modules that call ht.register when they are imported",
            instead=instead,
        )


def _forget(before: dict[tuple[str, str], _Entry]) -> None:
    """Take back what a module registered that failed later: it may be imported again when it is mended."""
    for key in _entries.keys() - before.keys():
        sys.modules.pop(_entries.pop(key).module, None)


def _place(error: BaseException) -> str:
    """Where an import failed: " (file:line)", without frames of the import system; empty if the
    module was not found.
    """
    if isinstance(error, SyntaxError):
        return f" ({error.filename}:{error.lineno})"
    ours = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename not in ours
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def names(kind: str) -> tuple[str, ...]:
    """All names of a kind, built in and registered."""
    return (*BUILT_IN[kind], *(name for of, name in _entries if of == kind))


def lookup(kind: str, name: str) -> Callable[..., Any] | None:
    """The factory registered under a name; None for a built-in name. Raises UserError for an unknown one."""
    check(kind, name)
    entry = _entries.get((kind, name))
    return entry.factory if entry else None


def call(kind: str, name: str, *arguments: Any) -> Any:
    """What the function registered under a name returns for `arguments`; a class of callbacks or tasks is
    made without any.

    Raises UserError for what the function raises, with its place.
    """
    factory = lookup(kind, name)
    assert factory is not None
    try:
        return (
            factory() if isinstance(factory, type) and kind in ("task", "callback") else factory(*arguments)
        )
    except UserError:
        raise
    except Exception as error:
        problem = f"it raised {traceback.format_exception_only(error)[-1].strip()}{_place(error)}"
        option = f"{FIELDS[kind].partition('.')[0]}.options.{error.args[0]}=VALUE, or a default for it"
        missing = isinstance(error, KeyError) and kind in ("optimizer", "schedule")
        instead = option if missing else "a default for what it lacks, or a function that passes it"
        raise refusal(FIELDS[kind], name, problem, allowed=SIGNATURES[kind], instead=instead) from error


def check(kind: str, name: str) -> None:
    """Refuse an unknown name (raises UserError)."""
    known = names(kind)
    if name in known:
        return
    field = FIELDS[kind]
    shown = "[{}]" if kind in ("callback", "tracker") else "{}"
    near = [*difflib.get_close_matches(name, known, n=1, cutoff=0.5), known[0]][0]
    plugin = f"run.plugins=[MODULE], with the module that registers {name}"
    raise refusal(
        field,
        name,
        "not one of the kinds there are",
        allowed=", ".join(known),
        instead=f"{field}={shown.format(near)}, or {plugin}",
    )


def listed() -> str:
    """All registered names as text: "schedule steps, task weighted"."""
    return ", ".join(f"{kind} {name}" for kind, name in sorted(_entries))


def sources() -> dict[str, str]:
    """Module that registers something -> hash of its file, by which ranks compare their code."""
    files = {
        entry.module: Path(getattr(sys.modules.get(entry.module), "__file__", None) or "")
        for entry in _entries.values()
    }
    import hashlib  # loads OpenSSL, which composing a config does not need

    return {
        module: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for module, file in sorted(files.items())
        if file.is_file()
    }
