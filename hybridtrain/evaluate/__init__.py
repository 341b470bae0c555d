"""Evaluation and generation with plain transformers, from a Hugging Face folder.

    perplexity.py   `hybridtrain evaluate`: loss and perplexity on the held-out rows
    generate.py     `hybridtrain generate`: text from a prompt
    placement.py    models larger than memory

Both accept an export, any Hugging Face folder or hub id, or a checkpoint, which `loadable` exports first.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybridtrain.checkpoint import export_record
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.schema import CheckpointConfig, InferenceConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import adapter_folder
from hybridtrain.models.build import auto_class
from hybridtrain.run.record import require_run
from hybridtrain.runtime import log, network
from hybridtrain.runtime.files import is_lfs_pointer, lfs_pointer

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # name, or owner/name
_log = log.get("model")
_ALLOWED = "a Hugging Face folder, the folder of a complete checkpoint, or a hub id"


@contextmanager
def loadable(source: str, *, run_dir: Path, field: str) -> Iterator[str]:
    """Yield a folder or hub id that transformers can load. `field`: the option, for error messages.

    An empty `source` is the run's export; a warning tells of a later checkpoint. A checkpoint is exported in
    float32 to a temporary folder.
    Raises UserError if there is nothing to load.
    """
    if not source:
        folder = run_dir / "export"
        if not _is_model(folder):
            require_run(run_dir, command=field.partition(".")[0])
            raise refusal(
                field,
                "(none)",
                f"{run_dir} holds no export",
                allowed=_ALLOWED,
                instead=f"hybridtrain export {run_dir}, or {field}=FOLDER",
            )
        _warn_of_later(folder, run_dir=run_dir)
        yield str(folder)
        return
    folder = Path(source)
    if (folder / "complete.json").is_file():
        with tempfile.TemporaryDirectory(prefix="hybridtrain-") as temporary:
            yield str(_export(folder, out=Path(temporary) / "export", field=field))
        return
    if folder.is_dir() and not _is_model(folder):
        raise refusal(
            field,
            source,
            "it holds neither config.json nor a complete checkpoint",
            allowed=_ALLOWED,
            instead=f"{field}=<run>/export",
        )
    if not folder.is_dir() and not _HUB_ID.fullmatch(source):
        raise refusal(
            field, source, "there is no such folder", allowed=_ALLOWED, instead=f"{field}=<run>/export"
        )
    yield str(folder) if folder.is_dir() else source


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", adapter_folder.CONFIG))


def _warn_of_later(export: Path, *, run_dir: Path) -> None:
    step = export_record.step_of(export)
    newest = max(Manager(run_dir / "checkpoints", settings=CheckpointConfig()).steps(), default=0)
    if step is not None and newest > step:
        _log.warning(
            "the export is of step %d, the newest checkpoint is of step %d: "
            "hybridtrain export %s writes that one",
            step,
            newest,
            run_dir,
        )


def _export(checkpoint: Path, *, out: Path, field: str) -> Path:
    from hybridtrain.export import hf

    return hf.export(
        checkpoint,
        run=hf.run_of(str(checkpoint), field=field),
        out=out,
        dtype="float32",
        which="last",
        merge=False,
        max_shard_bytes=5 * 10**9,
    )


def load_model(source: str, *, field: str, trust_remote_code: bool) -> Any:
    """`load_within`, with all memory that is free."""
    return load_within(InferenceConfig(), source, field=field, trust_remote_code=trust_remote_code)


def load_within(inference: InferenceConfig, source: str, *, field: str, trust_remote_code: bool) -> Any:
    """The model of `source`, with adapters if it holds these, in eval mode and its stored dtype, on the
    GPUs if there are any, else on the CPU.

    accelerate distributes it over GPUs, main memory and, where these are too small, disk (device_map="auto").
    Raises UserError with `field` if transformers cannot load it.
    """
    from transformers import AutoConfig, GenerationConfig
    from transformers.utils import logging

    from hybridtrain.evaluate import placement, quantised

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    _check_pointers(Path(source), field=field)
    export_record.check(Path(source), field=field)
    adapted = adapter_folder.is_adapter(Path(source))
    base, revision = adapter_folder.base_of(Path(source), field=field) if adapted else (source, "main")
    options = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": not (Path(base).exists() or network.hub_resolves()),
        "revision": revision,
    }
    try:
        config = AutoConfig.from_pretrained(base, **options)
        if adapted:
            known = export_record.model_of(Path(source))
            adapter_folder.add_classes(config, Path(source), known=known, field=field)
        kind = auto_class(config)
        places = placement.options(
            kind,
            config,
            source=source,
            field=field,
            adapted=adapted,
            inference=inference,
            trusts=trust_remote_code,
        )
        with quantised.quiet(), _without_warnings(adapted):
            model, loaded = kind.from_pretrained(
                base, config=config, dtype="auto", output_loading_info=True, **places, **options
            )
            quantised.dequantise(model)
        if (
            adapted and (Path(source) / "generation_config.json").is_file()
        ):  # with the tokens that end answers
            model.generation_config = GenerationConfig.from_pretrained(source)
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except Exception as error:  # safetensors, pydantic and others have their own exceptions
        needed = placement.folder_needed(error, inference=inference)
        raise needed or unloadable(source, field=field, what="model", error=error) from error
    if adapted:
        adapter_folder.attach(model, Path(source), new=loaded["missing_keys"], field=field)
    return model.eval()


@contextmanager
def _without_warnings(adapted: bool) -> Iterator[None]:
    """transformers warns of new parameters of a base model, which are then those of the adapters' folder."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if adapted:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_pointers(folder: Path, *, field: str) -> None:
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.json")) if folder.is_dir() else ():
        if is_lfs_pointer(file):
            raise lfs_pointer(field, file)


def unloadable(source: str, *, field: str, what: str, error: Exception) -> UserError:
    """The refusal of a `source` that transformers cannot load, with the first line of its error."""
    folder = Path(source).resolve()
    again = (
        f"hybridtrain export {folder.parent}"
        if (folder.parent / "config.yaml").is_file()
        else f"hybridtrain export RUN export.out={source}"
    )
    instead = (
        f"{again}, which writes it again"
        if (folder / export_record.ORIGIN).is_file()
        else f"{field}=<run>/export, which hybridtrain export RUN writes"
    )
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return refusal(
        field, source, f"transformers cannot load its {what}: {reason}", allowed=_ALLOWED, instead=instead
    )
