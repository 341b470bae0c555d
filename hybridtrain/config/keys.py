"""What may stand on a command line: the schema's keys and docstrings, the groups in conf/, and the check of overrides.

Runs before Hydra starts, so that a misspelt key is answered with the nearest one instead of a stack of Hydra's errors.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from hybridtrain.config import commands, schema
from hybridtrain.types import refusal

FREE_FORM = ("model.config.", "engine.config_overrides.", "cluster.environment.", "cluster.sbatch.")  # any key of another's
CLUSTER = "cluster"  # a group for one command alone
MAPPINGS = ("data.blend", "engine.config_overrides", "cluster.environment", "cluster.sbatch")  # the value is {key:value, ...}
NOT_YET = re.compile(r"lora|peft|adapter", re.IGNORECASE)
_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+|~)?(?P<key>[^=]+?)(?P<equals>=(?P<value>.*))?$", re.DOTALL)


class Field(NamedTuple):
    """One option: its dotted key, the type as written, the default and the docstring."""

    key: str
    type: str
    default: Any
    doc: str


def shipped() -> Path:
    """The folder of conf/: inside the package in a wheel, beside it in a checkout."""
    return carried("conf")


def carried(name: str) -> Path:
    """A folder that the wheel carries."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def sections(command: str) -> dict[str, list[Field]]:
    """The sections of `command` and their options, in the order of the schema; the command's own section comes first."""
    docs = _docstrings()
    result = {}
    for name, kind in get_type_hints(schema.ROOTS[command]).items():
        result[name] = [
            Field(f"{name}.{option.name}", str(option.type), _default(option), docs.get(kind.__name__, {}).get(option.name, ""))
            for option in dataclasses.fields(kind)
        ]
    return {command: result.pop(command), **result} if command in result and command != "train" else result


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _docstrings() -> dict[str, dict[str, str]]:
    """Class -> field -> the string under the field, read from the source of the schema."""
    result: dict[str, dict[str, str]] = {}
    for node in [*ast.parse(inspect.getsource(schema)).body, *ast.parse(inspect.getsource(commands)).body]:
        if not isinstance(node, ast.ClassDef):
            continue
        for above, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(above, ast.AnnAssign)
                and isinstance(above.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                result.setdefault(node.name, {})[above.target.id] = " ".join(str(below.value.value).split())
    return result


def groups(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Group -> the names of its files, over all configuration folders."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*/*.yaml")):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def config_folder(text: str) -> Path:
    """The folder given by --config-dir (raises UserError if there is none)."""
    folder = Path(text).expanduser().absolute()
    if not folder.is_dir():
        raise refusal("--config-dir", text, "no such folder", allowed="a folder laid out like conf/", instead="a folder with e.g. experiment/mine.yaml in it")
    return folder


def normalise(command: str, overrides: list[str], *, folders: list[Path]) -> list[str]:
    """Check every override against the schema and the groups, and return them in the form Hydra wants (raises UserError).

    `+` is optional in front of keys that exist, and model.config and engine.config_overrides may grow new keys without it.
    """
    known = groups(folders)
    allowed = sections(command)
    return [_normalise_one(text, command, known, allowed) for text in overrides]


def _normalise_one(text: str, command: str, known: dict[str, list[str]], allowed: dict[str, list[Field]]) -> str:
    match = _OVERRIDE.match(text)
    if match is None or (match["equals"] is None and match["prefix"] != "~"):
        raise refusal("argument", text, "not an override", allowed="key=value", instead=f"{text.strip('=')}=VALUE, or `hybridtrain {command} --help`")
    prefix, key, value = match["prefix"] or "", match["key"].strip(), (match["value"] or "").strip()
    group = key.partition("@")[0]
    if group in known or key.startswith(("hydra.", "hydra/")):
        if group == CLUSTER and command != "submit":
            raise refusal(
                group, value, f"`{command}` runs where it is called", allowed="for `hybridtrain submit`", instead=f"hybridtrain submit {group}={value}"
            )
        if group in known and prefix != "~":
            _check_choice(group, value, known[group])
            prefix = ""
    elif prefix != "~" and key.startswith(FREE_FORM):
        prefix = "++"
    else:
        check_key(key, value=value, allowed=allowed, groups=list(known))
        prefix = "++" if prefix == "+" or (key in MAPPINGS and not prefix) else prefix
    return f"{prefix}{key}{match['equals'] or ''}"


def _check_choice(group: str, value: str, names: list[str]) -> None:
    # Sweeps (a,b or choice(a,b)), interpolations and quoted names are left to Hydra's own grammar.
    if value in (*names, "null") or not re.fullmatch(r"[\w.-]+", value):
        return
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.3)
    raise refusal(group, value, f"there is no {group}/{value}.yaml", allowed=", ".join(names), instead=f"{group}={near[0] if near else names[0]}")


def check_key(key: str, *, value: object, allowed: dict[str, list[Field]], groups: list[str]) -> None:
    """Refuse a key that the schema does not have, naming the nearest one (raises UserError)."""
    section, _, name = key.partition(".")
    keys = [field.key for fields in allowed.values() for field in fields]
    if key in keys or key.startswith(FREE_FORM):
        return
    if NOT_YET.search(key):
        raise refusal(
            key,
            value,
            "low-rank adapters (LoRA, PEFT) are not supported yet",
            allowed="training of all parameters, or of those that model.freeze leaves",
            instead="model.freeze=['model.embed_tokens.*']",
        )
    if section in allowed and not name:
        options = ", ".join(field.key for field in allowed[section])
        raise refusal(key, value, f"{key} is a section", allowed=options, instead=f"{allowed[section][0].key}=VALUE")
    where = [k for k in keys if k.startswith(section + ".")] or [*keys, *groups]
    raise refusal(
        key,
        value,
        "no such option",
        allowed=f"{section}: " + ", ".join(k.partition(".")[2] for k in where) if section in allowed else "sections " + ", ".join(allowed),
        instead=nearest(key, keys=keys, groups=groups),
    )


def nearest(key: str, *, keys: list[str], groups: list[str]) -> str:
    """The option or group whose name is closest: the same last part first, then the same section, then anything."""
    section, _, leaf = key.rpartition(".")
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    siblings = difflib.get_close_matches(key, [k for k in keys if section and k.startswith(section + ".")], n=1, cutoff=0.6)
    anywhere = difflib.get_close_matches(key, [*keys, *groups], n=1, cutoff=0.5)
    leaves = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.6)
    by_leaf = [k for k in keys if leaves and k.endswith("." + leaves[0])]
    best = siblings or (difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)) or anywhere or by_leaf
    return f"{best[0]}=VALUE" if best else "`--help` lists all options"
