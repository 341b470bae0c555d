"""Composes the configuration with Hydra: command line -> YAML -> dataclasses, and back to YAML.

conf/base.yaml + groups + experiment + overrides
    --compose-->  schema.over_files  --to_dataclasses-->
    schema.ROOTS[command]  --to_yaml-->  <run>/config.yaml

Files may set options of any section; a command keeps its own sections. A command without training sections,
if no file is chosen, composes its own sections only. Only this file and sweep.py import hydra.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from hybridtrain.config import keys, limits, migrate, schema, sections, words
from hybridtrain.config.interpolations import Interpolated, keep_calls, marked
from hybridtrain.config.overrides import CommandLine, config_folder, normalize
from hybridtrain.errors import UserError, refusal

OVER_RUN = ("evaluate", "compare", "quantize")
"""Commands whose options are laid over those of a run."""
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, RecursionError)
"""Exceptions of a configuration that does not compose; `translate` turns them into a UserError."""
_SETS_VOCAB_SIZE = re.compile(r"\+*model\.config(\.vocab_size)?=")


RootT = TypeVar("RootT", bound=schema.Root)
DEFAULT_NAME = "default"
"""Name of a run without run.name and experiment."""


def compose(command: str, argv: list[str]) -> schema.Root:
    """Compose the configuration of `command` from overrides and `--config-dir DIR`. Raises UserError.

    Empty run.name and run.dir become the experiment's name (else "default") and runs/<name>. `given` of the
    result holds the options that the command line sets; for commands that override
    a run's options those of chosen files too.
    """
    overrides, folders = split(argv)
    line = normalize(command, overrides, folders=[keys.conf_folder(), *folders])
    try:
        config = to_dataclasses(compose_node(command, line, folders), schema.ROOTS[command])
        config.given = line.given
        if (
            isinstance(config, schema.Config)
            and "run.plugins" not in line.given
            and any(map(_is_of_run, folders))
        ):
            config.run.plugins = []  # as in `read_run`; a job's command line names its plugins
        if isinstance(config, schema.Config):
            vocab = config.model.config.get("vocab_size")
            if type(vocab) is int and not any(_SETS_VOCAB_SIZE.match(text) for text in line.overrides):
                config.model.config["vocab_size"] = sections.Suggested(vocab)
        if line.chosen_files and command in OVER_RUN:
            config.given |= _set_in_files(command, line, folders)
        return config
    except COMPOSE_ERRORS as error:
        raise translate(error, argv=overrides) from error


def _is_of_run(folder: Path) -> bool:
    """Whether `submit` wrote this configuration folder into a run; such a folder must not permit the
    reader to run code.
    """
    return folder.resolve().parts[-2:] == ("submit", "conf")


def train_config(argv: list[str]) -> schema.Config:
    """`compose` for the command `train`."""
    config = compose("train", argv)
    assert isinstance(config, schema.Config)
    return config


def compose_node(command: str, line: CommandLine, folders: list[Path]) -> DictConfig:
    """The composed OmegaConf node, with run.name and run.dir filled in."""
    root = schema.ROOTS[command]
    over_files = line.chosen_files or issubclass(root, schema.Config)
    node = _compose(
        schema.over_files(root) if over_files else root,
        line,
        folders,
        primary="base" if over_files else "schema",
    )
    if "run" in node and not node.run.name:
        node.run.name = _experiment(line.overrides)
    if "run" in node and not node.run.dir:
        node.run.dir = "runs/${run.name}"
    return node


def _compose(root: Any, line: CommandLine, folders: list[Path], *, primary: str) -> DictConfig:
    """Compose the file `primary` over the schema `root`."""
    search = "hydra.searchpath=[" + ",".join(words.quoted(f"file://{folder}") for folder in folders) + "]"
    ConfigStore.instance().store(name="schema", node=root)
    with initialize_config_dir(version_base="1.3", config_dir=str(keys.conf_folder())):
        node = hydra_compose(primary, overrides=[*line.overrides, search] if folders else line.overrides)
    for key, mapping in line.mappings:
        OmegaConf.update(node, key, mapping, merge=True, force_add=True)
    for text in line.overrides:  # RoPE scaling of another type replaces the file's, is not merged
        if text.startswith(("++model.config.rope_scaling={", "++model.config.rope_parameters={")):
            [override] = OverridesParser.create().parse_overrides([text])
            value = override.value()
            if isinstance(value, dict) and {"rope_type", "type"} & {str(name) for name in value}:
                OmegaConf.update(
                    node,
                    override.key_or_group,
                    {str(name): item for name, item in value.items()},
                    merge=False,
                    force_add=True,
                )
    return node


def _set_in_files(command: str, line: CommandLine, folders: list[Path]) -> frozenset[str]:
    """Options that a chosen file sets: those that have a value when the schema has no defaults."""
    bare = OmegaConf.structured(schema.over_files(schema.ROOTS[command]))
    options = [field.key for fields in keys.sections(command).values() for field in fields]
    for key in options:
        OmegaConf.update(bare, key, "???")
    node = _compose(bare, line, folders, primary="base")
    return frozenset(
        key for key in options if not OmegaConf.is_missing(node[key.partition(".")[0]], key.partition(".")[2])
    )


def split(argv: list[str]) -> tuple[list[str], list[Path]]:
    """(overrides, folders of `--config-dir`) of a command line. Raises UserError for another flag."""
    overrides: list[str] = []
    folders: list[Path] = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config-dir" or argument.startswith("--config-dir="):
            folders.append(config_folder(argument.partition("=")[2] or next(rest, "")))
        elif argument.startswith("-"):
            raise refusal(
                "argument",
                argument,
                "no such flag",
                allowed="--help, --cfg job, --config-dir DIR, --multirun, --nproc N",
                instead="key=value",
            )
        else:
            overrides.append(argument)
    return overrides, folders


def _experiment(overrides: list[str]) -> str:
    chosen = [text.partition("=")[2].strip("'\" ") for text in overrides if text.startswith("experiment=")]
    return chosen[-1] if chosen and chosen[-1] not in ("", "null") else DEFAULT_NAME


def to_dataclasses(node: DictConfig, root: type[RootT]) -> RootT:
    """The sections of `root` in a composed node; resolves interpolations and expands a leading ~ of paths."""
    config = root()
    for section in dataclasses.fields(config):
        values, resolved = getattr(config, section.name), OmegaConf.to_object(node[section.name])
        for option in dataclasses.fields(values):
            value = marked(getattr(resolved, option.name), node[section.name]._get_node(option.name), node)
            if _contains_section(value):
                key = f"{section.name}.{option.name}"
                raise refusal(
                    key,
                    "${...}",
                    "it refers to a whole section",
                    allowed="references to single options",
                    instead=f"{key}=VALUE",
                )
            setattr(
                values,
                option.name,
                _expand(value) if f"{section.name}.{option.name}" in keys.PATHS else value,
            )
    return config


def _contains_section(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(_contains_section(item) for item in (value.values() if isinstance(value, dict) else value))
    return dataclasses.is_dataclass(value)


def _expand(value: Any) -> Any:
    """Expand ~ and ~user in paths; in a mapping, in the keys."""
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if isinstance(value, dict):
        return {_expand(key): item for key, item in value.items()}
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    return Interpolated(path, value.source) if isinstance(value, Interpolated) else path


def to_yaml(config: schema.Root) -> str:
    """The resolved configuration as YAML.

    Strings from a resolver (`${oc.env:...}`) are written as the reference.
    """
    # OmegaConf's dumper, not PyYAML's: the two disagree on what is a float ("1e-3").
    return OmegaConf.to_yaml(OmegaConf.create(_public(dataclasses.asdict(config), escape=True)))


def public(config: schema.Root) -> dict[str, dict[str, Any]]:
    """section -> option -> value without secrets of the environment, for files, trackers, logs and reports.

    Strings from a resolver such as oc.env, directly or through other options, are given as the reference.
    """
    return {
        section: _public(options, escape=False) for section, options in dataclasses.asdict(config).items()
    }


def public_value(value: Any) -> Any:
    """One value of a config, as in `public`."""
    return _public(value, escape=False)


def _public(value: Any, *, escape: bool) -> Any:
    """`escape`: escape a `${` that is no reference, so that OmegaConf reads the text back unchanged."""
    if isinstance(value, dict):
        return {key: _public(item, escape=escape) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item, escape=escape) for item in value]
    if isinstance(value, sections.Suggested):
        return int(value)
    if isinstance(value, Interpolated):
        return value.source
    return words.escaped(value) if escape and isinstance(value, str) and "${" in value else value


def read_run(path: Path) -> schema.Config:
    """The config.yaml of a run that may be somebody else's: it cannot run code or read the environment.

    Raises UserError. Calls such as `${oc.env:X}` stay text; model.trust_remote_code and run.plugins are
    reset, for they count only from the reader's command line and files. Only sections of `train` are kept.
    Used everywhere except to resume one's own run.
    """
    if not path.is_file():
        raise refusal(
            "run.dir",
            path.parent,
            f"there is no {path.name} in it",
            allowed="the folder of a run",
            instead="run.dir=runs/<name>",
        )
    others = schema.SECTIONS.keys() - keys.sections("train").keys()
    try:
        loaded = _load_yaml(limits.read(path))
        if not isinstance(loaded, DictConfig):
            raise limits.unfit(path, "is not a configuration")
        sections = OmegaConf.to_container(loaded, resolve=False)
        assert isinstance(sections, dict)
        kept = {name: options for name, options in migrate.migrated(sections).items() if name not in others}
        merged = OmegaConf.merge(OmegaConf.structured(schema.Config), OmegaConf.create(kept))
        assert isinstance(merged, DictConfig)
        _keep_calls(merged, path)
        config = to_dataclasses(merged, schema.Config)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise translate(error, source=path) from error
    config.model.trust_remote_code, config.run.plugins = False, []
    return config


def override(run: schema.Config, *, by: schema.Config) -> schema.Config:
    """A copy of a run's configuration, with the training options that `by` sets.

    `by` sets the options in its `given`, and those that differ from the schema's default.
    """
    result, default = copy.deepcopy(run), schema.Config()
    for section in dataclasses.fields(schema.Config):
        options, defaults = getattr(by, section.name), getattr(default, section.name)
        for option in dataclasses.fields(options):
            value = getattr(options, option.name)
            if f"{section.name}.{option.name}" in by.given or value != getattr(defaults, option.name):
                setattr(getattr(result, section.name), option.name, value)
    return result


def _load_yaml(text: str) -> Any:
    """The content of a YAML text; None for a single value, for which OmegaConf raises an IOError."""
    try:
        return OmegaConf.load(io.StringIO(text))
    except OSError:
        return None


def _keep_calls(node: DictConfig, path: Path) -> None:
    try:
        keep_calls(node, node)
    except ValueError as error:
        raise limits.unfit(path, str(error)) from error


_EXAMPLES = {
    "train.steps": 1000,
    "train.tokens": 1_000_000_000,
    "train.epochs": 1,
    "precision.static_scale": 1024,
}


def _suggestion(option: keys.Field, value: str) -> str:
    """A valid override for an option that does not accept `value`: a similar value, else an
    example or the default.
    """
    if option.type == "int":
        try:
            return f"{option.key}={round(float(value))}"
        except (ValueError, OverflowError):
            pass
    if option.type.startswith("list") and value not in ("", "null") and not value.startswith("["):
        return f"{option.key}=[{value}]"
    fallback = _EXAMPLES.get(option.key, option.default)
    return f"{option.key}={'VALUE' if fallback in ('', [], {}) else fallback}"


def translate(error: Exception, *, source: Path | None = None, argv: Sequence[str] = ()) -> UserError:
    """A UserError (option, value, what is allowed, what to try) from an error of Hydra or OmegaConf."""
    cause: BaseException = error
    while isinstance(cause, HydraException) and (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    key = str(getattr(cause, "full_key", None) or "")
    file = re.match(r"In '(.+?)':", str(error))
    where = f" (in {source})" if source else f" (in {file[1]}.yaml)" if file else ""
    if isinstance(cause, ConfigKeyError) and key:
        if source and (unknown := migrate.of_another_version(key, file=source)):
            return unknown
        try:
            keys.check_key(
                key,
                value="..." + where,
                allowed=keys.all_sections(),
                groups=list(keys.groups([keys.conf_folder()])),
            )
        except UserError as unknown:
            return unknown
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    option = next(
        (
            field
            for fields in keys.all_sections().values()
            for field in fields
            if key == field.key or key.startswith(field.key + "[")
        ),
        None,
    )
    if option is not None:
        values = [text.partition("=")[2] for text in argv if text.lstrip("+").startswith(f"{option.key}=")]
        match = re.search(r"[Vv]alue '(.*?)'", first)
        value = match[1] if match else values[-1] if values else "..."
        return refusal(
            key,
            value,
            first + where,
            allowed=f"a value of type {option.type}: {option.doc}",
            instead=_suggestion(option, value),
        )
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return UserError(
        f"the configuration does not compose{f' (in {source})' if source else ''}:\n  "
        + "\n  ".join(lines[:6])
    )
