"""Export: from any complete checkpoint to a Hugging Face folder, in one process and one tensor at a time.

checkpoint/*.distcp --(one tensor)--> cast --> model-00001-of-0000N.safetensors ... + model.safetensors.index.json
<run>/model/config.json, generation_config.json, the data's tokenizer --> beside them
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hybridtrain.checkpoint import marker, metadata, safetensors
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.checkpoint.safetensors import Entry
from hybridtrain.config import compose
from hybridtrain.config.schema import ExportRoot
from hybridtrain.data.blend import tokenizer_dir
from hybridtrain.rundir import require_run
from hybridtrain.types import Progress, UserError, refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ORIGIN = "hybridtrain.json"
"""Says what a folder was exported from; only a folder that has it is replaced by a later export."""
_PREFIX = "model."
_HEAD = "lm_head.weight"
_SAY_EVERY_S = 5.0

log = logging.getLogger(__name__)


def run(config: ExportRoot) -> int:
    """`hybridtrain export`: the newest complete checkpoint of run.dir, or export.checkpoint with the run that it belongs to."""
    options = config.export
    run_dir = Path(options.checkpoint).resolve().parent.parent if options.checkpoint else Path(config.run.dir)
    require_run(run_dir, command="export")
    its_config = compose.read_run(run_dir / "config.yaml", "train")
    if options.checkpoint:
        checkpoint: Path | None = Path(options.checkpoint)
    else:
        checkpoint = Manager(run_dir / "checkpoints", settings=its_config.checkpoint).latest()
    if checkpoint is None:
        raise refusal("run.dir", run_dir, "it has no complete checkpoint", allowed="a run that has saved one", instead="train on, or export.checkpoint=FOLDER")
    tokenizer = tokenizer_dir(its_config.data)
    if tokenizer is None:
        log.warning("export: without tokenizer, there is none with the data")
    out = export(
        checkpoint,
        model_dir=run_dir / "model",
        tokenizer_dir=tokenizer,
        out=Path(options.out) if options.out else run_dir / "export",
        dtype=options.dtype,
        max_shard_bytes=int(options.max_shard_gb * 10**9),
    )
    print(out)
    return 0


def export(checkpoint: Path, *, model_dir: Path, tokenizer_dir: Path | None, out: Path, dtype: str, max_shard_bytes: int) -> Path:
    """Write the Hugging Face folder `out` from a complete checkpoint and return it.

    `model_dir` holds the model's config.json (and generation_config.json); `dtype` is a key of DTYPES and applies to floating-point
    weights. Memory stays at about two copies of the largest tensor. Written aside and renamed; an earlier export is replaced.
    Raises UserError for a damaged checkpoint, values that `dtype` cannot hold, a folder that is no export, a full disk.
    """
    _check(dtype=dtype, max_shard_bytes=max_shard_bytes, model_dir=model_dir, out=out)
    partial = out.with_name(out.name + ".partial")
    try:
        marker.verify(checkpoint, files=marker.read(checkpoint).items())
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(checkpoint, partial=partial, config=_config(model_dir), dtype=DTYPES[dtype], max_shard_bytes=max_shard_bytes)
        _write_rest(partial, model_dir=model_dir, tokenizer_dir=tokenizer_dir, dtype=dtype, progress=marker.read_progress(checkpoint))
        marker.sync_folder(partial)
        if out.exists():
            replaced = out.with_name(out.name + ".removed")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(out, replaced)
            os.rename(partial, out)
            shutil.rmtree(replaced)
        else:
            os.rename(partial, out)
        marker.sync_folder(out.parent)
    except OSError as error:
        raise refusal("export.out", out, f"it could not be written: {error}", allowed="a folder with enough free space", instead="export.out=FOLDER") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check(*, dtype: str, max_shard_bytes: int, model_dir: Path, out: Path) -> None:
    if dtype not in DTYPES:
        raise refusal("export.dtype", dtype, "not a dtype of exports", allowed=", ".join(DTYPES), instead="export.dtype=bfloat16")
    if max_shard_bytes <= 0:
        raise refusal("export.max_shard_gb", max_shard_bytes / 10**9, "no room for a tensor", allowed="more than 0", instead="export.max_shard_gb=5")
    if not (model_dir / "config.json").is_file():
        raise refusal("run.dir", model_dir.parent, f"there is no {model_dir}/config.json", allowed="the folder of a run", instead="run.dir=runs/<name>")
    if out.exists() and not (out / ORIGIN).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise refusal(
            "export.out",
            out,
            "it exists and is not an earlier export",
            allowed="a new or empty folder, or one that an export wrote",
            instead="export.out=FOLDER",
        )


def _config(model_dir: Path) -> dict:
    try:
        return json.loads((model_dir / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{model_dir}/config.json cannot be read: {error}") from error


def _write_weights(checkpoint: Path, *, partial: Path, config: dict, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write the safetensors files and, if there are several, their index."""
    stored = metadata.read(checkpoint)
    tied = bool(config.get("tie_word_embeddings", False))
    entries = _entries(stored, dtype=dtype, tied=tied)
    if not entries or not (tied or any(entry.name == _HEAD for entry in entries)):
        raise refusal(
            "checkpoint",
            checkpoint,
            f"it has no {_HEAD if entries else 'model weights'}, and the model's config.json does not tie the embeddings",
            allowed="a checkpoint of the model in config.json",
            instead="a checkpoint of the same run",
        )
    say = _progress_line(tensors=len(entries), size=sum(entry.size for entry in entries))

    def tensor(entry: Entry) -> torch.Tensor:
        key = _PREFIX + entry.name
        whole = {key: torch.empty(entry.shape, dtype=stored.state_dict_metadata[key].properties.dtype)}  # type: ignore[union-attr]
        metadata.load_into(whole, path=checkpoint, metadata=stored, group=None)
        say(entry)
        return _cast(whole[key], entry=entry)

    parts = safetensors.shards(entries, max_bytes=max_shard_bytes)
    names = ["model.safetensors"] if len(parts) == 1 else [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        safetensors.write(partial / name, entries=part, tensor=tensor)
    if len(parts) > 1:
        where = {entry.name: name for name, part in zip(names, parts, strict=True) for entry in part}
        _write_json(partial / "model.safetensors.index.json", {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": where})


def _entries(stored: metadata.dcp_metadata.Metadata, *, dtype: torch.dtype, tied: bool) -> list[Entry]:
    """The weights to export, in the order of the layers. A tied head is not stored twice (the Hugging Face convention)."""
    entries = []
    for key, entry in stored.state_dict_metadata.items():
        assert isinstance(entry, metadata.dcp_metadata.TensorStorageMetadata)  # metadata.read has refused everything else
        name = key.removeprefix(_PREFIX)
        if key.startswith(_PREFIX) and not (tied and name == _HEAD):
            was = entry.properties.dtype
            entries.append(Entry(name, tuple(entry.size), dtype if was.is_floating_point else was))
    return sorted(entries, key=lambda entry: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", entry.name)])


def _cast(tensor: torch.Tensor, *, entry: Entry) -> torch.Tensor:
    """Cast, but never turn a number into infinity."""
    cast = tensor.to(entry.dtype)
    if tensor.is_floating_point() and bool((cast.isinf() & ~tensor.isinf()).any()):
        largest = float(tensor.abs().max())
        dtype = str(entry.dtype).removeprefix("torch.")
        raise refusal("export.dtype", dtype, f"{entry.name} has values up to {largest:.3g}", allowed="bfloat16 or float32", instead="export.dtype=bfloat16")
    return cast


def _write_rest(partial: Path, *, model_dir: Path, tokenizer_dir: Path | None, dtype: str, progress: Progress) -> None:
    """config.json (with the dtype), generation_config.json, the tokenizer, and where it all comes from."""
    config = _config(model_dir)
    config.pop("torch_dtype", None)  # transformers' older name for the same field
    _write_json(partial / "config.json", {**config, "dtype": dtype})
    generation = model_dir / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, partial / generation.name)
    for file in sorted(tokenizer_dir.iterdir()) if tokenizer_dir is not None else []:
        if file.is_file():
            shutil.copyfile(file, partial / file.name)
    _write_json(partial / ORIGIN, {"step": progress.step, "tokens_seen": progress.tokens_seen, "dtype": dtype})


def _progress_line(*, tensors: int, size: int) -> Callable[[Entry], None]:
    """A line that says how far the export is: rewritten in place on a terminal, else a new one every few seconds."""
    done, written, said = 0, 0, time.monotonic()

    def say(entry: Entry) -> None:
        nonlocal done, written, said
        done, written = done + 1, written + entry.size
        if time.monotonic() - said < _SAY_EVERY_S and not (sys.stderr.isatty() and done == tensors):
            return
        said = time.monotonic()
        line = f"export: {done}/{tensors} tensors, {written / 1e9:.2f}/{size / 1e9:.2f} GB"
        if sys.stderr.isatty():
            print("\r" + line, end="\n" if done == tensors else "", file=sys.stderr, flush=True)
        else:
            log.info(line)

    return say


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
