"""`hybridtrain verify RUN` (or CORPUS, or EXPORT): compare every byte that later commands read with
its checksum. No torch.

Of a run: each complete checkpoint (sizes, CRC32, the step in its name, the model), config.yaml,
model/config.json, metrics.jsonl and numerics.jsonl (each step once), events.jsonl and summary.json. Prints
problems and exits with 1 if there are any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hybridtrain.analysis.facts import facts_of
from hybridtrain.checkpoint import export_record, marker
from hybridtrain.config.compose import read_run
from hybridtrain.config.schema import ModelConfig, VerifyRoot
from hybridtrain.errors import UserError
from hybridtrain.models import config_diff
from hybridtrain.precision.numerics import sample_of
from hybridtrain.run import identity
from hybridtrain.run.record import require_run
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object

_log = log.get("verify")


def run(config: VerifyRoot) -> int:
    """Print the problems, one per line; returns exit code 0 if there are none, else 1."""
    path = Path(config.run.dir)
    if (
        (path / "corpus.json").is_file()
        or Path(f"{path}.idx").is_file()
        or (path / ".partial" / "plan.json").is_file()
    ):
        from hybridtrain.data.verify import verify_corpus

        problems, what = verify_corpus(path), "the corpus is as it was prepared"
    elif (path / export_record.ORIGIN).is_file():
        problems, what = export_record.verify(path, field="run.dir"), "the export is as it was written"
    else:
        require_run(path, command="verify")
        problems, number = verify_run(path)
        what = f"{number} checkpoint{'' if number == 1 else 's'} and the run's files are as they were written"
    for problem in problems:
        _log.error("%s", problem)
    _log.info(
        "%s: %s", path, f"{len(problems)} problem{'' if len(problems) == 1 else 's'}" if problems else what
    )
    return 1 if problems else 0


def verify_run(path: Path) -> tuple[list[str], int]:
    """(problems of a run directory, number of complete checkpoints that were read)."""
    problems: list[str] = []
    folder, fingerprints = path / "checkpoints", set()
    configs: list[Path] = []
    complete = [
        step
        for step in sorted(folder.glob("step-*"))
        if marker.is_complete(step) and not step.name.endswith((marker.PARTIAL, marker.REMOVED))
    ]
    for checkpoint in complete:
        try:
            marker.verify(checkpoint, files=sorted(marker.read(checkpoint).items()))
            progress = marker.read_progress(checkpoint)
        except UserError as error:
            problems.append(_line(error))
            continue
        if (checkpoint / marker.CONFIG).is_file():
            configs.append(checkpoint / marker.CONFIG)
        fingerprints.add(progress.fingerprints.get("model"))
        if checkpoint.name != f"step-{progress.step:08d}":
            problems.append(f"{checkpoint}: it holds step {progress.step}")
    for other in sorted(set(folder.glob("step-*")) - set(complete)):
        if not other.is_dir():
            problems.append(f"{other}: it is not a folder")
        elif not other.name.endswith((marker.PARTIAL, marker.REMOVED)):
            problems.append(f"{other}: its {marker.MARKER} is missing, so it does not count as a checkpoint")
    problems += [
        *_of_configs(path, fingerprints={name for name in fingerprints if name}, configs=configs),
        *_of_lines(path),
    ]
    return problems, len(complete)


def _of_configs(path: Path, *, fingerprints: set[str], configs: list[Path]) -> Iterator[str]:
    """Problems of config.yaml and summary.json, and of model/config.json compared with the checkpoints.

    `configs`: config.json of each checkpoint that has one (version 0.1 wrote none), oldest first.
    """
    file = path / "model" / marker.CONFIG
    try:
        read_run(path / "config.yaml")
        read_object(path / "summary.json", field="run.dir")
        now = read_object(file, field="run.dir") if file.exists() else None
        held = [(config.parent.name, read_object(config, field="checkpoint")) for config in configs]
        newest, newest_fields = held[-1] if held else ("", {})
        if now is not None and held and (found := config_diff.changes(newest_fields, now)):
            yield f"{file}: it has changed since {newest} was written ({config_diff.describe(found)})"
        elif now is not None and fingerprints:
            model = facts_of(ModelConfig(from_pretrained=str(file.parent)))
            if fingerprints != {identity.model_fingerprint(model)}:
                yield f"{file}: it describes a different model than that of the checkpoints"
        for older, fields in held[:-1]:
            if found := config_diff.model_changes(fields, newest_fields):
                yield (
                    f"{path / 'checkpoints' / older}: "
                    f"its config.json is of another model than that of {newest} "
                    f"({config_diff.describe(found)})"
                )
    except UserError as error:
        yield _line(error)


def _of_lines(path: Path) -> Iterator[str]:
    """Problems of metrics.jsonl, numerics.jsonl and events.jsonl: damaged lines, and repeated or unordered
    steps, which only events may have.
    """
    for name in ("metrics.jsonl", "numerics.jsonl", "events.jsonl"):
        file, last = path / name, 0
        if not file.exists():
            continue
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            yield f"{file}: it cannot be read ({error.strerror or error})"
            continue
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                step = sample_of(values).step if name == "numerics.jsonl" else values["step"]
                sound = isinstance(step, int)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                sound = False
            if not sound:
                yield f"{file}: line {number} is damaged: {line[:60]!r}"
            elif name != "events.jsonl":
                if step <= last:
                    yield f"{file}: line {number} has step {step} after step {last}"
                last = max(last, step)


def _line(error: UserError) -> str:
    return str(error).splitlines()[0].partition("=")[2] or str(error)
