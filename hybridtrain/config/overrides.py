"""Checks every override of a command line against the schema's keys and the groups in conf/ (keys.py).

Runs before Hydra, so that the error for a misspelt key suggests the nearest one instead of
a traceback of Hydra.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from hybridtrain.config import keys, schema, words
from hybridtrain.errors import UserError, refusal

_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+|~)?(?P<key>[^=]+?)(?P<equals>=(?P<value>.*))?$", re.DOTALL)


class CommandLine(NamedTuple):
    """A checked command line, in the form that Hydra takes."""

    overrides: list[str]
    mappings: list[tuple[str, dict[str, str]]]
    """(option, value) of mappings with string keys. Set after composition, because Hydra's grammar turns
    such keys into numbers."""
    given: frozenset[str]
    """Options set on the command line."""
    chosen_files: bool
    """Whether it chooses files of groups."""


def config_folder(text: str) -> Path:
    """The folder of --config-dir. Raises UserError if it does not exist."""
    folder = Path(text).expanduser().absolute()
    if not folder.is_dir():
        raise refusal(
            "--config-dir",
            text,
            "no such folder",
            allowed="a folder laid out like conf/",
            instead="a folder with e.g. experiment/mine.yaml in it",
        )
    return folder


def normalize(command: str, overrides: list[str], *, folders: list[Path]) -> CommandLine:
    """Check every override against the schema and the groups, and rewrite it for Hydra. Raises UserError.

    `+` is optional before keys that exist and before new keys of mappings such as model.config. Strings keep
    the text typed by the user (words.py).
    """
    known, allowed = keys.groups(folders), keys.sections(command)
    result: list[str] = []
    mappings, given, files = [], set(), False
    for text in overrides:
        override = _parse(text, command)
        group = override.key.partition("@")[0]
        if group in known or override.key.startswith(("hydra.", "hydra/")):
            files = True
            # The last choice of a group's file counts.
            result = [text for text in result if text.lstrip("~").partition("=")[0] != override.key]
            result.append(_choice(override, group, command, known, folders))
            continue
        prefix = _prefix(override, command=command, known=known)
        given.add(".".join(override.key.split(".")[:2]))
        is_mapping = override.key in keys.TEXT_MAPPINGS and override.equals
        mapping = words.mapping(override.value, numbers=override.key == "data.blend") if is_mapping else None
        if mapping is not None:
            mappings.append((override.key, mapping))
        else:
            value = words.as_typed(
                override.value, kind=type_of(override.key, allowed), free=override.key == "generate.prompt"
            )
            result.append(f"{prefix}{override.key}{'=' if override.equals else ''}{value}")
    return CommandLine(result, mappings, frozenset(given), files)


class Override(NamedTuple):
    """The parts of an override."""

    prefix: str
    key: str
    equals: bool
    value: str


def _parse(text: str, command: str) -> Override:
    match = _OVERRIDE.match(text)
    if match is None or (match["equals"] is None and match["prefix"] != "~"):
        raise refusal(
            "argument", text, "not an override", allowed="key=value", instead=_suggest_for_word(text, command)
        )
    return Override(
        match["prefix"] or "", match["key"].strip(), match["equals"] is not None, match["value"] or ""
    )


def _suggest_for_word(text: str, command: str) -> str:
    """A suggestion for an argument without `=`, which may be a YAML file, a run's folder or the
    name of an option.
    """
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml"):
        name = path.stem if path.stem != "config" else "NAME"
        return (
            f"a file of options is an experiment: FOLDER/experiment/{name}.yaml, "
            "with `# @package _global_` as its first line; "
            f"--config-dir FOLDER experiment={name}"
        )
    if path.is_dir() and command == "inspect":
        return f"model.from_pretrained={path / 'export' if (path / 'config.yaml').is_file() else path}"
    if path.is_dir():
        return f"run.dir={text} after the options that the run was started with"
    return f"{text.strip('=')}=VALUE, or `hybridtrain {command} --help`"


def type_of(key: str, allowed: dict[str, list[keys.Field]]) -> str:
    """The type of an option as written in the schema; "str" for keys of mappings to strings, "" for keys
    unknown to the schema.
    """
    if key.startswith(("cluster.environment.", "cluster.sbatch.")):
        return "str"
    return next((field.type for fields in allowed.values() for field in fields if field.key == key), "")


def _choice(
    override: Override, group: str, command: str, known: dict[str, list[str]], folders: list[Path]
) -> str:
    """Check the choice of a group's file, and return it as Hydra takes it. Raises UserError."""
    prefix, value = override.prefix, override.value.strip()
    _check_command(group, value, command, has="groups " + ", ".join(keys.groups_of(command, known)))
    if group in known and prefix != "~":
        is_list = value.startswith("[") and value.endswith("]")
        names = words.split(value[1:-1] if is_list else value)
        if any(_unquote(name) in ("null", "") for name in names) and (is_list or len(names) == 1):
            return _no_file(override, group, known[group])
        for name in names:
            _check_file(group, name, known[group], folders)
            if group == keys.EXPERIMENT:
                _check_package(name, folders)
        prefix = ""
    elif value == "null" and prefix != "~" and "/" in override.key:
        raise refusal(
            override.key,
            value,
            "no file is chosen",
            allowed="the name of a file",
            instead=f"no {override.key}= at all",
        )
    return f"{prefix}{override.key}{'=' if override.equals else ''}{value}"


def _no_file(override: Override, group: str, names: list[str]) -> str:
    """The override for `group=null`: removal if the group is optional, else its file `none`.

    Raises UserError without either.
    """
    if override.value.strip() == "null" and group in keys.OPTIONAL:
        return f"~{override.key}"
    if override.value.strip() == "null" and "none" in names:
        return f"{override.key}=none"
    allowed = ", ".join([*names, *(["null"] if group in keys.OPTIONAL else [])])
    raise refusal(
        group,
        override.value.strip() or "''",
        "no file is chosen",
        allowed=allowed,
        instead=f"no {group}= at all, or {group}={names[0]}",
    )


def _prefix(override: Override, *, command: str, known: dict[str, list[str]]) -> str:
    """Check the key of an option, and return the prefix with which Hydra takes it. Raises UserError."""
    allowed = keys.sections(command)
    _check_command(override.key, override.value, command, has="sections " + ", ".join(allowed))
    if override.prefix != "~" and override.key.startswith(keys.FREE_FORM):
        return "++"
    keys.check_key(
        override.key, value=override.value, allowed=allowed, groups=list(keys.groups_of(command, known))
    )
    field = next(
        (field for fields in allowed.values() for field in fields if field.key == override.key), None
    )
    if override.prefix == "~" and field is not None:
        default = (
            f"{field.key}={field.default}" if field.default not in ("", [], {}) else f"{field.key}=VALUE"
        )
        problem = "an option cannot be removed, only set"
        raise refusal(
            f"~{override.key}", override.value or "(removed)", problem, allowed="key=value", instead=default
        )
    return (
        "++"
        if override.prefix == "+" or (override.key in keys.MAPPINGS and not override.prefix)
        else override.prefix
    )


def _check_command(key: str, value: str, command: str, *, has: str) -> None:
    """Raise UserError for an option, a section or a group that only other commands have."""
    options = [name for name in schema.ROOTS if keys.is_known(key, keys.sections(name))]
    others = options or [name for name in schema.ROOTS if key.partition(".")[0] in keys.sections(name)]
    if others and command not in others:
        instead = (
            f"hybridtrain {others[0]} {key}={value}"
            if len(others) == 1
            else f"without it; it is for hybridtrain {', '.join(others)}"
        )
        raise refusal(key, value, f"no such option of `hybridtrain {command}`", allowed=has, instead=instead)


def _check_file(group: str, value: str, names: list[str], folders: list[Path]) -> None:
    if value in (*names, "null") or "${" in value or words.is_call(value):  # for Hydra to resolve
        return
    name = _unquote(value)
    if not any((folder / group / f"{name}.yaml").is_file() for folder in folders):
        raise refusal(
            group,
            name,
            f"there is no {group}/{name}.yaml",
            allowed=", ".join(names),
            instead=_suggest_file(group, name, names),
        )


def _unquote(name: str) -> str:
    return name[1:-1] if words.is_quoted(name) else name


def _suggest_file(group: str, value: str, names: list[str]) -> str:
    if value.lower() in keys.SYNONYMS.get(group, {}):
        return f"{group}={keys.SYNONYMS[group][value.lower()]}"
    if group == "parallel":
        return _suggest_layout(value, names)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.3 if group != "model" else 0.6)
    if group == "model" and not near:
        return (
            "a file of yours with --config-dir, or model.from_pretrained=FOLDER (docs/models.md lists which)"
        )
    instead = f"{group}={near[0] if near else names[0]}"
    if group in ("task", "schedule", "optim") and not difflib.get_close_matches(
        value, names, n=1, cutoff=0.7
    ):
        instead += f", or {group}.kind={value}, if a module of run.plugins registers it"
    return instead


def _suggest_layout(value: str, names: list[str]) -> str:
    """The file with the same axes and the nearest degrees; if `value` is a valid layout, its
    degrees as options too.
    """
    axes, degrees = re.sub(r"\d+", "", value), [int(number[:6]) for number in re.findall(r"\d+", value)]
    alike = [name for name in names if re.sub(r"\d+", "", name) == axes]
    ranked = sorted(
        alike,
        key=lambda name: [abs(int(a) - b) for a, b in zip(re.findall(r"\d+", name), degrees, strict=False)],
    )
    near = ranked[:1] or difflib.get_close_matches(value, names, n=1, cutoff=0.3) or names[:1]
    from hybridtrain.plan import notation  # only for this error

    try:
        options = notation.parse(value.replace("_", "-"))
    except UserError:
        return f"parallel={near[0]}"
    degrees_as_options = " ".join(
        f"parallel.{name}={degree}" for name, degree in options.items() if degree not in (None, 0, 1)
    )
    return f"parallel={near[0]}, or {degrees_as_options}"


def _check_package(name: str, folders: list[Path]) -> None:
    """Raise UserError for an experiment without the `@package` line, whose options Hydra
    would put under `experiment`.
    """
    file = next(
        (
            folder / "experiment" / f"{name}.yaml"
            for folder in folders
            if (folder / "experiment" / f"{name}.yaml").is_file()
        ),
        None,
    )
    if file is not None and not re.search(
        r"^#\s*@package\s+_global_\s*$", file.read_text(errors="replace"), re.MULTILINE
    ):
        problem = (
            f"{file} has no line `# @package _global_`, so Hydra would put its sections under `experiment`"
        )
        raise refusal(
            "experiment",
            name,
            problem,
            allowed="an experiment with that line",
            instead="# @package _global_ as the first line of the file",
        )
