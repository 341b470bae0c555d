"""Export: from any complete checkpoint to a Hugging Face folder, in one process and one tensor at a time.

checkpoint/*.distcp --(one tensor)--> cast --> model-00001-of-0000N.safetensors ... + model.safetensors.index.json
its config.json, generation_config.json and tokenizer --> beside them
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridtrain.checkpoint import export_record, marker, metadata, tokenizer
from hybridtrain.checkpoint.hold import Removed, hold_open
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config import compose
from hybridtrain.config.schema import Config, ExportRoot
from hybridtrain.data.prepare.template import end_of_turn
from hybridtrain.errors import UserError, refusal
from hybridtrain.export import destination, weights
from hybridtrain.models import config_diff, tokens
from hybridtrain.run.record import require_run
from hybridtrain.runtime.files import read_object, unwritable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TRIES = 20  # a run that saves often may remove a checkpoint before it is open

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The run that a checkpoint is of."""

    path: Path
    config: Config
    """Its config.yaml."""


def run_of(checkpoint: str, *, field: str) -> Run:
    """The run that the folder `checkpoint` lies in; UserError, naming the option `field`, where it is none of a run's."""
    run_dir = Path(checkpoint).resolve().parent.parent
    if not Path(checkpoint).is_dir():
        raise _no_checkpoint(field, checkpoint, "there is no such folder")
    if not (run_dir / "config.yaml").is_file():
        raise _no_checkpoint(field, checkpoint, f"it is no checkpoint where its run left it: {run_dir} has no config.yaml")
    return _run_in(run_dir)


def _run_in(run_dir: Path) -> Run:
    require_run(run_dir, command="export")
    return Run(run_dir, compose.read_run(run_dir / "config.yaml"))


def _no_checkpoint(field: str, checkpoint: object, problem: str) -> UserError:
    return refusal(field, checkpoint, problem, allowed="the folder of a run's checkpoint", instead=f"{field}=RUN/checkpoints/step-00000100")


def run(config: ExportRoot) -> int:
    """`hybridtrain export`."""
    print(export_newest(config))
    return 0


def export_newest(config: ExportRoot) -> Path:
    """Export the newest complete checkpoint of run.dir, or export.checkpoint with the run that it belongs to; the folder. Raises UserError."""
    options = config.export
    run = run_of(options.checkpoint, field="export.checkpoint") if options.checkpoint else _run_in(Path(config.run.dir))
    manager = Manager(run.path / "checkpoints", settings=run.config.checkpoint)
    out = Path(options.out).expanduser() if options.out else run.path / "export"
    for attempt in range(_TRIES):
        checkpoint = Path(options.checkpoint) if options.checkpoint else _newest(manager)
        if checkpoint is None and attempt < _TRIES - 1 and any(manager.folder.glob("step-*")):
            continue  # the one that was listed has made room for a newer one
        if checkpoint is None:
            instead = "train on, or export.checkpoint=FOLDER"
            raise refusal("run.dir", run.path, "it has no complete checkpoint", allowed="a run that has saved one", instead=instead)
        try:
            export(checkpoint, run=run, out=out, dtype=options.dtype, max_shard_bytes=int(options.max_shard_gb * 10**9))
        except Removed:
            if options.checkpoint:
                raise _no_checkpoint("export.checkpoint", checkpoint, "there is no such folder") from None
            continue  # the run has gone on, and removed it for a newer one
        return out
    raise refusal("run.dir", run.path, "its checkpoints are removed faster than they can be opened", allowed="any checkpoint", instead="checkpoint.keep_last=2")


def _newest(manager: Manager) -> Path | None:
    """The newest complete checkpoint; None if there is none, or it was removed while it was looked at."""
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
        log.warning("export: the token that ends an answer is not known: %s", str(error).partition("\n")[0])
        return None


def export(checkpoint: Path, *, run: Run, out: Path, dtype: str, max_shard_bytes: int) -> Path:
    """Write the Hugging Face folder `out` from a complete checkpoint and return it.

    `dtype` is a key of DTYPES and applies to floating-point weights. Memory stays at about two copies of the largest tensor. Written
    aside and renamed; an earlier export is replaced, files of others in it stay. Raises UserError for a damaged checkpoint or tokenizer,
    values that `dtype` cannot hold, a folder that is no export, a full disk; Removed for a checkpoint that is not there any more.
    """
    _check(dtype=dtype, max_shard_bytes=max_shard_bytes)
    destination.check(out)
    with hold_open(checkpoint) as files:
        stored = _verified(files)
        config = _config(files, run=run, stored=stored)
        found = tokenizer.of_checkpoint(files, run=run.path, config=run.config)
        ends = _ends(found, run=run, out=out)
        try:
            with destination.replacing(out) as partial:
                weights.write(files, partial=partial, config=config, stored=stored, dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes)
                _write_rest(partial, checkpoint=files, config=config, run=run, ends=ends, dtype=dtype)
                if found is not None:
                    tokens.copy_tokenizer(found.folder, out=partial)
        except OSError as error:
            raise unwritable("export.out", out, error) from error
    return out


def _ends(found: tokenizer.CheckpointTokenizer | None, *, run: Run, out: Path) -> tokens.Ends | None:
    """Ids of the special tokens of the tokenizer that is exported; refuses to remove one that an earlier export has (raises UserError)."""
    if found is None:
        looked = ", ".join(run.config.data.blend) or run.config.data.path
        _keep_earlier(out, looked=looked)
        log.warning("export: without tokenizer, there is none with the data%s", f" (looked for in {looked})" if looked else "")
        return None
    for line in tokenizer.changed(found.folder):
        log.warning("export: %s", line)
    loaded = tokens.load_tokenizer(str(found.folder), field="data.tokenizer", trust_remote_code=False)
    return tokens.ends(loaded, turn=_end_of_turn(loaded) if found.conversations else None)


def _keep_earlier(out: Path, *, looked: str) -> None:
    real = out.resolve()
    if not any((real / name).is_file() for name in destination.ours(real).intersection(tokens.TOKENIZER_FILES)):
        return
    problem = f"the export there has a tokenizer, and this one would have none: the run kept none, and there is none with its data ({looked or 'no path'})"
    instead = "export.out=FOLDER, or hybridtrain export in the folder that the run was begun in, with its data there"
    raise refusal(destination.FIELD, out, problem, allowed="a folder without a tokenizer of an earlier export", instead=instead)


def _check(*, dtype: str, max_shard_bytes: int) -> None:
    if dtype not in DTYPES:
        raise refusal("export.dtype", dtype, "not a dtype of exports", allowed=", ".join(DTYPES), instead="export.dtype=bfloat16")
    if max_shard_bytes <= 0:
        raise refusal("export.max_shard_gb", max_shard_bytes / 10**9, "no room for a tensor", allowed="more than 0", instead="export.max_shard_gb=5")


def _verified(checkpoint: Path) -> metadata.dcp_metadata.Metadata:
    """The metadata of a checkpoint whose files are what was written, as far as the model's weights are in them."""
    files = marker.read(checkpoint)
    marker.check_sizes(checkpoint, files=files.items())
    others = {name: record for name, record in files.items() if not name.endswith(".distcp")}
    marker.verify(checkpoint, files=others.items())
    stored = metadata.read(checkpoint)
    needed = {info.relative_path for index, info in stored.storage_data.items() if index.fqn.startswith(weights.PREFIX)}
    marker.verify(checkpoint, files=[(name, record) for name, record in files.items() if name in needed])
    return stored


def _config(checkpoint: Path, *, run: Run, stored: metadata.dcp_metadata.Metadata) -> dict[str, Any]:
    """config.json of the checkpoint; checkpoints of earlier releases have none, for those the run's is checked and used."""
    beside = run.path / "model" / marker.CONFIG
    if (checkpoint / marker.CONFIG).is_file():
        config = read_object(checkpoint / marker.CONFIG, field="checkpoint")
        with contextlib.suppress(UserError):
            now = read_object(beside, field="run.dir")
            if changed := config_diff.changes(config, now):
                log.warning(
                    "export: %s has changed since the checkpoint was written (%s); the checkpoint's own is exported", beside, config_diff.describe(changed)
                )
        return config
    if not beside.is_file():
        raise refusal("run.dir", run.path, f"there is no {beside}", allowed="the folder of a run", instead="run.dir=runs/<name>")
    config = read_object(beside, field="run.dir")
    shapes = {key.removeprefix(weights.PREFIX): tuple(entry.size) for key, entry in stored.state_dict_metadata.items() if key.startswith(weights.PREFIX)}  # type: ignore[union-attr]
    layers = {int(found[1]) for name in shapes if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    embed = shapes.get("model.embed_tokens.weight")
    for field, is_now in (("num_hidden_layers", len(layers)), ("vocab_size", embed and embed[0]), ("hidden_size", embed and embed[1])):
        if is_now and field in config and config[field] != is_now:
            raise marker.damaged(checkpoint, str(beside), f"it says {field}={config[field]}, the checkpoint's model has {is_now}; was it edited?")
    return config


def _write_rest(partial: Path, *, checkpoint: Path, config: dict[str, Any], run: Run, ends: tokens.Ends | None, dtype: str) -> None:
    """config.json (with the dtype), generation_config.json, and where it all comes from."""
    generation = _generation(checkpoint, run=run)
    config, generation, lines = tokens.with_end_tokens(config, generation, of_tokenizer=ends, new=not run.config.model.from_pretrained)
    for line in lines if run.config.model.from_pretrained else ():  # new weights have no tokens of their own
        log.warning("export: %s", line)
    config.pop("torch_dtype", None)  # transformers' older name for the same field
    _write_json(partial / marker.CONFIG, {**config, "dtype": dtype})
    if generation:
        _write_json(partial / tokens.GENERATION, generation)
    progress = marker.read_progress(checkpoint)
    _write_json(partial / export_record.ORIGIN, {"step": progress.step, "tokens_seen": progress.tokens_seen, "dtype": dtype})


def _generation(checkpoint: Path, *, run: Run) -> dict[str, Any]:
    """generation_config.json as the checkpoint holds it, else the run's; earlier releases made one of config.json alone, so the source's goes before it."""
    sealed_file, file = checkpoint / tokens.GENERATION, run.path / "model" / tokens.GENERATION
    if sealed_file.is_file():
        own = read_object(sealed_file, field="checkpoint")
        with contextlib.suppress(UserError):
            if read_object(file, field="run.dir") != own:
                log.warning("export: %s has changed since the checkpoint was written; the checkpoint's own is exported", file)
    else:
        own = read_object(file, field="run.dir") if file.is_file() else {}
    if tokens.is_derived(own) and Path(run.config.model.from_pretrained).is_dir():
        return tokens.source_generation(run.config.model) or own
    return own


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
