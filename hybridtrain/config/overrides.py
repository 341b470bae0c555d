"""The check of a command line: every override against the schema's keys and the groups in conf/ (keys.py).

Runs before Hydra starts, so that a misspelt key is answered with the nearest one instead of a stack of Hydra's errors.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from hybridtrain.config import keys, schema, words
from hybridtrain.errors import UserError, refusal

_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+|~)?(?P<key>[^=]+?)(?P<equals>=(?P<value>.*))?$", re.DOTALL)


class Prepared(NamedTuple):
    """A command line in the form that compose hands to Hydra."""

    overrides: list[str]
    mappings: list[tuple[str, dict[str, str]]]
    """Options whose keys are text, and their values: set after composition, since Hydra's grammar makes numbers of such keys."""
    given: frozenset[str]
    """Options that stand on the command line by themselves."""
    chosen_files: bool
    """Whether files of groups are chosen too."""


def config_folder(text: str) -> Path:
    """The folder given by --config-dir (raises UserError if there is none)."""
    folder = Path(text).expanduser().absolute()
    if not folder.is_dir():
        raise refusal("--config-dir", text, "no such folder", allowed="a folder laid out like conf/", instead="a folder with e.g. experiment/mine.yaml in it")
    return folder


def normalise(command: str, overrides: list[str], *, folders: list[Path]) -> Prepared:
    """Check every override against the schema and the groups, and prepare it for Hydra (raises UserError).

    `+` is optional in front of keys that exist, and model.config and engine.config_overrides may grow new keys without it.
    Text arrives as it was typed (words.py).
    """
    known, allowed = keys.groups(folders), keys.sections(command)
    done: list[str] = []
    mappings, given, files = [], set(), False
    for text in overrides:
        word = _word(text, command)
        group = word.key.partition("@")[0]
        if group in known or word.key.startswith(("hydra.", "hydra/")):
            files = True
            done = [text for text in done if text.lstrip("~").partition("=")[0] != word.key]  # the last choice counts, be it for none
            done.append(_of_group(word, group, command, known, folders))
            continue
        prefix = _checked(word, command=command, known=known)
        given.add(".".join(word.key.split(".")[:2]))
        held = words.mapping(word.value, numbers=word.key == "data.blend") if word.key in keys.TEXT_MAPPINGS and word.equals else None
        if held is not None:
            mappings.append((word.key, held))
        else:
            value = words.as_typed(word.value, kind=kind_of(word.key, allowed), free=word.key == "generate.prompt")
            done.append(f"{prefix}{word.key}{'=' if word.equals else ''}{value}")
    return Prepared(done, mappings, frozenset(given), files)


class Word(NamedTuple):
    """An override in its parts."""

    prefix: str
    key: str
    equals: bool
    value: str


def _word(text: str, command: str) -> Word:
    match = _OVERRIDE.match(text)
    if match is None or (match["equals"] is None and match["prefix"] != "~"):
        raise refusal("argument", text, "not an override", allowed="key=value", instead=_instead_of_word(text, command))
    return Word(match["prefix"] or "", match["key"].strip(), match["equals"] is not None, match["value"] or "")


def _instead_of_word(text: str, command: str) -> str:
    """What a bare word may have been meant as: a file of options, the folder of a run, an option."""
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml"):
        name = path.stem if path.stem != "config" else "NAME"
        return f"a file of options is an experiment: FOLDER/experiment/{name}.yaml, with `# @package _global_` as its first line; --config-dir FOLDER experiment={name}"
    if path.is_dir():
        return f"run.dir={text} after the options that the run was started with"
    return f"{text.strip('=')}=VALUE, or `hybridtrain {command} --help`"


def kind_of(key: str, allowed: dict[str, list[keys.Field]]) -> str:
    """The type of an option as the schema writes it; str for keys of mappings to text, empty for free-form keys."""
    if key.startswith(("cluster.environment.", "cluster.sbatch.")):
        return "str"
    return next((field.type for fields in allowed.values() for field in fields if field.key == key), "")


def _of_group(word: Word, group: str, command: str, known: dict[str, list[str]], folders: list[Path]) -> str:
    prefix, value = word.prefix, word.value.strip()
    _check_command(group, value, command, has="groups " + ", ".join(keys.groups_of(command, known)))
    if group in known and prefix != "~":
        listed = value.startswith("[") and value.endswith("]")
        names = words.split(value[1:-1] if listed else value)
        if any(_bare(name) in ("null", "") for name in names) and (listed or len(names) == 1):
            return _no_file(word, group, known[group])
        for name in names:
            _check_choice(group, name, known[group], folders)
            if group == keys.EXPERIMENT:
                _check_package(name, folders)
        prefix = ""
    elif value == "null" and prefix != "~" and "/" in word.key:
        raise refusal(word.key, value, "no file is chosen", allowed="the name of a file", instead=f"no {word.key}= at all")
    return f"{prefix}{word.key}{'=' if word.equals else ''}{value}"


def _no_file(word: Word, group: str, names: list[str]) -> str:
    """A group without a file: what conf/ has for some, the file `none` of others (raises UserError for those that have neither)."""
    if word.value.strip() == "null" and group in keys.OPTIONAL:
        return f"~{word.key}"
    if word.value.strip() == "null" and "none" in names:
        return f"{word.key}=none"
    allowed = ", ".join([*names, *(["null"] if group in keys.OPTIONAL else [])])
    raise refusal(group, word.value.strip() or "''", "no file is chosen", allowed=allowed, instead=f"no {group}= at all, or {group}={names[0]}")


def _checked(word: Word, *, command: str, known: dict[str, list[str]]) -> str:
    """Check the key of an option and return the prefix that Hydra wants in front of it."""
    allowed = keys.sections(command)
    _check_command(word.key, word.value, command, has="sections " + ", ".join(allowed))
    if word.prefix != "~" and word.key.startswith(keys.FREE_FORM):
        return "++"
    keys.check_key(word.key, value=word.value, allowed=allowed, groups=list(keys.groups_of(command, known)))
    field = next((field for fields in allowed.values() for field in fields if field.key == word.key), None)
    if word.prefix == "~" and field is not None:
        default = f"{field.key}={field.default}" if field.default not in ("", [], {}) else f"{field.key}=VALUE"
        raise refusal(f"~{word.key}", word.value or "(removed)", "an option cannot be removed, only set", allowed="key=value", instead=default)
    return "++" if word.prefix == "+" or (word.key in keys.MAPPINGS and not word.prefix) else word.prefix


def _check_command(key: str, value: str, command: str, *, has: str) -> None:
    """Refuse an option, a section or a group that other commands have (raises UserError)."""
    options = [name for name in schema.ROOTS if keys.is_known(key, keys.sections(name))]
    others = options or [name for name in schema.ROOTS if key.partition(".")[0] in keys.sections(name)]
    if others and command not in others:
        instead = f"hybridtrain {others[0]} {key}={value}" if len(others) == 1 else f"without it; it is for hybridtrain {', '.join(others)}"
        raise refusal(key, value, f"no such option of `hybridtrain {command}`", allowed=has, instead=instead)


def _check_choice(group: str, value: str, names: list[str], folders: list[Path]) -> None:
    if value in (*names, "null") or "${" in value or words.is_call(value):  # references and calls are left to Hydra's own grammar
        return
    name = _bare(value)
    if not any((folder / group / f"{name}.yaml").is_file() for folder in folders):
        raise refusal(group, name, f"there is no {group}/{name}.yaml", allowed=", ".join(names), instead=_instead(group, name, names))


def _bare(name: str) -> str:
    return name[1:-1] if words.is_quoted(name) else name


def _instead(group: str, value: str, names: list[str]) -> str:
    if value.lower() in keys.MEANT.get(group, {}):
        return f"{group}={keys.MEANT[group][value.lower()]}"
    if group == "parallel":
        return _layout_instead(value, names)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.3 if group != "model" else 0.6)
    if group == "model" and not near:
        return "a file of yours with --config-dir, or model.from_pretrained=FOLDER (model.config.model_type: llama, mistral, qwen2, qwen3)"
    instead = f"{group}={near[0] if near else names[0]}"
    if group in ("task", "schedule", "optim") and not difflib.get_close_matches(value, names, n=1, cutoff=0.7):
        instead += f", or {group}.kind={value}, if a module of run.plugins registers it"
    return instead


def _layout_instead(value: str, names: list[str]) -> str:
    """The file with the same axes and the nearest degrees, and the degrees themselves where `value` is a layout."""
    axes, degrees = re.sub(r"\d+", "", value), [int(number[:6]) for number in re.findall(r"\d+", value)]
    alike = [name for name in names if re.sub(r"\d+", "", name) == axes]
    ranked = sorted(alike, key=lambda name: [abs(int(a) - b) for a, b in zip(re.findall(r"\d+", name), degrees, strict=False)])
    near = ranked[:1] or difflib.get_close_matches(value, names, n=1, cutoff=0.3) or names[:1]
    from hybridtrain.plan import notation  # for this refusal alone

    try:
        options = notation.parse(value.replace("_", "-"))
    except UserError:
        return f"parallel={near[0]}"
    written = " ".join(f"parallel.{name}={degree}" for name, degree in options.items() if degree not in (None, 0, 1))
    return f"parallel={near[0]}, or {written}"


def _check_package(name: str, folders: list[Path]) -> None:
    """An experiment sets options of all sections: its file must say so, or Hydra looks for them under `experiment`."""
    file = next((folder / "experiment" / f"{name}.yaml" for folder in folders if (folder / "experiment" / f"{name}.yaml").is_file()), None)
    if file is not None and not re.search(r"^#\s*@package\s+_global_\s*$", file.read_text(errors="replace"), re.MULTILINE):
        problem = f"{file} has no line `# @package _global_`, so its sections would lie under `experiment`"
        raise refusal("experiment", name, problem, allowed="an experiment with that line", instead="# @package _global_ as the first line of the file")
