"""The Hydra door: command line -> composed YAML -> typed dataclasses, and back to YAML. No other file imports hydra or omegaconf.

conf/<command>.yaml + groups + experiment + overrides  --compose-->  schema.ROOTS[command]  --to_yaml-->  <run>/config.yaml
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from hybridtrain.config import keys, schema
from hybridtrain.types import UserError, refusal

_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")  # ${oc.env:TOKEN}: a call, in contrast to ${run.name}
_VOCABULARY = re.compile(r"\+*model\.config(\.vocab_size)?=")  # asked for by this command line
_REFERENCE = re.compile(r"\$\{\s*([\w.]+)\s*\}")


NAMELESS = "default"
"""What a run is called that has neither a name nor an experiment."""


class Interpolated(str):
    """A resolved string that remembers the interpolation it came from, so that secrets never reach a file."""

    source: str

    def __new__(cls, value: str, source: str) -> Interpolated:
        made = super().__new__(cls, value)
        made.source = source
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.source


def compose(command: str, argv: list[str]) -> schema.Config:
    """Compose the configuration of `command` from overrides (and `--config-dir DIR`); raises UserError.

    run.name and run.dir are filled in when empty: the experiment's name (else "default") and runs/<name>.
    """
    overrides, folders = _split(argv)
    overrides = keys.normalise(command, overrides, folders=[keys.shipped(), *folders])
    search = "hydra.searchpath=[" + ",".join(_quoted(f"file://{folder}") for folder in folders) + "]"
    # Only this command's schema: building the nodes of all takes 50 ms of every start.
    ConfigStore.instance().store(name=f"schema_{command}", node=schema.ROOTS[command])
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(keys.shipped())):
            node = hydra_compose(command, overrides=[*overrides, search] if folders else overrides)
        experiment = _experiment(overrides)
        if not node.run.name:
            node.run.name = experiment
        if not node.run.dir:
            node.run.dir = "runs/${run.name}"
        config = typed(node)
        vocab = config.model.config.get("vocab_size")
        if type(vocab) is int and not any(_VOCABULARY.match(text) for text in overrides):
            config.model.config["vocab_size"] = schema.Suggested(vocab)
        return config
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _translated(error, command) from error


def _split(argv: list[str]) -> tuple[list[str], list[Path]]:
    overrides: list[str] = []
    folders: list[Path] = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config-dir" or argument.startswith("--config-dir="):
            folders.append(keys.config_folder(argument.partition("=")[2] or next(rest, "")))
        elif argument.startswith("-"):
            raise refusal("argument", argument, "no such flag", allowed="--help, --cfg job, --config-dir DIR, --multirun, --nproc N", instead="key=value")
        else:
            overrides.append(argument)
    return overrides, folders


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _experiment(overrides: list[str]) -> str:
    chosen = [text.partition("=")[2].strip("'\" ") for text in overrides if text.startswith("experiment=")]
    return chosen[-1] if chosen and chosen[-1] not in ("", "null") else NAMELESS


def typed(node: DictConfig) -> schema.Config:
    """A composed node as an instance of its dataclass, interpolations resolved."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, schema.Config), type(config)
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for option in dataclasses.fields(values):
            setattr(values, option.name, _marked(getattr(values, option.name), node[section.name]._get_node(option.name), node))
    return config


def _marked(value: Any, node: Any, root: DictConfig) -> Any:
    """`value` with its strings marked where they come from a resolver such as oc.env."""
    if isinstance(value, dict) and isinstance(node, DictConfig) and not node._is_interpolation():
        return {key: _marked(item, node._get_node(key), root) for key, item in value.items()}
    if isinstance(value, list) and isinstance(node, ListConfig) and not node._is_interpolation():
        return [_marked(item, node._get_node(index), root) for index, item in enumerate(value)]
    source = node._value() if node is not None else None
    if isinstance(value, str) and isinstance(source, str) and _from_resolver(source, root):
        return Interpolated(value, source)
    return value


def _from_resolver(source: str, root: DictConfig) -> bool:
    """Whether a resolver is called in `source`, or in a string that it refers to."""
    if _RESOLVER.search(source):
        return True
    for reference in _REFERENCE.findall(source):
        if reference.startswith("."):
            return True  # relative: not followed, kept as written
        parent, _, leaf = reference.rpartition(".")
        holder = OmegaConf.select(root, parent) if parent else root
        node = holder._get_node(leaf) if isinstance(holder, DictConfig) else None
        target = node._value() if isinstance(node, Node) else None
        if isinstance(target, str) and _from_resolver(target, root):
            return True
    return False


def to_yaml(config: schema.Config) -> str:
    """The configuration as YAML, resolved, except that strings from a resolver (`${oc.env:...}`) stay as they were written."""
    # OmegaConf's dumper and not PyYAML's: the two disagree on what is a float ("1e-3").
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def plain(config: schema.Config) -> dict[str, dict[str, Any]]:
    """section -> option -> value, as `to_yaml` writes them: what may be shown to anybody."""
    return {section: _plain(options) for section, options in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, schema.Suggested):
        return int(value)
    return value.source if isinstance(value, Interpolated) else value


def from_yaml(path: Path, command: str) -> schema.Config:
    """Read a run's config.yaml as the configuration of `command`. Sections of other commands are left out; raises UserError."""
    if not path.is_file():
        raise refusal("run.dir", path.parent, f"there is no {path.name} in it", allowed="the folder of a run", instead="run.dir=runs/<name>")
    others = set().union(*(keys.sections(name) for name in schema.ROOTS)) - set(keys.sections(command))
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise refusal("run.dir", path.parent, f"{path.name} is not a configuration", allowed="the folder of a run", instead="run.dir=runs/<name>")
        kept = OmegaConf.masked_copy(loaded, [str(key) for key in loaded if key not in others])
        merged = OmegaConf.merge(OmegaConf.structured(schema.ROOTS[command]), kept)
        assert isinstance(merged, DictConfig)
        return typed(merged)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise _translated(error, command, source=path) from error


def sweep(command: str, argv: list[str]) -> list[list[str]]:
    """Expand the sweeps in `argv` (lr=1e-3,1e-4) into one command line per job; each job gets its own run.name; raises UserError."""
    overrides, folders = _split(argv)
    overrides = keys.normalise(command, overrides, folders=[keys.shipped(), *folders])
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        [jobs] = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise _translated(error, command) from error
    flags = [flag for folder in folders for flag in ("--config-dir", str(folder))]
    own_name = any(override.key_or_group in ("run.name", "run.dir") and override.is_sweep_override() for override in parsed)
    if own_name:
        return [[*flags, *job] for job in jobs]
    return [[*flags, *job, f"run.name={compose(command, [*flags, *job]).run.name}-{number}"] for number, job in enumerate(jobs)]


def _translated(error: Exception, command: str, *, source: Path | None = None) -> UserError:
    """Hydra's and OmegaConf's errors in our form: section.field, the value, what is allowed, what to try."""
    cause: BaseException = error
    while isinstance(cause, HydraException) and (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    key = str(getattr(cause, "full_key", None) or "")
    file = re.match(r"In '(.+?)':", str(error))
    where = f" (in {source})" if source else f" (in {file[1]}.yaml)" if file else ""
    if isinstance(cause, ConfigKeyError) and key:
        allowed = keys.sections(command)
        try:
            keys.check_key(key, value="..." + where, allowed=allowed, groups=list(keys.groups([keys.shipped()])))
        except UserError as refused:
            return refused
    first = str(cause).strip().splitlines()[0]
    option = next((field for fields in keys.sections(command).values() for field in fields if key == field.key or key.startswith(field.key + "[")), None)
    if option is not None:
        value = re.search(r"[Vv]alue '(.*?)'", first)
        return refusal(
            key, value[1] if value else "...", first + where, allowed=f"a value of type {option.type}: {option.doc}", instead=f"{option.key}={option.default}"
        )
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return UserError(f"the configuration does not compose{f' (in {source})' if source else ''}:\n  " + "\n  ".join(lines[:6]))
