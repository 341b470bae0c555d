"""A folder of adapters, as peft writes and reads it.

adapter_config.json           rank, scale, the linear layers, and the model that they belong to
adapter_model.safetensors     base_model.model.<path of a linear layer>.lora_A.weight, .lora_B.weight
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybridtrain.config.schema import AdaptersConfig, ModelConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import adapters, weights
from hybridtrain.models.build import meta_model
from hybridtrain.models.linears import Linear, is_linear, is_transposed
from hybridtrain.runtime.files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "modules_to_save": None,
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
    revision = {} if local or base.revision == "main" else {"revision": base.revision}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(source).resolve()) if local else source,
        **revision,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "lora_dropout": settings.dropout,
        "bias": "none",
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


@torch.no_grad()
def attach(model: Any, folder: Path, *, field: str) -> None:
    """Give a model the adapters of a folder, in place. Raises UserError for those of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    fields = read_object(folder / CONFIG, field=field)
    try:
        tensors = load_file(folder / WEIGHTS)
        settings = AdaptersConfig("lora", int(fields["r"]), float(fields["lora_alpha"]))
    except (SafetensorError, OSError) as error:
        raise weights.unreadable(folder / WEIGHTS, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(field, folder, f"its {CONFIG} has no rank and alpha") from error
    settings.rslora, settings.dora = bool(fields.get("use_rslora")), bool(fields.get("use_dora"))
    modules = dict(model.named_modules())
    suffix = f".{adapters.A}.weight"
    for name in [name for name in tensors if name.endswith(suffix)]:
        path = name.removeprefix(PREFIX).removesuffix(suffix)
        module: Any = modules.get(path)
        if module is None or not is_linear(module):
            raise _refused(field, folder, f"'{name}' belongs to no linear layer of its base model")
        outputs, inputs = module.weight.shape[::-1] if is_transposed(module) else module.weight.shape
        adapters.add(module, settings, inputs=inputs, outputs=outputs)
        linear = Linear(path, 0, 0, inputs, outputs, router=False)
        for each, shape in adapters.shapes([linear], settings).items():
            value = tensors.pop(f"{PREFIX}{each}", None)
            if value is None:
                raise _refused(field, folder, f"'{path}' has no {each.removeprefix(f'{path}.')}")
            if value.shape != shape:
                raise _refused(field, folder, f"'{each}' has shape {tuple(value.shape)}, not {tuple(shape)}")
            model.get_parameter(each).copy_(value)
    if tensors:
        raise _refused(field, folder, f"'{min(tensors)}' is no part of a low-rank adapter")


def _refused(field: str, folder: Path, problem: str) -> UserError:
    return refusal(
        field,
        folder,
        problem,
        allowed="LoRA adapters of linear layers, on the model that adapter_config.json names",
        instead="the merged model: hybridtrain export RUN export.merge=true, or peft's merge_and_unload",
    )
