"""The record of an export, `hybridtrain.json`: size, CRC32 and a hash of a sample of each file. No torch.

Loading an export compares sizes and samples (64 KiB of each file); `hybridtrain verify
EXPORT` compares all bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybridtrain.checkpoint import marker
from hybridtrain.data import digests
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object

ORIGIN = "hybridtrain.json"
"""File in an export: the checkpoint it is from, the files that the export wrote, and their digests."""
CONTENTS = "contents"
ROUNDED = "rounded"
"""What quantisation-aware training has rounded: the dtype before, and path -> scheme of quantize."""
_COMPUTES = ("float64", "float32", "bfloat16", "float16")
_log = log.get("model")


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {bytes, crc32, sample}} of the files in `folder`. Reads every byte. Raises OSError."""
    result = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != ORIGIN:
            result[path.name] = {
                "bytes": path.stat().st_size,
                "crc32": _crc32(path),
                "sample": digests.sample_hash(path),
            }
    return result


def step_of(folder: Path) -> int | None:
    """The step of the checkpoint that the export in `folder` is of; None for a folder without a record."""
    try:
        step = read_object(folder / ORIGIN, field="source").get("step")
    except UserError:
        return None
    return step if isinstance(step, int) else None


def model_of(folder: Path) -> dict[str, Any]:
    """What the record says of the model of an export without config.json; empty if nothing."""
    try:
        found = read_object(folder / ORIGIN, field="source").get("model")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def rounded_in(folder: Path, *, field: str) -> dict[str, Any] | None:
    """{dtype, layers, written: dtype of the export} of weights that training has rounded; None for others."""
    if not (folder / ORIGIN).is_file():
        return None
    record = read_object(folder / ORIGIN, field=field)
    if (rounded := record.get(ROUNDED)) is None:
        return None
    layers = rounded.get("layers") if isinstance(rounded, dict) else None
    if not isinstance(layers, dict) or not layers or rounded.get("dtype") not in _COMPUTES:
        raise refusal(
            field,
            folder / ORIGIN,
            f"'{ROUNDED}' is not what an export writes",
            allowed="the record of an export",
            instead="hybridtrain export again",
        )
    return {**rounded, "written": record.get("dtype")}


def check(folder: Path, *, field: str) -> None:
    """Refuse weights that have changed since the export (raises UserError); warn of other files that have.

    Compares sizes and samples. Folders that hybridtrain did not export, and exports of version 0.1, have
    no record and pass.
    """
    for name, problem in _problems(folder, field=field, full=False):
        if name.endswith(".safetensors"):
            instead = (
                f"hybridtrain export again, or, if it was changed on purpose, remove {ORIGIN} from the folder"
            )
            raise refusal(
                field, folder / name, problem, allowed="weights as they were exported", instead=instead
            )
        _log.warning("%s %s", folder / name, problem)


def verify(folder: Path, *, field: str) -> list[str]:
    """The problems of an export, one per line; empty if there are none. Reads every byte."""
    try:
        record = read_object(folder / ORIGIN, field=field)
        if CONTENTS not in record:
            return [f"{folder / ORIGIN}: it is of an earlier release, which recorded no digests of the files"]
        return [f"{folder / name}: {problem}" for name, problem in _problems(folder, field=field, full=True)]
    except UserError as error:
        return [str(error).splitlines()[0]]


def _problems(folder: Path, *, field: str, full: bool) -> Iterator[tuple[str, str]]:
    if not (folder / ORIGIN).is_file():
        return
    try:
        record = read_object(folder / ORIGIN, field=field)
    except UserError as error:
        if full:
            raise
        _log.warning(
            "it is not known whether the export is as it was written: %s", str(error).splitlines()[0]
        )
        return
    written = record.get(CONTENTS)
    for name, values in written.items() if isinstance(written, Mapping) else ():
        if Path(name).name == name and (problem := _changed(folder / name, values, full=full)):
            yield name, problem


def _changed(file: Path, values: Any, *, full: bool) -> str:
    by, of = ("crc32", _crc32) if full else ("sample", digests.sample_hash)
    try:
        return digests.difference(file, values, by=by, of=of, writer="the export")
    except (KeyError, TypeError, ValueError):
        return f"cannot be compared, {ORIGIN} is damaged"


def _crc32(file: Path) -> str:
    return f"{marker.measure(file).crc32:08x}"
