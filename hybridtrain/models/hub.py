"""Downloads files of `model.from_pretrained` from the Hugging Face hub, each at most once per process."""

from __future__ import annotations

import functools
from pathlib import Path

from hybridtrain.config.schema import ModelConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import log, network

FIELD = "model.from_pretrained"
_log = log.get("model")


def file(model: ModelConfig, name: str) -> Path:
    """Path of a file of the repository in the local cache. Raises UserError if it cannot be downloaded."""
    try:
        return _downloaded(model.from_pretrained, model.revision, name)
    except Exception as error:
        raise _refused(error, model, name=name) from error


def optional(model: ModelConfig, name: str) -> Path | None:
    """Path of an optional file of the repository; None if it does not exist or, with a
    warning, cannot be downloaded.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return _downloaded(model.from_pretrained, model.revision, name)
    except Exception as error:
        if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
            _log.warning(
                "%s goes on without %s: %s", model.from_pretrained, name, _reason(error, model, name=name)
            )
    return None


def weights_folder(model: ModelConfig) -> Path:
    """The folder that `model.from_pretrained` names, or that of its repository in the local cache."""
    local = Path(model.from_pretrained)
    return local if local.is_dir() else folder(model)


def folder(model: ModelConfig) -> Path:
    """Folder in the local cache with the repository's weights and JSON files. Raises UserError."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json"]
    try:
        return Path(
            snapshot_download(
                model.from_pretrained,
                revision=model.revision,
                allow_patterns=patterns,
                local_files_only=not network.hub_resolves(),
            )
        )
    except Exception as error:
        raise _refused(error, model, name="its weights") from error


@functools.cache
def _downloaded(repository: str, revision: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(repository, name, revision=revision, local_files_only=not network.hub_resolves())
    )


def _refused(error: Exception, model: ModelConfig, *, name: str) -> UserError:
    problem = f"neither a local folder nor available on the hub: {_reason(error, model, name=name)}"
    return refusal(
        FIELD,
        model.from_pretrained,
        problem,
        allowed="a folder, or a hub id that this machine reaches",
        instead="a local folder",
    )


def _reason(error: Exception, model: ModelConfig, *, name: str) -> str:
    from huggingface_hub import errors

    words: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "it is gated: accept its terms on its page, then set your token (HF_TOKEN)"),
        (
            errors.RepositoryNotFoundError,
            "there is no such repository, or it is private and needs a token (HF_TOKEN)",
        ),
        (errors.RevisionNotFoundError, f"it has no revision {model.revision} (model.revision)"),
        (errors.LocalEntryNotFoundError, f"{name} is not in the local cache, and the hub cannot be reached"),
        (errors.OfflineModeIsEnabled, f"{name} is not in the local cache, and HF_HUB_OFFLINE is set"),
        (errors.EntryNotFoundError, f"it has no {name}"),
    )
    reason = next((text for kind, text in words if isinstance(error, kind)), "")
    return reason or next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
