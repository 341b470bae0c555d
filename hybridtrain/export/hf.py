"""Export a complete checkpoint to a Hugging Face folder, in one process and one tensor at a time.

checkpoint/*.distcp --(one tensor)--> cast
    --> model-00001-of-0000N.safetensors ... + model.safetensors.index.json
its config.json, generation_config.json and tokenizer --> the same folder
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridtrain.checkpoint import export_record, marker, metadata, tokenizer
from hybridtrain.checkpoint.hold import Removed, hold_open
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config import compose
from hybridtrain.config.schema import Config, ExportRoot
from hybridtrain.config.section_checks import one_of
from hybridtrain.data.prepare.template import end_of_turn
from hybridtrain.errors import UserError, refusal
from hybridtrain.export import adapter, destination, weights
from hybridtrain.models import adapter_folder, config_diff, tokens
from hybridtrain.optim.average import PREFIX as AVERAGE
from hybridtrain.run.record import require_run
from hybridtrain.runtime.files import read_object, unwritable
from hybridtrain.types import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIELD = "export.out"
_TRIES = 20  # a run that saves often may remove a checkpoint before it is opened

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceRun:
    """The run to which a checkpoint belongs."""

    path: Path
    config: Config
    """Read from its config.yaml."""


def run_of(checkpoint: str, *, field: str) -> SourceRun:
    """The run in whose folder `checkpoint` is.

    Raises UserError, naming the option `field`, if it is in none.
    """
    run_dir = Path(checkpoint).resolve().parent.parent
    if not Path(checkpoint).is_dir():
        raise _no_checkpoint(field, checkpoint, "there is no such folder")
    if not (run_dir / "config.yaml").is_file():
        raise _no_checkpoint(
            field, checkpoint, f"it is not in the checkpoints folder of a run: {run_dir} has no config.yaml"
        )
    return _run_in(run_dir)


def _run_in(run_dir: Path) -> SourceRun:
    require_run(run_dir, command="export")
    return SourceRun(run_dir, compose.read_run(run_dir / "config.yaml"))


def _no_checkpoint(field: str, checkpoint: object, problem: str) -> UserError:
    return refusal(
        field,
        checkpoint,
        problem,
        allowed="the folder of a run's checkpoint",
        instead=f"{field}=RUN/checkpoints/step-00000100",
    )


def run(config: ExportRoot) -> int:
    """`hybridtrain export`."""
    print(export_newest(config))
    return 0


def export_newest(config: ExportRoot) -> Path:
    """Export the newest complete checkpoint of run.dir, or else export.checkpoint. Returns the export.

    Raises UserError.
    """
    options = config.export
    run = (
        run_of(options.checkpoint, field="export.checkpoint")
        if options.checkpoint
        else _run_in(Path(config.run.dir))
    )
    manager = Manager(run.path / "checkpoints", settings=run.config.checkpoint)
    out = Path(options.out).expanduser() if options.out else run.path / "export"
    for attempt in range(_TRIES):
        checkpoint = Path(options.checkpoint) if options.checkpoint else _newest(manager)
        if checkpoint is None and attempt < _TRIES - 1 and any(manager.folder.glob("step-*")):
            continue  # the run removed the listed one when it saved the next
        if checkpoint is None:
            instead = "train on, or export.checkpoint=FOLDER"
            raise refusal(
                "run.dir",
                run.path,
                "it has no complete checkpoint",
                allowed="a run that has saved one",
                instead=instead,
            )
        try:
            export(
                checkpoint,
                run=run,
                out=out,
                dtype=options.dtype,
                which=options.weights,
                merge=options.merge,
                max_shard_bytes=int(options.max_shard_gb * 10**9),
            )
        except Removed:
            if options.checkpoint:
                raise _no_checkpoint("export.checkpoint", checkpoint, "there is no such folder") from None
            continue  # the run removed it when it saved the next
        return out
    raise refusal(
        "run.dir",
        run.path,
        "its checkpoints are removed faster than they can be opened",
        allowed="any checkpoint",
        instead="checkpoint.keep_last=2",
    )


def _newest(manager: Manager) -> Path | None:
    """The newest complete checkpoint; None if there is none, or if it was removed meanwhile."""
    steps = manager.steps()
    try:
        return manager.latest()
    except UserError:
        if steps and marker.is_complete(manager.path(steps[-1])):
            raise
        return None


def _end_of_turn(tokenizer: Any) -> int | None:
    try:
        return end_of_turn(tokenizer)
    except UserError as error:
        log.warning("export: cannot tell which token ends an answer: %s", str(error).partition("\n")[0])
        return None


def export(
    checkpoint: Path, *, run: SourceRun, out: Path, dtype: str, which: str, merge: bool, max_shard_bytes: int
) -> Path:
    """Write a complete checkpoint to the Hugging Face folder `out`; returns `out`.

    `dtype` is a key of DTYPES and applies to floating-point weights; `which`, `merge`: as export.weights
    and export.merge. Needs memory for about two copies of the largest tensor. Writes to a temporary folder
    and renames it: an earlier export is replaced, other files in it stay. Raises UserError for a damaged
    checkpoint or tokenizer, values that `dtype` cannot hold, an existing folder that is no export, a full
    disk; Removed if the checkpoint has been removed.
    """
    _check(dtype=dtype, which=which, max_shard_bytes=max_shard_bytes)
    adapter.check_merge(merge, run.config.adapters)
    destination.check(out, field=FIELD)
    with hold_open(checkpoint) as files:
        stored = _verified(files)
        _check_average(stored, which=which, run=run)
        config = _config(files, run=run, stored=stored)
        source = tokenizer.of_checkpoint(files, run=run.path, config=run.config)
        ends = _ends(source, run=run, out=out)
        try:
            with destination.replacing(out, field=FIELD, keeps="") as partial:
                options: dict[str, Any] = {
                    "partial": partial,
                    "stored": stored,
                    "dtype": DTYPES[dtype],
                    "average": which == "ema",
                    "max_shard_bytes": max_shard_bytes,
                }
                if run.config.adapters.kind != "none":
                    adapter.write(files, config=run.config, merge=merge, **options)
                else:
                    weights.write(files, config=config, **options)
                origin = {"dtype": dtype, **({"weights": which} if which != "last" else {})}
                _write_rest(partial, checkpoint=files, config=config, run=run, ends=ends, origin=origin)
                if source is not None:
                    tokens.copy_tokenizer(source.folder, out=partial)
        except OSError as error:
            raise unwritable(FIELD, out, error) from error
    return out


def _ends(source: tokenizer.CheckpointTokenizer | None, *, run: SourceRun, out: Path) -> tokens.Ends | None:
    """Ids of the exported tokenizer's end tokens; None without tokenizer.

    Raises UserError if an earlier export in `out` would lose its tokenizer.
    """
    if source is None:
        looked = ", ".join(run.config.data.blend) or run.config.data.path
        _keep_earlier(out, looked=looked)
        log.warning(
            "export: no tokenizer is exported, there is none with the data%s",
            f" (looked in {looked})" if looked else "",
        )
        return None
    for line in tokenizer.changed(source.folder):
        log.warning("export: %s", line)
    loaded = tokens.load_tokenizer(str(source.folder), field="data.tokenizer", trust_remote_code=False)
    return tokens.ends(loaded, turn=_end_of_turn(loaded) if source.conversations else None)


def _keep_earlier(out: Path, *, looked: str) -> None:
    real = out.resolve()
    if not any(
        (real / name).is_file() for name in destination.ours(real).intersection(tokens.TOKENIZER_FILES)
    ):
        return
    nowhere = f"the run has no copy of it, and there is none with its data ({looked or 'no path'})"
    problem = f"the earlier export there has a tokenizer, and this one would have none: {nowhere}"
    instead = (
        "export.out=FOLDER, or run hybridtrain export "
        "in the folder where the run was started, with its data in place"
    )
    raise refusal(
        FIELD,
        out,
        problem,
        allowed="a folder without a tokenizer of an earlier export",
        instead=instead,
    )


def _check_average(stored: metadata.dcp_metadata.Metadata, *, which: str, run: SourceRun) -> None:
    if which == "ema" and not any(key.startswith(AVERAGE) for key in stored.state_dict_metadata):
        raise refusal(
            "export.weights",
            which,
            f"{run.path} kept no average of its weights in this checkpoint",
            allowed="last, or a checkpoint of a run with optim.ema",
            instead="export.weights=last",
        )


def _check(*, dtype: str, which: str, max_shard_bytes: int) -> None:
    one_of("export.weights", which, ("last", "ema"))
    if dtype not in DTYPES:
        raise refusal(
            "export.dtype",
            dtype,
            "not a dtype of exports",
            allowed=", ".join(DTYPES),
            instead="export.dtype=bfloat16",
        )
    if max_shard_bytes <= 0:
        raise refusal(
            "export.max_shard_gb",
            max_shard_bytes / 10**9,
            "no room for a tensor",
            allowed="more than 0",
            instead="export.max_shard_gb=5",
        )


def _verified(checkpoint: Path) -> metadata.dcp_metadata.Metadata:
    """The metadata of a checkpoint, after the check that every file with model weights
    is as it was written."""
    files = marker.read(checkpoint)
    marker.check_sizes(checkpoint, files=files.items())
    others = {name: record for name, record in files.items() if not name.endswith(".distcp")}
    marker.verify(checkpoint, files=others.items())
    stored = metadata.read(checkpoint)
    needed = {
        info.relative_path
        for index, info in stored.storage_data.items()
        if index.fqn.startswith((weights.PREFIX, AVERAGE))
    }
    marker.verify(checkpoint, files=[(name, record) for name, record in files.items() if name in needed])
    return stored


def _config(checkpoint: Path, *, run: SourceRun, stored: metadata.dcp_metadata.Metadata) -> dict[str, Any]:
    """config.json of the checkpoint.

    Checkpoints of earlier releases have none: then the run's, checked against the weights.
    """
    of_run = run.path / "model" / marker.CONFIG
    if (checkpoint / marker.CONFIG).is_file():
        config = read_object(checkpoint / marker.CONFIG, field="checkpoint")
        with contextlib.suppress(UserError):
            now = read_object(of_run, field="run.dir")
            if changed := config_diff.changes(config, now):
                log.warning(
                    (
                        "export: %s has changed since the checkpoint was written (%s); "
                        "the checkpoint's own is exported"
                    ),
                    of_run,
                    config_diff.describe(changed),
                )
        return config
    if not of_run.is_file():
        raise refusal(
            "run.dir",
            run.path,
            f"there is no {of_run}",
            allowed="the folder of a run",
            instead="run.dir=runs/<name>",
        )
    config = read_object(of_run, field="run.dir")
    shapes = {
        key.removeprefix(weights.PREFIX): tuple(entry.size)  # type: ignore[union-attr]
        for key, entry in stored.state_dict_metadata.items()
        if key.startswith(weights.PREFIX)
    }
    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    embed = shapes.get("model.embed_tokens.weight")
    for field, is_now in (
        ("num_hidden_layers", len(layers)),
        ("vocab_size", embed and embed[0]),
        ("hidden_size", embed and embed[1]),
    ):
        if is_now and field in config and config[field] != is_now:
            raise marker.damaged(
                checkpoint,
                str(of_run),
                f"it says {field}={config[field]}, the checkpoint's model has {is_now}; was it edited?",
            )
    return config


def _write_rest(
    partial: Path,
    *,
    checkpoint: Path,
    config: dict[str, Any],
    run: SourceRun,
    ends: tokens.Ends | None,
    origin: Mapping[str, str],
) -> None:
    """Write config.json (not for adapters), generation_config.json, and the record of the checkpoint
    exported. `origin`: dtype and kind of the weights."""
    generation = _generation(checkpoint, run=run)
    config, generation, lines = tokens.with_end_tokens(
        config, generation, of_tokenizer=ends, new=not run.config.model.from_pretrained
    )
    for line in lines if run.config.model.from_pretrained else ():  # a new model has no tokens yet
        log.warning("export: %s", line)
    config.pop("torch_dtype", None)  # the older name of "dtype"
    of_classes: dict[str, Any] = {}
    if not (partial / adapter_folder.CONFIG).is_file():
        _write_json(partial / marker.CONFIG, {**config, "dtype": origin["dtype"]})
    elif fields := adapter_folder.fields_of_classes(config):
        of_classes = {"model": fields}
    if generation:
        _write_json(partial / tokens.GENERATION, generation)
    progress = marker.read_progress(checkpoint)
    record = {"step": progress.step, "tokens_seen": progress.tokens_seen, **origin}
    _write_json(partial / export_record.ORIGIN, record | of_classes | _rounded(progress))


def _rounded(progress: Progress) -> dict[str, Any]:
    """What quantisation-aware training has rounded, for `hybridtrain quantize`."""
    rounded = progress.states.get("formats", {}).get(export_record.ROUNDED)
    return {} if rounded is None else {export_record.ROUNDED: rounded}


def _generation(checkpoint: Path, *, run: SourceRun) -> dict[str, Any]:
    """generation_config.json of the checkpoint, else of the run.

    Earlier releases derived it from config.json alone; then that of from_pretrained is preferred.
    """
    of_checkpoint, of_run = checkpoint / tokens.GENERATION, run.path / "model" / tokens.GENERATION
    if of_checkpoint.is_file():
        generation = read_object(of_checkpoint, field="checkpoint")
        with contextlib.suppress(UserError):
            if read_object(of_run, field="run.dir") != generation:
                log.warning(
                    (
                        "export: %s has changed since the checkpoint was written; "
                        "the checkpoint's own is exported"
                    ),
                    of_run,
                )
    else:
        generation = read_object(of_run, field="run.dir") if of_run.is_file() else {}
    if tokens.is_derived(generation) and Path(run.config.model.from_pretrained).is_dir():
        return tokens.source_generation(run.config.model) or generation
    return generation


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
