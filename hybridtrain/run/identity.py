"""Which run a command continues or starts: its directory, and the options that must not change.

These options are the run's identity: model, data, optimizer, schedule, seed, global batch size and
run.branch_from. A command with the same identity continues the run in its directory, any other starts a new
run. Reads only; no torch.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain.config import compose, migrate
from hybridtrain.config.schema import Config
from hybridtrain.errors import UserError, refusal
from hybridtrain.run import lock
from hybridtrain.runtime.files import check_outside_checkpoints
from hybridtrain.types import ModelFacts, Progress

_WHOLE_SECTIONS = ("model", "adapters", "task", "data", "optim", "schedule")
_NOT_IDENTITY = ("model.name", "model.attention", "model.trust_remote_code", "optim.ema")
"""They do not change the model, nor its training."""
_SINGLE_FIELDS = (
    *(
        "run.seed",
        "run.branch_from",
        "batch.global_batch_size",
        "batch.ramp_start",
        "batch.ramp_increment",
        "batch.ramp_steps",
    ),
    *("batch.seq_len_start", "batch.seq_len_steps"),
)
# options of the command
_INVOCATION = ("run.dir", "run.name", "run.resume", "run.allow_data_change", "run.takeover")
_UNSET = "(not set)"
_TASK = "next-token prediction"
WRITES = (
    "model",
    "checkpoints",
    "failures",
    "trackers",
    "metrics.jsonl",
    "events.jsonl",
    "samples.jsonl",
    "summary.json",
    "machine.json",
    "deepspeed.json",
    "branch.json",
)
"""What a run writes besides config.yaml. In a folder without config.yaml they belong to something else, as
do logs of ranks."""


@dataclass(frozen=True)
class Choice:
    """The directory of a run."""

    path: Path
    before: Config | None
    """Config of the last attempt of the run in it; None: a new run."""
    differing: str
    """If `path` has a number because another run is in the default directory: options in which that
    run differs; else empty."""


def choose(config: Config) -> Choice:
    """The directory of the run that `config` continues or starts.

    If the default directory has a run of another identity, the next number is tried (runs/name-2).
    Raises UserError for an explicit run.dir that has another run or is no run's folder, and for
    what run.resume rules out.
    """
    base = Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name
    explicit = base != Path("runs") / config.run.name
    number, others = 1, ""
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        _check_source(config, path=path)
        if not _holds_run(path):
            if config.run.resume == "required":
                raise not_resumable(path, words=" of this run")
            return Choice(path, None, others)
        before = compose.read_run(path / "config.yaml")
        # Only the command line gives these permissions.
        before.model.trust_remote_code, before.run.plugins = (
            config.model.trust_remote_code,
            config.run.plugins,
        )
        differing = {
            key: pair for key, pair in differences(before, config).items() if _is_identity(key, config)
        }
        if explicit and differing:
            raise _another_run(path, differing)
        if not differing:
            if config.run.resume == "never":
                raise refusal(
                    "run.resume",
                    "never",
                    f"{path} holds a run already",
                    allowed="a directory without a run",
                    instead="another run.dir, or run.resume=auto",
                )
            return Choice(path, before, others)
        others = others or ", ".join(sorted(differing)[:3])
        number += 1


def with_earlier_values(config: Config) -> Config:
    """`config`, with the values of the run that it continues for options that an earlier version lacked
    (migrate.ABSENT_WITH), unless the command sets them.
    """
    defaults = Config()
    unset = [
        option
        for (key, value), values in migrate.ABSENT_WITH.items()
        if _option(config, key) == value
        for option in values
        if option not in config.given and _option(config, option) == _option(defaults, option)
    ]
    try:
        before = choose(config).before if unset else None
    except UserError:  # raised again when the directory is opened
        return config
    if before is None:
        return config
    result = copy.deepcopy(config)
    for key in unset:
        section, _, name = key.partition(".")
        setattr(getattr(result, section), name, _option(before, key))
    return result


def _option(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def not_resumable(path: Path, *, words: str) -> UserError:
    """The refusal of run.resume=required without a checkpoint."""
    problem = f"{path} holds no complete checkpoint{words}"
    return refusal(
        "run.resume",
        "required",
        problem,
        allowed="a run with a complete checkpoint",
        instead="run.resume=auto, or the run's own run.dir",
    )


def _check_source(config: Config, *, path: Path) -> None:
    """Refuse to overwrite the model that the run starts from (raises UserError)."""
    source, target = config.model.from_pretrained, path / "model"
    if source and target.exists() and Path(source).exists() and Path(source).resolve() == target.resolve():
        problem = f"the run would write its model's config into {target}, the model that it starts from"
        raise refusal(
            "run.dir", path, problem, allowed="a directory apart from the model's", instead="another run.dir"
        )


def _holds_run(path: Path) -> bool:
    check_outside_checkpoints(path, field="run.dir")
    if (path / "config.yaml").is_file():
        return True
    if path.exists() and not path.is_dir():
        raise refusal(
            "run.dir",
            path,
            "it is a file",
            allowed="a run's folder, or one without a run",
            instead="another run.dir",
        )
    for name in _leftovers(path):
        problem = (
            f"it has {name} but no config.yaml, so this may not be a run's, and a run would overwrite it"
        )
        raise refusal(
            "run.dir",
            path,
            problem,
            allowed="a run's folder, or one without what a run writes",
            instead="another run.dir",
        )
    return False


def _leftovers(path: Path) -> Iterator[str]:
    yield from (name for name in WRITES if (path / name).exists() or (path / name).is_symlink())
    yield from (f"logs/{log.name}" for log in path.glob("logs/rank-*.log"))
    if lock.is_foreign(path):
        yield lock.NAME


def _another_run(path: Path, differing: Mapping[str, tuple[object, object]]) -> UserError:
    instead = "another run.dir"
    if not any(key.startswith(("model.", "adapters.")) for key in differing):  # a branch keeps the model
        instead += f"; run.branch_from={path} with it, to begin from what is trained here"
    return refusal(
        "run.dir",
        path,
        f"it holds another run: {describe(differing)}",
        allowed="the same values, or a directory of its own",
        instead=instead,
    )


def describe(differing: Mapping[str, tuple[object, object]]) -> str:
    """`differences` as text."""
    return "; ".join(
        f"{key} was {_text(before)} and is {_text(now)}" for key, (before, now) in sorted(differing.items())
    )


def _text(value: object) -> str:
    return str(value) if value is _UNSET else repr(value)


def _is_identity(key: str, config: Config) -> bool:
    section = key.partition(".")[0]
    if section == "data" and config.run.allow_data_change:
        return key == "data.seq_len"
    return key in _SINGLE_FIELDS or (section in _WHOLE_SECTIONS and key not in _NOT_IDENTITY)


def model_differences(before: Config, now: Config) -> dict[str, tuple[object, object]]:
    """`differences` that change the model."""
    return {
        key: pair
        for key, pair in differences(before, now).items()
        if key.startswith(("model.", "adapters.")) and key not in _NOT_IDENTITY
    }


def changes(before: Config, now: Config) -> dict[str, tuple[object, object]]:
    """`differences` without options of the command itself (_INVOCATION)."""
    return {key: pair for key, pair in differences(before, now).items() if key not in _INVOCATION}


def differences(before: Config, now: Config) -> dict[str, tuple[object, object]]:
    """section.option -> (before, now), values without secrets; of mappings only the keys that differ."""
    result: dict[str, tuple[object, object]] = {}
    for section in dataclasses.fields(Config):
        old, new = getattr(before, section.name), getattr(now, section.name)
        for option in dataclasses.fields(old):
            pair = (getattr(old, option.name), getattr(new, option.name))
            public = (compose.public_value(pair[0]), compose.public_value(pair[1]))
            if not (_same(*pair) or _same(*public)):
                result |= _flat(f"{section.name}.{option.name}", public)
    return result


def _flat(name: str, pair: tuple[Any, Any]) -> dict[str, tuple[object, object]]:
    before, now = pair
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return {name: pair}
    values = {
        key: (before.get(key, _UNSET), now.get(key, _UNSET)) for key in sorted(before.keys() | now.keys())
    }
    return {
        flat_name: flat_pair
        for key, both in values.items()
        if not _same(*both)
        for flat_name, flat_pair in _flat(f"{name}.{key}", both).items()
    }


def _same(old: Any, new: Any) -> bool:
    """Whether values are equal up to a YAML round trip: 1 and 1.0, a tuple and a list, and two
    NaN are the same.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() == new.keys() and all(_same(value, new[key]) for key, value in old.items())
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new):
        return True
    return bool(old == new) and isinstance(old, bool) == isinstance(new, bool)


def model_fingerprint(facts: ModelFacts) -> str:
    """Fingerprint of a model, for checkpoints.

    What older versions did not have is left out if empty; so is what follows from the rest, and dropout,
    which is of the training.
    """
    kinds = ("labels", "head", "encoder", "pairs")
    known = {name: value for name, value in dataclasses.asdict(facts).items() if name not in kinds or value}
    later = ("full_layers", "layer_parameters", "layer_inactive", "adapters", "refused", "shared", "cuts")
    for name in (
        *later,
        "adapter_values",
        "quantised",
        "row_blocks",
        "sliced",
        "stored",
        "sequence",
        "whole",
        "dropped",
    ):
        del known[name]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def other_base(before: str | None, now: str | None) -> UserError:
    """The refusal of adapters on other weights than those that they were trained on."""
    return refusal(
        "model.from_pretrained",
        now or "(no adapters)",
        f"the checkpoint has adapters of other weights ({before or 'none'})",
        allowed="the weights that the run began with, which its checkpoints do not hold",
        instead="those weights, or a new run.dir",
    )


def check_fingerprints(
    progress: Progress,
    *,
    fingerprints: Mapping[str, str],
    data: tuple[str, str],
    run: Path,
    allow_data_change: bool,
) -> tuple[str, ...]:
    """Compare the fingerprints of a checkpoint with those of `run`, which resumes from it.

    Returns the names that differ and are allowed to. `model` and `task` must be the same, others (data,
    order, tokens) unless `allow_data_change`. Raises UserError. `data`: (option that names the run's data,
    its value), for messages. `tokens`, a hash of a sample of files that no other fingerprint covers, is
    compared only if both have it: version 0.1 had none.
    """
    step, before = progress.step, progress.fingerprints
    names = sorted(
        (set(before) | set(fingerprints))
        - (set() if "tokens" in before and "tokens" in fingerprints else {"tokens"})
    )
    differing = tuple(name for name in names if before.get(name) != fingerprints.get(name))
    if "model" in differing:
        raise refusal(
            "model",
            fingerprints.get("model"),
            f"the checkpoint of step {step} is of another model ({before.get('model')})",
            allowed="the model that the run began with",
            instead=(
                "the run's own model section, or a new run.dir "
                "with model.from_pretrained=<export of this run>"
            ),
        )
    if "task" in differing:
        problem = f"the checkpoint of step {step} was trained with {before.get('task', _TASK)}"
        instead = "Trainer(config, task=...) with that one, or a new run.dir with run.branch_from"
        raise refusal(
            "task",
            fingerprints.get("task", _TASK),
            problem,
            allowed="the task that the run began with",
            instead=instead,
        )
    if "base" in differing:
        raise other_base(before.get("base"), fingerprints.get("base"))
    if differing and not allow_data_change:
        name = next((name for name in ("data", "tokens") if name in differing), differing[0])
        known = {"data": "other data: they were prepared again since, or replaced"}
        known["tokens"] = "other token files: they have changed since"
        what = known.get(name, f"another {name}")
        raise refusal(
            *data,
            f"the checkpoint of step {step} was trained on {what} ({before.get(name)} then, "
            f"{fingerprints.get(name)} now)",
            allowed="the data and the order that the run began with",
            instead=(
                "the run's own text, prepared there again; or, to go on with what is there, "
                f"run.allow_data_change=true, or a new run.dir with run.branch_from={run}"
            ),
        )
    return differing
