"""Initial weights: random, or from a Hugging Face folder or hub id, of which each rank reads
only its own slices.

Every parameter must be in the files, and every tensor in the files must be a parameter, or a buffer that is
saved with the model: others are refused, or logged if they are harmless. Rows of added tokens are random, as
in a new model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtrain.config.schema import AdaptersConfig, ModelConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import classifier, encoder, heads, hub, patterns, tokens, weights
from hybridtrain.models.build import meta_model, saved_buffers
from hybridtrain.models.conversion import Converted, as_parameters
from hybridtrain.models.init import Slices, WeightSource, draw
from hybridtrain.models.plain import TYPES
from hybridtrain.models.structure import structure_of
from hybridtrain.models.weights import FIELD, Stored
from hybridtrain.runtime import log

_log = log.get("model")
_LAYER = re.compile(r"\.(\d+)\.")


def initial(model: ModelConfig, config: Any, *, seed: int) -> WeightSource:
    """The initial weights of a run: those of `model.from_pretrained`, else random ones.

    `config`: a transformers config.
    """
    fresh = draw(config, seed=seed)
    return pretrained(model, config, fresh=fresh) if model.from_pretrained else fresh


def pretrained(model: ModelConfig, config: Any, *, fresh: WeightSource) -> WeightSource:
    """The weights of `model.from_pretrained` (safetensors only).

    `fresh`: weights for the rows of added tokens. Raises UserError for missing, misshapen,
    quantized or additional weights.
    """
    tensors = _parameters(model, config)
    for line in _checked(tensors, model=model, config=config):
        _log.info("weights   %s", line)
    structure = structure_of(config)
    embed, head = f"{structure.embed}.weight", f"{structure.head}.weight"
    buffers, new = saved_buffers(meta_model(config)), _new(tensors, config=config)

    def values(name: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
        if name not in tensors and (name in new or name in buffers):
            return fresh(name, shape, slices)
        key = head if name == embed and embed not in tensors else name
        rows = tensors[key].shape[0] if shape else 0
        if rows == (shape[0] if shape else 0):
            return _read(tensors[key], slices)
        rows_here, parts = slices[0], []
        if rows_here.start < rows:
            there = slice(rows_here.start, min(rows_here.stop, rows))
            parts.append(_read(tensors[key], (there, *slices[1:])).float())
        if rows_here.stop > rows:
            parts.append(fresh(name, shape, (slice(max(rows_here.start, rows), rows_here.stop), *slices[1:])))
        return torch.cat(parts)

    return values


def check(model: ModelConfig, config: Any, *, adapters: AdaptersConfig) -> None:
    """Refuse what `pretrained` and `check_new` refuse, before a run directory is opened.

    Only of local folders: a hub id is checked later.
    """
    if model.from_pretrained and Path(model.from_pretrained).is_dir():
        _checked(_parameters(model, config), model=model, config=config)
        tokens.source_generation(model)
        check_new(model, config, adapters=adapters)


def check_new(model: ModelConfig, config: Any, *, adapters: AdaptersConfig) -> None:
    """Refuse new parameters that would not be trained beside adapters (raises UserError)."""
    if adapters.kind != "none" and model.from_pretrained:
        new = _new(_parameters(model, config), config=config)
        if frozen := [name for name in new if patterns.is_frozen(name, freeze=(), adapters=adapters)]:
            raise _random(sorted(frozen), model=model)


def _random(frozen: Sequence[str], *, model: ModelConfig) -> UserError:
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in frozen))
    return refusal(
        "adapters.modules_to_save",
        "[]",
        f"{frozen[0]} is not in {model.from_pretrained}: it would be random, and not be trained",
        allowed="patterns of all modules that the folder does not have",
        instead=f"adapters.modules_to_save=[{','.join(modules)}]",
    )


def _parameters(model: ModelConfig, config: Any) -> Mapping[str, Stored | Converted]:
    """The tensors of the folder by the names of parameters.

    Raises UserError for adapters and quantized weights.
    """
    tensors = weights.stored(hub.weights_folder(model))
    if any(".lora_" in name for name in tensors):
        raise weights.adapter_refused(model.from_pretrained)
    weights.check_dtypes(tensors, source=model.from_pretrained)
    if config.model_type in TYPES:
        return tensors
    return as_parameters(meta_model(config), tensors, read=lambda stored: _read(stored, ()))


def _read(tensor: Stored | Converted, slices: Slices) -> Tensor:
    """The values in `slices`; all of them for ()."""
    from safetensors import SafetensorError, safe_open

    if isinstance(tensor, Converted):
        return tensor.value()[slices]
    try:
        with safe_open(tensor.file, framework="pt") as file:
            return file.get_slice(tensor.name)[slices] if slices else file.get_tensor(tensor.name)
    except (SafetensorError, OSError) as error:
        raise weights.unreadable(tensor.file, error) from error


def _checked(tensors: Mapping[str, Stored | Converted], *, model: ModelConfig, config: Any) -> list[str]:
    """Log lines on added and ignored weights.

    Raises UserError if the weights are not those of the model in `config`.
    """
    empty = meta_model(config)
    buffers = {name: tuple(buffer.shape) for name, buffer in saved_buffers(empty).items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    structure = structure_of(config)
    embed, head = f"{structure.embed}.weight", f"{structure.head}.weight"
    # Of a tied pair only the head may be stored, as transformers allows.
    swapped = config.tie_word_embeddings and embed not in tensors and head in tensors
    classes, drawn = classifier.is_classifier(config.architectures), _new(tensors, config=config)
    missing = [
        name
        for name in shapes
        if name not in tensors and name not in drawn and not (swapped and name == embed)
    ]
    if missing:
        raise _missing(missing, model=model, head=head, config=config)
    lines = [
        f"{name}: drawn as in a new model" + (", a row for each class" if classes and name == head else "")
        for name in sorted(drawn)
    ]
    if added := [name for name in buffers if name not in tensors]:
        more = f" and {len(added) - 1} others" if len(added) > 1 else ""
        lines.append(f"{added[0]}{more}: not in the files, as in a new model")
    shapes |= {name: shape for name, shape in buffers.items() if name in tensors}
    for name, shape in shapes.items():
        if name in drawn:
            continue
        stored_shape = tensors[head if swapped and name == embed else name].shape
        if stored_shape == shape:
            continue
        if name not in (embed, head) or (classes and name == head) or stored_shape[1:] != shape[1:]:
            raise refusal(
                FIELD,
                model.from_pretrained,
                f"'{name}' has shape {stored_shape}, the config needs {shape}",
                allowed="weights of the model in config.json",
                instead="the checkpoint's own sizes in model.config",
            )
        weights.check_rows(stored_shape, rows=shape[0], model=model)
        lines.append(
            f"{name}: {shape[0] - stored_shape[0]} rows for added tokens, "
            f"drawn as in a new model ({stored_shape[0]} -> {shape[0]})"
        )
    return lines + _left_over(tensors, shapes=shapes, model=model, config=config)


def _new(tensors: Mapping[str, Stored | Converted], *, config: Any) -> set[str]:
    """Parameters that a folder of a model without this head need not have: those that a classifier has and
    its language model does not, and of an encoder those after its layers, if it has none of them.
    """
    if classifier.is_classifier(config.architectures):
        return heads.drawn(config) - tensors.keys()
    after = set() if not encoder.predicts(config) else _heads(config)
    return set() if any(name in tensors for name in after) else after


def _heads(config: Any) -> set[str]:
    """The parameters of an encoder's heads: all outside the encoder itself. A tied matrix is none."""
    model: Any = meta_model(config)
    inside = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(inside)}


def _missing(names: list[str], *, model: ModelConfig, head: str, config: Any) -> UserError:
    more = f" and {len(names) - 1} others" if len(names) > 1 else ""
    untied = names == [head] and not config.tie_word_embeddings
    return refusal(
        FIELD,
        model.from_pretrained,
        f"it holds no '{names[0]}'{more}" + ("" if untied else "; is it a checkpoint of this architecture?"),
        allowed="weights of the model in config.json",
        instead="model.config.tie_word_embeddings=true" if untied else "the folder of the whole model",
    )


def _chooses_layers(fields: Mapping[str, Any]) -> bool:
    """Whether chosen fields, or those of a config inside, say how many layers there are."""
    inside = (value for value in fields.values() if isinstance(value, Mapping))
    return "num_hidden_layers" in fields or any(map(_chooses_layers, inside))


def _left_over(
    tensors: Mapping[str, Stored | Converted],
    *,
    shapes: Mapping[str, object],
    model: ModelConfig,
    config: Any,
) -> list[str]:
    """Log lines on stored tensors that are no parameters. Raises UserError for one that would be lost."""
    structure, count = structure_of(config), config.get_text_config(decoder=True).num_hidden_layers
    embed, head = f"{structure.embed}.weight", f"{structure.head}.weight"
    classes = classifier.is_classifier(config.architectures)
    of_other_heads = heads.left_out(config) if classes else set()
    tables, cut, unused, of_tokens, of_encoder = 0, set(), [], [], []
    for name in tensors:
        if name in shapes:
            continue
        layer = _LAYER.search(name) if name.startswith(f"{structure.layers}.") else None
        if weights.is_rotary_table(name):
            tables += 1
        elif name in of_other_heads:
            of_tokens.append(name)
        elif encoder.is_left_out(name, config=config):
            of_encoder.append(name)
        elif name == head and config.tie_word_embeddings:
            if weights.heads_differ(tensors, embed=embed, head=head):
                raise weights.tie_refused(model.from_pretrained)
        elif layer and int(layer[1]) >= count and _chooses_layers(model.config):
            cut.add(int(layer[1]))
        else:
            unused.append(name)
    if unused:
        more = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
        bias = (
            "model.config.attention_bias=true or mlp_bias=true where the architecture has it; else "
            if unused[0].endswith(".bias")
            else ""
        )
        raise refusal(
            FIELD,
            model.from_pretrained,
            (
                f"its files hold '{unused[0]}'{more}, "
                "which the model of its config.json does not have: training would lose it"
            ),
            allowed="files in which every tensor is a parameter or a saved buffer of the model",
            instead=f"{bias}load it with transformers and save_pretrained it without these",
        )
    lines = [
        f"{name} of the files is left out: {config.architectures[0]} has no such part" for name in of_tokens
    ]
    if of_encoder:
        lines.append(f"{', '.join(of_encoder)} of the files: left out, what masks and positions do not need")
    lines += [f"{tables} rotary tables in the files are computed instead"] if tables else []
    if cut:
        lines.append(f"{len(cut)} layers of the files are left out: model.config.num_hidden_layers={count}")
    return lines
