"""The run directory: which one a command continues or starts, and the files in it that tools read.

    runs/<name>/  config.yaml  summary.json  machine.json  metrics.jsonl  events.jsonl  model/  checkpoints/  export/  report/  logs/

A run's identity is what must not change while it goes on: model, data, optimizer, schedule, seed and global batch. The
same identity continues the run in its directory; another one is a new run. Everything here is for rank 0, which decides
and tells the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridtrain import log
from hybridtrain.config import compose
from hybridtrain.config.schema import Config
from hybridtrain.files import finite, number, read_json, read_object, unwritable, write_atomically, write_json, write_often
from hybridtrain.types import Progress, UserError, refusal

_log = log.get("run")

METRICS = (
    "step",
    "tokens_seen",
    "loss",
    "grad_norm",
    "lr",
    "loss_scale",
    "skipped",
    "tokens_per_s",
    "tokens_per_s_per_device",
    "step_time_s",
    "mfu",
    "max_memory_gib",
    "time",
)
"""Keys of every line of metrics.jsonl; a line may have more (eval_loss)."""
SUMMARY = (
    "status",
    "steps",
    "total_steps",
    "tokens",
    "final_loss",
    "wall_s",
    "tokens_per_s",
    "layout",
    "world_size",
    "parameters",
    "exit_reason",
    "versions",
    "git_revision",
)
"""Keys of summary.json. What the run runs on stands in machine.json: one entry per host (machine.py)."""
_NUMBERS = ("steps", "total_steps", "tokens", "final_loss", "wall_s", "tokens_per_s", "world_size", "parameters")
EVENTS = ("started", "resumed", "checkpoint", "skipped", "empty", "preempted", "finished", "failed")
"""Kinds of the lines of events.jsonl, {time, step, kind, detail}: time in seconds since 1970, step as done at that time."""
STATUSES = ("queued", "running", "finished", "preempted", "failed")

_WHOLE_SECTIONS = ("model", "data", "optim", "schedule")
_NOT_IDENTITY = ("model.name", "model.attention", "model.trust_remote_code")  # a label and two ways to run the same model
_SINGLE_FIELDS = ("run.seed", "batch.global_batch_size")
_REPEATED = ("checkpoint", "skipped", "empty")  # what happens again when a resume repeats their steps; starts and ends have happened all the same
_NOT_TOLD = ("run.dir", "run.name", "run.resume", "run.allow_data_change")  # how the command was given, nothing about the run


@dataclass(frozen=True)
class RunDir:
    """A run's directory, opened for this command."""

    path: Path
    continued: bool
    """The directory held this run already."""
    checkpoint: Path | None
    """Newest complete checkpoint to go on from; None: start at step 0."""
    life: int
    """How often the run was started before."""
    changed: Mapping[str, tuple[object, object]]
    """section.field -> (before, now) of what the command changes in a continued run; none of it is identity."""
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        """Where the model's Hugging Face config belongs, for exports."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def failures(self) -> Path:
        """What failed in this life of the run."""
        return self.path / "failures" / f"life-{self.life}"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    def append_metrics(self, values: Mapping[str, object]) -> None:
        """Add one line. Keys of METRICS that `values` lacks, and numbers that are not finite, are null. Raises UserError on a full disk."""
        self._append(self.metrics, {**dict.fromkeys(METRICS), **values})

    def append_event(self, kind: str, *, step: int, detail: str) -> None:
        """Add one line of EVENTS that happened now, when `step` steps were done. Raises UserError on a full disk."""
        assert kind in EVENTS, kind
        self._append(self.events, {"time": time.time(), "step": step, "kind": kind, "detail": detail})

    def _append(self, file: Path, values: Mapping[str, object]) -> None:
        line = json.dumps(finite(values), allow_nan=False)
        try:
            with file.open("a") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise unwritable("run.dir", self.path, error) from error

    def cut(self, step: int) -> None:
        """Keep metrics and events up to `step`, atomically, so that no step stands twice after a resume; a line torn by a kill goes too.

        The summary takes over what the last of the metrics says: a command that finds nothing left to do must not lose it.
        """
        for file in (self.metrics, self.events):
            if file.is_file():
                kept = [line for line in file.read_text(errors="replace").splitlines() if _stands(line, step=step)]
                write_atomically(file, "".join(line + "\n" for line in kept))
                if kept and file == self.metrics:
                    last = json.loads(kept[-1])
                    self.update_summary(final_loss=last.get("loss"), tokens_per_s=last.get("tokens_per_s"))

    def update_summary(self, **values: object) -> None:
        """Write summary.json again, atomically, with these keys of SUMMARY changed. Raises UserError on a full disk.

        A new status is on the disk when this returns; mere progress, which metrics.jsonl has too, does not wait for it.
        """
        assert set(values) <= set(SUMMARY), f"not in a summary: {set(values) - set(SUMMARY)}"
        self.summary.update(values)
        assert self.summary["status"] in STATUSES, self.summary["status"]
        try:
            text = json.dumps(finite(self.summary), indent=1, allow_nan=False) + "\n"
            (write_atomically if "status" in values else write_often)(self.path / "summary.json", text)
        except OSError as error:
            raise unwritable("run.dir", self.path, error) from error


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json of a run directory; empty if there is none or it cannot be read. A value of another type than its key has is left out."""
    try:
        summary = read_object(path / "summary.json", field="run.dir")
    except UserError:
        return {}
    return {key: value for key, value in summary.items() if value is None or _is_sound(key, value)}


def _is_sound(key: str, value: object) -> bool:
    if key in _NUMBERS:
        return number(value) is not None
    return key not in SUMMARY or isinstance(value, dict if key == "versions" else str)


_TRACES = ("config.yaml", "summary.json", "metrics.jsonl")
"""A folder with one of them is a run's."""


def require_run(path: Path, *, command: str) -> None:
    """Refuse a folder that is no run's (raises UserError), naming the run beside it that was written to last for the same command."""
    if any((path / name).exists() for name in _TRACES):
        return
    problem = (
        f"there is no {', '.join(_TRACES[:-1])} or {_TRACES[-1]} in it" if path.is_dir() else "it is a file" if path.exists() else "there is no such folder"
    )
    raise refusal("run.dir", path, problem, allowed="the folder of a run", instead=_run_beside(path, command=command))


def _run_beside(path: Path, *, command: str) -> str:
    aged = []
    with contextlib.suppress(OSError):
        for file in path.parent.glob("*/summary.json"):
            with contextlib.suppress(OSError):
                aged.append((file.stat().st_mtime, file.parent))
    return f"hybridtrain {command} {max(aged)[1]}" if aged else f"hybridtrain runs, then hybridtrain {command} RUN"


def write_machine(path: Path, hosts: Sequence[Mapping[str, Any]]) -> None:
    """Write machine.json: one entry per host, apart from the summary, which is written at every log line. Raises UserError on a full disk."""
    try:
        write_json(path / "machine.json", hosts)
    except OSError as error:
        raise unwritable("run.dir", path, error) from error


def read_machine(path: Path) -> list[dict[str, Any]]:
    """One entry per host: machine.json of a run directory, or what an older summary.json says; empty where neither does."""
    try:
        hosts = read_json(path / "machine.json", field="run.dir")
    except UserError:
        hosts = read_summary(path).get("machine")
    entries = [host for host in hosts if isinstance(host, dict)] if isinstance(hosts, list) else []
    return [{**host, "ranks": [rank for rank in _listed(host.get("ranks")) if isinstance(rank, int)]} for host in entries]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def open_run(config: Config, *, yaml_text: str, versions: Mapping[str, str], latest: Callable[[Path], Path | None]) -> RunDir:
    """Decide which directory `config` continues or starts, and write its config.yaml (`yaml_text`) and a running summary.

    `latest` gives the newest complete checkpoint in a folder of checkpoints. In the default directory another identity moves on
    to the next number (runs/name-2); an explicit run.dir of another run is refused, as is what run.resume rules out (UserError).
    """
    path, before = _choose(config)
    checkpoint = latest(path / "checkpoints") if before is not None else None
    if config.run.resume == "required" and checkpoint is None:
        problem = f"{path} holds no complete checkpoint" + ("" if before is not None else " of this run")
        raise refusal("run.resume", "required", problem, allowed="a run with a complete checkpoint", instead="run.resume=auto, or the run's own run.dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.yaml", yaml_text)
    except OSError as error:
        raise unwritable("run.dir", path, error) from error
    changed = {} if before is None else {key: pair for key, pair in _differences(before, config).items() if key not in _NOT_TOLD}
    summary = {**dict.fromkeys(SUMMARY), "versions": dict(versions), "git_revision": _git_revision()}
    life = _lives(path)
    run = RunDir(
        path=path,
        continued=before is not None and (life > 0 or not (path / "submit").exists()),
        checkpoint=checkpoint,
        life=life,
        changed=changed,
        summary=summary,
    )
    run.update_summary(status="running")
    return run


def _lives(path: Path) -> int:
    """Starts that the events tell of."""
    events = path / "events.jsonl"
    lines = events.read_text(errors="replace").splitlines() if events.is_file() else []
    return sum(f'"kind": "{kind}"' in line for line in lines for kind in ("started", "resumed"))


def check_fingerprints(progress: Progress, *, fingerprints: Mapping[str, str], allow_data_change: bool) -> tuple[str, ...]:
    """Compare a checkpoint's fingerprints with this run's; the names that differ and are let through.

    `model` must be the same; anything else (data, order, tokens) only unless `allow_data_change`. Raises UserError.
    `tokens`, a sample of files that no other fingerprint covers, is compared where both have it: earlier versions kept none.
    """
    names = sorted((set(progress.fingerprints) | set(fingerprints)) - (set() if "tokens" in progress.fingerprints and "tokens" in fingerprints else {"tokens"}))
    differing = tuple(name for name in names if progress.fingerprints.get(name) != fingerprints.get(name))
    if "model" in differing:
        raise refusal(
            "model",
            fingerprints.get("model"),
            f"the checkpoint of step {progress.step} is of another model ({progress.fingerprints.get('model')})",
            allowed="the model that the run began with",
            instead="the run's own model section, or a new run.dir with model.from_pretrained=<export of this run>",
        )
    if differing and not allow_data_change:
        raise refusal(
            "data",
            fingerprints.get(differing[0]),
            f"the {' and '.join(differing)} of the checkpoint of step {progress.step} was another ({progress.fingerprints.get(differing[0])})",
            allowed="the data and the order that the run began with",
            instead="the run's own data.path, or run.allow_data_change=true to go on with this data",
        )
    return differing


def _choose(config: Config) -> tuple[Path, Config | None]:
    """The run's directory, and the configuration that it was last run with (None: a new run)."""
    base = Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name
    explicit = base != Path("runs") / config.run.name
    number = 1
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not _holds_run(path):
            return path, None
        before = compose.from_yaml(path / "config.yaml", "train")
        differing = {key: pair for key, pair in _differences(before, config).items() if _is_identity(key, config)}
        if explicit and differing:
            raise _another_run(path, differing)
        if not differing:
            if config.run.resume == "never":
                raise refusal(
                    "run.resume", "never", f"{path} holds a run already", allowed="a directory without a run", instead="another run.dir, or run.resume=auto"
                )
            return path, before
        if number == 1:
            _log.info("%s holds another run (%s): this one gets the next number", path, ", ".join(sorted(differing)[:3]))
        number += 1


def _holds_run(path: Path) -> bool:
    if (path / "config.yaml").is_file():
        return True
    leftover = next((name for name in ("checkpoints", "metrics.jsonl", "summary.json") if (path / name).exists()), None)
    if path.exists() and (leftover or not path.is_dir()):
        problem = f"it has {leftover} but no config.yaml, so what ran there is not known" if leftover else "it is a file"
        raise refusal("run.dir", path, problem, allowed="a run's folder, or one without a run", instead="another run.dir")
    return False


def _another_run(path: Path, differing: Mapping[str, tuple[object, object]]) -> Exception:
    told = "; ".join(f"{key} was {before!r} and is {now!r}" for key, (before, now) in sorted(differing.items()))
    return refusal("run.dir", path, f"it holds another run: {told}", allowed="the same values, or a directory of its own", instead="another run.dir")


def _is_identity(key: str, config: Config) -> bool:
    section = key.partition(".")[0]
    if section == "data" and config.run.allow_data_change:
        return key == "data.seq_len"
    return key in _SINGLE_FIELDS or (section in _WHOLE_SECTIONS and key not in _NOT_IDENTITY)


def _differences(before: Config, now: Config) -> dict[str, tuple[object, object]]:
    """section.field -> (before, now), over all sections of a training run."""
    result: dict[str, tuple[object, object]] = {}
    for section in dataclasses.fields(Config):
        old, new = getattr(before, section.name), getattr(now, section.name)
        for option in dataclasses.fields(old):
            pair = (getattr(old, option.name), getattr(new, option.name))
            if pair[0] != pair[1]:
                result[f"{section.name}.{option.name}"] = pair
    return result


def _stands(line: str, *, step: int) -> bool:
    """Whether a line of metrics.jsonl or events.jsonl still holds after a resume at `step`; a torn one does not."""
    try:
        values = json.loads(line)
        return values["step"] <= step or values.get("kind", _REPEATED[0]) not in _REPEATED
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _git_revision() -> str | None:
    """The commit of the checkout this code runs from, "-dirty" with local changes; None outside a checkout."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
