"""Weights from a Hugging Face folder or hub id, read slice by slice: no rank ever holds more than its own part."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from hybridtrain.config.schema import ModelConfig
from hybridtrain.models.facts import adapter_refused
from hybridtrain.models.init import Box, Source
from hybridtrain.types import UserError, refusal


def pretrained(model: ModelConfig) -> Source:
    """A source of weights from `model.from_pretrained` (safetensors only). Raises UserError for missing or ill-shaped ones."""
    from safetensors import SafetensorError, safe_open

    folder = _folder(model)
    files = _index(folder)
    if any(".lora_" in name for name in files):
        raise adapter_refused(model.from_pretrained)

    def values(name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        if name not in files:
            raise UserError(f"model.from_pretrained={model.from_pretrained}: it holds no '{name}'; is it a checkpoint of this architecture?")
        try:
            with safe_open(folder / files[name], framework="pt") as file:
                view = file.get_slice(name)
                if tuple(view.get_shape()) != shape:
                    raise UserError(f"model.from_pretrained={model.from_pretrained}: '{name}' has shape {tuple(view.get_shape())}, the config wants {shape}")
                return view[box]
        except (SafetensorError, OSError) as error:
            raise _damaged(folder / files[name], error) from error

    return values


def _damaged(file: Path, error: Exception) -> UserError:
    return refusal("model.from_pretrained", file, f"it cannot be read ({error})", allowed="whole safetensors files", instead="download or export it again")


def _folder(model: ModelConfig) -> Path:
    folder = Path(model.from_pretrained)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json"]
    return Path(snapshot_download(model.from_pretrained, revision=model.revision, allow_patterns=patterns))


def _index(folder: Path) -> dict[str, str]:
    """Parameter name -> file name."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return dict(json.loads(index.read_text())["weight_map"])
    single = folder / "model.safetensors"
    if not single.is_file():
        raise refusal(
            "model.from_pretrained",
            folder,
            "there are no safetensors weights in it",
            allowed="model.safetensors, or shards with their index",
            instead="convert the checkpoint with transformers' save_pretrained",
        )
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise _damaged(single, error) from error
