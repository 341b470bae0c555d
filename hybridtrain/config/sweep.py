"""Sweeps: one command line for each combination of comma-separated values. Imports hydra, like compose.py."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hybridtrain.config import keys, words
from hybridtrain.config.compose import COMPOSE_ERRORS, compose_node, split, translate
from hybridtrain.config.overrides import normalize


def sweep(command: str, argv: list[str]) -> list[list[str]]:
    """Expand the sweeps in `argv` (lr=1e-3,1e-4) into one command line per job, each with its own run.name.

    Raises UserError.
    """
    overrides, folders = split(argv)
    normalize(
        command, [text for text in overrides if "," not in text], folders=[keys.conf_folder(), *folders]
    )
    choices = [_alternatives(text, command, folders) for text in overrides]
    flags = [flag for folder in folders for flag in ("--config-dir", str(folder))]
    jobs = [list(job) for job in itertools.product(*choices)]
    if any(
        len(choice) > 1 and choice[0].lstrip("+").startswith(("run.name=", "run.dir=")) for choice in choices
    ):
        return [[*flags, *job] for job in jobs]
    if "run" not in keys.sections(command):
        return [[*flags, *job] for job in jobs]
    name = functools.cache(lambda files: _name(command, [*flags, *files]))
    return [
        [*flags, *job, f"run.name={words.quoted(name(_name_overrides(job)) + f'-{number}')}"]
        for number, job in enumerate(jobs)
    ]


def _name_overrides(job: list[str]) -> tuple[str, ...]:
    """The overrides that may set run.name: choices of files, and run.name itself."""
    return tuple(
        text for text in job if "." not in text.partition("=")[0] or text.lstrip("+").startswith("run.name=")
    )


def _name(command: str, argv: list[str]) -> str:
    """run.name with unresolved references."""
    overrides, folders = split(argv)
    line = normalize(command, overrides, folders=[keys.conf_folder(), *folders])
    try:
        node = compose_node(command, line, folders)
        return str(node.run._get_node("name")._value())
    except COMPOSE_ERRORS as error:
        raise translate(error) from error


def _alternatives(text: str, command: str, folders: list[Path]) -> list[str]:
    """One override for each value of a sweep, in the user's spelling."""
    key, equals, value = text.partition("=")
    parts = words.alternatives(value) if equals else [value]
    if parts is not None:
        return [text] if len(parts) < 2 else [f"{key}={part}" for part in parts]
    try:
        line = normalize(command, [text], folders=[keys.conf_folder(), *folders])
        [jobs] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(line.overrides), None)
    except HydraException as error:
        raise translate(error) from error
    return [job for [job] in jobs]
