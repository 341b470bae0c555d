"""The keys of a command line: options of the schema and groups in conf/, and the nearest
one to a wrong key."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybridtrain.config import adapters, commands, migrate, optim, precision, quantize, schema
from hybridtrain.config import sections as training_sections
from hybridtrain.errors import refusal

FREE_FORM = (
    "model.config.",
    "engine.config_overrides.",
    "optim.options.",
    "schedule.options.",
    "cluster.environment.",
    "cluster.sbatch.",
)  # keys of other libraries, not checked here
EXPERIMENT = "experiment"  # the group that every command has; its files set options of any section
OPTIONAL = ("model", "data", "experiment")  # groups of which no file is chosen by default
MAPPINGS = (
    "data.blend",
    "engine.config_overrides",
    "optim.options",
    "schedule.options",
    "cluster.environment",
    "cluster.sbatch",
)  # the value is {key:value, ...}
TEXT_MAPPINGS = ("data.blend", "cluster.environment", "cluster.sbatch")  # with string keys
PATHS = (
    *(
        "run.dir",
        "run.branch_from",
        "runs.folder",
        "data.path",
        "data.blend",
        "data.eval_path",
        "data.source",
        "data.tokenizer",
        "model.from_pretrained",
    ),
    *(
        "export.checkpoint",
        "export.out",
        "evaluate.source",
        "lm_eval.task_folder",
        "compare.sources",
        "quantize.source",
        "quantize.out",
        "quantize.plan",
        "quantize.prompts_file",
        "compare.out",
        "generate.source",
        "report.out",
        "report.compare",
        "bench.out",
        "generate.prompts_file",
        "inference.offload_folder",
    ),
    *("cluster.python", "cluster.container_image"),
)
"""Options that may be paths; in `data.blend` the keys. compose.to_dataclasses expands a leading ~."""
SYNONYMS = {
    "precision": {
        "bf16": "bf16_mixed",
        "bfloat16": "bf16_mixed",
        "fp16": "fp16_mixed",
        "float16": "fp16_mixed",
        "float32": "fp32",
        "fp8": "fp8_tensorwise",
        "mixed": "bf16_mixed",
    },
}
"""Group -> name often written -> the file of conf/ to suggest."""
ADAPTERS = re.compile(r"lora|peft|adapter", re.IGNORECASE)


class Field(NamedTuple):
    """One option: its dotted key, its type as written in the schema, its default and its docstring."""

    key: str
    type: str
    default: Any
    doc: str


def conf_folder() -> Path:
    """The folder conf/."""
    return data_folder("conf")


def data_folder(name: str) -> Path:
    """A folder of files that belong to the package: inside it in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


@functools.cache
def sections(command: str) -> dict[str, list[Field]]:
    """The sections of `command` and their options, in the schema's order; the command's
    own section comes first.
    """
    result = {
        section.name: _fields(section.name, section.default_factory)
        for section in dataclasses.fields(schema.ROOTS[command])
    }
    return {command: result.pop(command), **result} if command in result and command != "train" else result


@functools.cache
def all_sections() -> dict[str, list[Field]]:
    """The sections of all commands and their options."""
    return {name: _fields(name, kind) for name, kind in schema.SECTIONS.items()}


def _fields(section: str, kind: Any) -> list[Field]:
    docs = {
        name: doc
        for base in reversed(kind.__mro__)
        for name, doc in _docstrings().get(base.__name__, {}).items()
    }
    return [
        Field(f"{section}.{option.name}", str(option.type), _default(option), docs.get(option.name, ""))
        for option in dataclasses.fields(kind)
    ]


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


@functools.cache
def _docstrings() -> dict[str, dict[str, str]]:
    """Class -> field -> the docstring below the field, from the source."""
    result: dict[str, dict[str, str]] = {}
    for node in [
        node
        for module in (training_sections, optim, adapters, precision, commands, quantize)
        for node in ast.parse(inspect.getsource(module)).body
    ]:
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


def groups_of(command: str, known: dict[str, list[str]]) -> dict[str, list[str]]:
    """The groups among `known` whose files `command` accepts: those of its sections, and experiments."""
    return {
        group: names for group, names in known.items() if group == EXPERIMENT or group in sections(command)
    }


def groups(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Group -> the names of its files in all configuration folders."""
    result: dict[str, set[str]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*/*.yaml")):
            result.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(result.items())}


def is_known(key: str, allowed: dict[str, list[Field]]) -> bool:
    section = key.partition(".")[0]
    return section in allowed and (
        key.startswith(FREE_FORM) or any(field.key == key for field in allowed[section])
    )


def nearest_name(value: str, names: Sequence[str]) -> str:
    """The name most similar to `value`; the first if none is similar."""
    synonyms = {text: name for group in SYNONYMS.values() for text, name in group.items()}
    near = (
        [synonyms[value]]
        if synonyms.get(value) in names
        else difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    )
    return near[0] if near else names[0]


def check_key(key: str, *, value: object, allowed: dict[str, list[Field]], groups: list[str]) -> None:
    """Raise UserError, suggesting the nearest key, for one that the schema does not have."""
    section, _, name = key.partition(".")
    keys = [field.key for fields in allowed.values() for field in fields]
    if is_known(key, allowed):
        return
    if key in migrate.RENAMED:
        now = migrate.RENAMED[key]
        raise refusal(
            key, value, f"no such option; it has been renamed to {now}", allowed=now, instead=f"{now}=VALUE"
        )
    if ADAPTERS.search(key):
        raise refusal(
            key,
            value,
            "no such option; those of low-rank adapters (LoRA) are in the section adapters",
            allowed=", ".join(field.key for field in allowed.get("adapters", [])) or "hybridtrain train",
            instead="adapters=lora adapters.rank=16",
        )
    if section in allowed and not name:
        options = ", ".join(field.key for field in allowed[section])
        raise refusal(
            key, value, f"{key} is a section", allowed=options, instead=f"{allowed[section][0].key}=VALUE"
        )
    siblings = [k for k in keys if k.startswith(section + ".")]
    raise refusal(
        key,
        value,
        "no such option",
        allowed=f"{section}: " + ", ".join(k.partition(".")[2] for k in siblings)
        if section in allowed
        else "sections " + ", ".join(allowed),
        instead=_nearest_key(key, keys=keys, groups=groups),
    )


def _nearest_key(key: str, *, keys: list[str], groups: list[str]) -> str:
    """`KEY=VALUE` with the most similar option or group: of the same section, else with the same
    last part, else any.
    """
    section, _, leaf = key.rpartition(".")
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    siblings = difflib.get_close_matches(
        key, [k for k in keys if section and k.startswith(section + ".")], n=1, cutoff=0.6
    )
    anywhere = difflib.get_close_matches(key, [*keys, *groups], n=1, cutoff=0.5)
    leaves = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.6)
    by_leaf = [k for k in keys if leaves and k.endswith("." + leaves[0])]
    best = siblings or (difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)) or anywhere or by_leaf
    return f"{best[0]}=VALUE" if best else "`--help` lists all options"
