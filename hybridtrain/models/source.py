"""The config.json of the chosen model. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from hybridtrain.config.schema import Config, ModelConfig
from hybridtrain.errors import refusal
from hybridtrain.models import classifier, hub, overrides
from hybridtrain.models.plain import TYPES
from hybridtrain.models.weights import adapter_refused, checked_tie
from hybridtrain.runtime.files import read_object

C = TypeVar("C", bound=Config)


def read_config(model: ModelConfig) -> dict[str, Any]:
    """The model's config.json fields: those of from_pretrained,
    overridden by `model.config` (overrides.merge).

    If the folder's head weights differ from its embedding, tie_word_embeddings is false
    (weights.checked_tie). With `model.labels`, or `architectures` that ask for it, the fields of a
    classifier. Raises UserError.
    """
    source = read_object(_config_json(model), field="model.from_pretrained") if model.from_pretrained else {}
    fields = overrides.merge(source, model.config)
    asked = classifier.kind_of(model.config.get("architectures"))
    if model.labels or asked:
        found = source.get("architectures") or fields.get("architectures")
        return classifier.with_labels(fields, model.labels, kind=asked or classifier.TEXTS, source=found)
    return checked_tie(fields, model=model) if fields.get("model_type") in TYPES else fields


_HEADS = {"token_classification": classifier.TOKENS, "question_answering": classifier.ANSWERS}


def with_head(config: C) -> C:
    """`config` with the kind of model that the task needs, unless `model.config.architectures` names one with
    the head of a task.
    """
    if config.task.kind not in _HEADS or classifier.has_head(config.model.config.get("architectures")):
        return config
    fields = {**config.model.config, "architectures": [_HEADS[config.task.kind]]}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, config=fields))


def _config_json(model: ModelConfig) -> Path:
    folder = Path(model.from_pretrained)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder / "config.json"
        if (folder / "adapter_config.json").is_file():
            raise adapter_refused(model.from_pretrained)
        hint = (
            "hybridtrain export run.dir=RUN, then its export folder"
            if (folder / "checkpoints").is_dir() or (folder / "complete.json").is_file()
            else "the folder that holds config.json"
        )
        raise refusal(
            "model.from_pretrained",
            model.from_pretrained,
            "there is no config.json in it",
            allowed="a Hugging Face model folder or hub id",
            instead=hint,
        )
    if folder.is_absolute() or model.from_pretrained.startswith("."):
        raise refusal(
            "model.from_pretrained",
            model.from_pretrained,
            "there is no such folder",
            allowed="a Hugging Face model folder or hub id",
            instead="an existing folder",
        )
    return hub.file(model, "config.json")
