"""The Hydra door: command line -> composed YAML -> typed dataclasses, and back to YAML.

conf/base.yaml + groups + experiment + overrides
    --compose-->  schema.over_files  --typed-->  schema.ROOTS[command]  --to_yaml-->  <run>/config.yaml

Files may set options of any section; a command keeps its own. A command without sections of training that is
given no file composes its own alone. Beside sweep.py the only file that imports hydra.
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
from hybridtrain.config.overrides import Prepared, config_folder, normalise
from hybridtrain.errors import UserError, refusal

FAILURES = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, RecursionError)
"""What a configuration that does not compose can raise; `translated` makes a UserError of it."""
_VOCABULARY = re.compile(r"\+*model\.config(\.vocab_size)?=")  # asked for by this command line


RootT = TypeVar("RootT", bound=schema.Root)
NAMELESS = "default"
"""What a run is called that has neither a name nor an experiment."""


def compose(command: str, argv: list[str]) -> schema.Root:
    """Compose the configuration of `command` from overrides (and `--config-dir DIR`); raises UserError.

    run.name and run.dir are filled in when empty: the experiment's name (else "default") and runs/<name>.
    `given` of the result names the options that the command line or a file that it chooses sets.
    """
    overrides, folders = split(argv)
    prepared = normalise(command, overrides, folders=[keys.shipped(), *folders])
    try:
        config = typed(composed(command, prepared, folders), schema.ROOTS[command])
        config.given = prepared.given
        if isinstance(config, schema.Config) and "run.plugins" not in prepared.given and any(map(_of_run, folders)):
            config.run.plugins = []  # as in `read_run`: those of a job stand on its command line
        if isinstance(config, schema.Config):
            vocab = config.model.config.get("vocab_size")
            if type(vocab) is int and not any(_VOCABULARY.match(text) for text in prepared.overrides):
                config.model.config["vocab_size"] = sections.Suggested(vocab)
        if prepared.chosen_files and command == "evaluate":  # the one that lays its options over those of a run
            config.given |= _set_in_files(command, prepared, folders)
        return config
    except FAILURES as error:
        raise translated(error, argv=overrides) from error


def _of_run(folder: Path) -> bool:
    """Whether a configuration folder is what `submit` has written into a run: that permits nothing, whoever is given it."""
    return folder.resolve().parts[-2:] == ("submit", "conf")


def training(argv: list[str]) -> schema.Config:
    """`compose` for the command `train`."""
    config = compose("train", argv)
    assert isinstance(config, schema.Config)
    return config


def composed(command: str, prepared: Prepared, folders: list[Path]) -> DictConfig:
    """The composed node with run.name and run.dir filled in."""
    root = schema.ROOTS[command]
    over_files = prepared.chosen_files or issubclass(root, schema.Config)
    node = _over(schema.over_files(root) if over_files else root, prepared, folders, primary="base" if over_files else "schema")
    if "run" in node and not node.run.name:
        node.run.name = _experiment(prepared.overrides)
    if "run" in node and not node.run.dir:
        node.run.dir = "runs/${run.name}"
    return node


def _over(root: Any, prepared: Prepared, folders: list[Path], *, primary: str) -> DictConfig:
    search = "hydra.searchpath=[" + ",".join(words.quoted(f"file://{folder}") for folder in folders) + "]"
    ConfigStore.instance().store(name="schema", node=root)
    with initialize_config_dir(version_base="1.3", config_dir=str(keys.shipped())):
        node = hydra_compose(primary, overrides=[*prepared.overrides, search] if folders else prepared.overrides)
    for key, mapping in prepared.mappings:
        OmegaConf.update(node, key, mapping, merge=True, force_add=True)
    for text in prepared.overrides:  # another kind of rotary positions replaces those of the model's file, with all their keys
        if text.startswith(("++model.config.rope_scaling={", "++model.config.rope_parameters={")):
            [override] = OverridesParser.create().parse_overrides([text])
            value = override.value()
            if isinstance(value, dict) and {"rope_type", "type"} & {str(name) for name in value}:
                OmegaConf.update(node, override.key_or_group, {str(name): item for name, item in value.items()}, merge=False, force_add=True)
    return node


def _set_in_files(command: str, prepared: Prepared, folders: list[Path]) -> frozenset[str]:
    """Options that a chosen file sets: those that are there when the schema has no defaults."""
    bare = OmegaConf.structured(schema.over_files(schema.ROOTS[command]))
    options = [field.key for fields in keys.sections(command).values() for field in fields]
    for key in options:
        OmegaConf.update(bare, key, "???")
    node = _over(bare, prepared, folders, primary="base")
    return frozenset(key for key in options if not OmegaConf.is_missing(node[key.partition(".")[0]], key.partition(".")[2]))


def split(argv: list[str]) -> tuple[list[str], list[Path]]:
    """The overrides of a command line, and the folders of `--config-dir`; UserError for another flag."""
    overrides: list[str] = []
    folders: list[Path] = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config-dir" or argument.startswith("--config-dir="):
            folders.append(config_folder(argument.partition("=")[2] or next(rest, "")))
        elif argument.startswith("-"):
            raise refusal("argument", argument, "no such flag", allowed="--help, --cfg job, --config-dir DIR, --multirun, --nproc N", instead="key=value")
        else:
            overrides.append(argument)
    return overrides, folders


def _experiment(overrides: list[str]) -> str:
    chosen = [text.partition("=")[2].strip("'\" ") for text in overrides if text.startswith("experiment=")]
    return chosen[-1] if chosen and chosen[-1] not in ("", "null") else NAMELESS


def typed(node: DictConfig, root: type[RootT]) -> RootT:
    """The sections of `root` in a composed node, interpolations resolved and a leading ~ of paths expanded."""
    config = root()
    for section in dataclasses.fields(config):
        values, composed = getattr(config, section.name), OmegaConf.to_object(node[section.name])
        for option in dataclasses.fields(values):
            value = marked(getattr(composed, option.name), node[section.name]._get_node(option.name), node)
            if _holds_section(value):
                key = f"{section.name}.{option.name}"
                raise refusal(key, "${...}", "it refers to a whole section", allowed="references to single options", instead=f"{key}=VALUE")
            setattr(values, option.name, _expanded(value) if f"{section.name}.{option.name}" in keys.PATHS else value)
    return config


def _holds_section(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(_holds_section(item) for item in (value.values() if isinstance(value, dict) else value))
    return dataclasses.is_dataclass(value)


def _expanded(value: Any) -> Any:
    """Paths with ~ and ~user expanded; in a mapping the keys."""
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        return {_expanded(key): item for key, item in value.items()}
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    return Interpolated(path, value.source) if isinstance(value, Interpolated) else path


def to_yaml(config: schema.Root) -> str:
    """The configuration as YAML, resolved, except that strings from a resolver (`${oc.env:...}`) stay as they were written."""
    # OmegaConf's dumper and not PyYAML's: the two disagree on what is a float ("1e-3").
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config), escape=True)))


def plain(config: schema.Root) -> dict[str, dict[str, Any]]:
    """section -> option -> value in the public form, which may leave the process (files, trackers, logs, pages).

    Text that came through a resolver such as oc.env, directly or through other options, stands as the reference that was written.
    """
    return {section: _plain(options, escape=False) for section, options in dataclasses.asdict(config).items()}


def shown(value: Any) -> Any:
    """The public form of one value of a config."""
    return _plain(value, escape=False)


def _plain(value: Any, *, escape: bool) -> Any:
    """`escape`: so that YAML with it is read as it stands, a `${` that is no reference included."""
    if isinstance(value, dict):
        return {key: _plain(item, escape=escape) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, escape=escape) for item in value]
    if isinstance(value, sections.Suggested):
        return int(value)
    if isinstance(value, Interpolated):
        return value.source
    return words.escaped(value) if escape and isinstance(value, str) and "${" in value else value


def read_run(path: Path) -> schema.Config:
    """The config.yaml of a run that is only read: calls such as `${oc.env:X}` are kept as text, and its permissions to run code are ignored.

    Used everywhere except to resume one's own run: whoever wrote the file must not read the environment of whoever opens it, and
    model.trust_remote_code and run.plugins count only from the command line (and the reader's own files). Only sections of `train` are kept. Raises UserError.
    """
    if not path.is_file():
        raise refusal("run.dir", path.parent, f"there is no {path.name} in it", allowed="the folder of a run", instead="run.dir=runs/<name>")
    others = schema.SECTIONS.keys() - keys.sections("train").keys()
    try:
        loaded = _loaded(limits.read(path))
        if not isinstance(loaded, DictConfig):
            raise limits.unfit(path, "is not a configuration")
        sections = OmegaConf.to_container(loaded, resolve=False)
        assert isinstance(sections, dict)
        kept = {name: options for name, options in migrate.migrated(sections).items() if name not in others}
        merged = OmegaConf.merge(OmegaConf.structured(schema.Config), OmegaConf.create(kept))
        assert isinstance(merged, DictConfig)
        _keep_calls(merged, path)
        config = typed(merged, schema.Config)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise translated(error, source=path) from error
    config.model.trust_remote_code, config.run.plugins = False, []
    return config


def laid_over(config: schema.Config, below: schema.Config) -> schema.Config:
    """`below`, a run's configuration, with the training options that `config` sets on top of it.

    Those are the ones that its command line gave, at the schema's default or not; of a config made in Python, those that are not at it.
    """
    result, default = copy.deepcopy(below), schema.Config()
    for section in dataclasses.fields(schema.Config):
        asked, standard = getattr(config, section.name), getattr(default, section.name)
        for option in dataclasses.fields(asked):
            value = getattr(asked, option.name)
            if f"{section.name}.{option.name}" in config.given or value != getattr(standard, option.name):
                setattr(getattr(result, section.name), option.name, value)
    return result


def _loaded(text: str) -> Any:
    """What a YAML text holds; None where it is one value, which OmegaConf calls an IOError."""
    try:
        return OmegaConf.load(io.StringIO(text))
    except OSError:
        return None


def _keep_calls(node: DictConfig, path: Path) -> None:
    try:
        keep_calls(node, node)
    except ValueError as error:
        raise limits.unfit(path, str(error)) from error


_EXAMPLES = {"train.steps": 1000, "train.tokens": 1_000_000_000, "train.epochs": 1}


def _that_fits(option: keys.Field, value: str) -> str:
    """A valid override to suggest for an option that does not accept `value`: a near value, else the default, else an example."""
    if option.type == "int":
        try:
            return f"{option.key}={round(float(value))}"
        except (ValueError, OverflowError):
            pass
    if option.type.startswith("list") and value not in ("", "null") and not value.startswith("["):
        return f"{option.key}=[{value}]"
    fallback = _EXAMPLES.get(option.key, option.default)
    return f"{option.key}={'VALUE' if fallback in ('', [], {}) else fallback}"


def translated(error: Exception, *, source: Path | None = None, argv: Sequence[str] = ()) -> UserError:
    """Hydra's and OmegaConf's errors in our form: section.field, the value, what is allowed, what to try."""
    cause: BaseException = error
    while isinstance(cause, HydraException) and (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    key = str(getattr(cause, "full_key", None) or "")
    file = re.match(r"In '(.+?)':", str(error))
    where = f" (in {source})" if source else f" (in {file[1]}.yaml)" if file else ""
    if isinstance(cause, ConfigKeyError) and key:
        if source and (refused := migrate.of_another_version(key, file=source)):
            return refused
        try:
            keys.check_key(key, value="..." + where, allowed=keys.all_sections(), groups=list(keys.groups([keys.shipped()])))
        except UserError as refused:
            return refused
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    option = next((field for fields in keys.all_sections().values() for field in fields if key == field.key or key.startswith(field.key + "[")), None)
    if option is not None:
        typed_in = [text.partition("=")[2] for text in argv if text.lstrip("+").startswith(f"{option.key}=")]
        match = re.search(r"[Vv]alue '(.*?)'", first)
        value = match[1] if match else typed_in[-1] if typed_in else "..."
        return refusal(key, value, first + where, allowed=f"a value of type {option.type}: {option.doc}", instead=_that_fits(option, value))
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return UserError(f"the configuration does not compose{f' (in {source})' if source else ''}:\n  " + "\n  ".join(lines[:6]))
