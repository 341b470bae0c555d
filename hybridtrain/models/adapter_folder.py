"""A folder of adapters, as peft writes and reads it.

adapter_config.json           rank, scale, the linear layers, and the model that they belong to
adapter_model.safetensors     base_model.model.<path of a linear layer>.lora_A.weight, .lora_B.weight; of a
                              classifier also base_model.model.<path of its head>.weight
hybridtrain.json              the names of its classes, which peft has no place for
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.config.schema import AdaptersConfig, ModelConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import adapters, classifier, weights
from hybridtrain.models.build import meta_model
from hybridtrain.models.linears import Linear, is_linear, is_transposed
from hybridtrain.models.patterns import is_classes_head
from hybridtrain.runtime.files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_TASKS: Mapping[str, str] = {
    classifier.TEXTS: "SEQ_CLS",
    classifier.TOKENS: "TOKEN_CLS",
    classifier.ANSWERS: "QUESTION_ANS",
}
"""Kind of classifier -> peft's name of its task."""
_OF_CLASSES = ("architectures", "id2label", "label2id", "pad_token_id")
"""Fields of config.json that a base model does not have in common with a classifier on top of it."""
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""Fields of adapter_config.json with other meanings than ours -> the value that is read."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def config_of(
    linears: Sequence[Linear], settings: AdaptersConfig, *, base: ModelConfig, model: Any
) -> dict[str, Any]:
    """adapter_config.json. `model`: the transformers config of the base model."""
    source = base.from_pretrained
    local = Path(source).is_dir()
    empty = meta_model(model)
    own = adapters.saved(model, settings)
    saved = dict.fromkeys(
        name.partition(".")[0] if is_classes_head(name) else name.rpartition(".")[0] for name in own
    )
    revision = {} if local or base.revision == "main" else {"revision": base.revision}
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(classifier.kind_of(model.architectures), "CAUSAL_LM"),
        "base_model_name_or_path": str(Path(source).resolve()) if local else source,
        **revision,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "lora_dropout": settings.dropout,
        "bias": "none",
        "modules_to_save": [*saved] or None,
        "fan_in_fan_out": is_transposed(empty.get_submodule(linears[0].path)),
        "target_modules": _targets([linear.path for linear in linears], empty),
        "inference_mode": True,
    }


def _targets(paths: Sequence[str], model: nn.Module) -> list[str]:
    """The last words of the paths, as peft's users write them, where these name no other linear layer."""
    words = {path.rpartition(".")[2] for path in paths}
    linears = {path for path, module in model.named_modules() if is_linear(module)}
    named = {path for path in linears if path.rpartition(".")[2] in words}
    return sorted(words if named == set(paths) else paths)


def base_of(folder: Path, *, field: str) -> tuple[str, str]:
    """(folder or hub id, revision) of the model that adapters belong to. Raises UserError for adapters of
    another kind.
    """
    fields = read_object(folder / CONFIG, field=field)
    for name, value in _PLAIN.items():
        if fields.get(name, value) not in (value, None):
            raise _refused(field, folder, f"its {name} is {fields[name]}, which is not supported yet")
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise _refused(field, folder, "it does not name its base model")
    return base, str(fields.get("revision") or "main")


def fields_of_classes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of an export says of a classifier, from its config.json; empty for other models."""
    classifies = classifier.is_classifier(config.get("architectures"))
    return {name: config[name] for name in _OF_CLASSES if name in config} if classifies else {}


def add_classes(config: Any, folder: Path, *, known: Mapping[str, Any], field: str) -> None:
    """Make the transformers config of a base model that of the classifier that adapters belong to, in place:
    by what is `known` of it, see `fields_of_classes`, else by peft's name of the task and the head's rows.
    """
    tasks = {task: kind for kind, task in _TASKS.items()}
    kind = tasks.get(str(read_object(folder / CONFIG, field=field).get("task_type")))
    if not known and kind and not classifier.is_classifier(config.architectures):
        known = {"architectures": [kind], "num_labels": _head_rows(folder)}
    for name, value in known.items():
        names = name == "id2label"  # keys of JSON are texts
        setattr(config, name, {int(number): text for number, text in value.items()} if names else value)


def _head_rows(folder: Path) -> int:
    """Rows of the last tensor of a classifier's head; 2 where there is none."""
    tensors = _tensors(folder)
    heads = [name for name in tensors if is_classes_head(name.removeprefix(PREFIX))]
    heads = [name for name in heads if not name.startswith(f"{PREFIX}pre_")]  # goes into the last
    return len(tensors[max(heads)]) if heads else 2


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise weights.unreadable(folder / WEIGHTS, error) from error


@torch.no_grad()
def attach(model: Any, folder: Path, *, new: Iterable[str], field: str) -> None:
    """Give a model the adapters of a folder, in place. Raises UserError for those of another model, and if
    parameters of the model that are `new`, and random, are not in the folder.
    """
    fields, tensors = read_object(folder / CONFIG, field=field), _tensors(folder)
    try:
        settings = AdaptersConfig("lora", int(fields["r"]), float(fields["lora_alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(field, folder, f"its {CONFIG} has no rank and alpha") from error
    settings.rslora, settings.dora = bool(fields.get("use_rslora")), bool(fields.get("use_dora"))
    modules = dict(model.named_modules())

    def put(name: str) -> None:
        value, parameter = tensors.pop(f"{PREFIX}{name}", None), model.get_parameter(name)
        if value is None:
            raise _refused(field, folder, f"it has no '{name}'")
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
            raise _refused(field, folder, f"'{name}' has shape {shapes}")
        parameter.copy_(value)

    suffix = f".{adapters.A}.weight"
    for name in [name for name in tensors if name.endswith(suffix)]:
        path = name.removeprefix(PREFIX).removesuffix(suffix)
        module: Any = modules.get(path)
        if module is None or not is_linear(module):
            raise _refused(field, folder, f"'{name}' belongs to no linear layer of its base model")
        outputs, inputs = module.weight.shape[::-1] if is_transposed(module) else module.weight.shape
        adapters.add(module, settings, inputs=inputs, outputs=outputs)
        linear = Linear(path, 0, 0, inputs, outputs, router=False)
        for each in adapters.shapes([linear], settings):
            put(each)
    unknown = {name for name, _ in model.named_parameters()}.intersection(new)
    if random := sorted(name for name in unknown if f"{PREFIX}{name}" not in tensors):
        raise _refused(field, folder, f"'{random[0]}' is neither in it nor in its base model")
    ends = adapters.ends_of(model)
    own = {name for name, each in model.named_parameters() if not any(each is end for end in ends)}
    for name in own:
        if is_classes_head(name) or f"{PREFIX}{name}" in tensors:
            put(name)
    if tensors:
        raise _refused(
            field, folder, f"'{min(tensors)}' is no part of an adapter, nor of a module saved with it"
        )


def _refused(field: str, folder: Path, problem: str) -> UserError:
    return refusal(
        field,
        folder,
        problem,
        allowed="LoRA adapters of linear layers, on the model that adapter_config.json names",
        instead="the merged model: hybridtrain export RUN export.merge=true, or peft's merge_and_unload",
    )
