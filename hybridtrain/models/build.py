"""Hugging Face configs and modules: the only file that builds models with transformers."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.errors import UserError, refusal
from hybridtrain.models import classifier, encoder, names, overrides, plain
from hybridtrain.models.reduced import HEAD_DIM, reduced
from hybridtrain.types import PairBatch

_NOT_OURS = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache")
"""Fields of config.json that are labels, or that precision, training and export decide."""


def hf_config(fields: Mapping[str, Any], *, chosen: Mapping[str, Any], attention: str) -> Any:
    """The transformers config of config.json `fields`. `chosen`: those of the user, checked to take effect.

    Raises UserError.
    """
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key not in _NOT_OURS}
    try:
        config = AutoConfig.for_model(fields["model_type"], **overrides.numbers(rest))
    except Exception as error:  # transformers validates with several libraries, each with its own exceptions
        raise _invalid(error, fields, chosen=chosen) from error
    _check_names(config, chosen=chosen, inside="")
    _check_activation(config)
    config._attn_implementation = attention
    config.use_cache = False
    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    if classifier.is_classifier(fields.get("architectures")):
        config.architectures = list(fields["architectures"])
        config.architectures = [model_class(config).__name__]
        # A classifier's head is never tied.
        chosen = {key: value for key, value in chosen.items() if key != "tie_word_embeddings"}
    elif encoder.is_encoder(fields):
        config.architectures = list(fields["architectures"])
    request = repr((sorted(fields.items()), sorted(chosen.items()), attention))
    if chosen and request not in _VERIFIED:
        _check_effective(config, fields, chosen=chosen)
        _VERIFIED.add(request)
    return config


_VERIFIED: set[str] = set()
"""Requests that this process has checked already: one start builds the same config three times."""


def _invalid(error: Exception, fields: Mapping[str, Any], *, chosen: Mapping[str, Any]) -> UserError:
    """The refusal of fields that transformers does not accept, with the first lines of its error."""
    reason = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(reason[:3])
    named = next((key for key in chosen if key in text), None)
    where, value = (
        (f"model.config.{named}", chosen[named])
        if named
        else ("model.config", f"(a {fields.get('model_type')} model)")
    )
    return refusal(
        where,
        value,
        text[:300],
        allowed="what this architecture's config.json accepts",
        instead="the published value, or leave it out",
    )


def _check_activation(config: Any) -> None:
    from transformers.activations import ACT2FN

    name = getattr(config, "hidden_act", None)
    if name is not None and name not in ACT2FN:
        near = difflib.get_close_matches(str(name), ACT2FN, n=1, cutoff=0.3)
        words = "transformers has no such activation"
        raise refusal(
            "model.config.hidden_act",
            name,
            words,
            allowed=", ".join(sorted(ACT2FN)),
            instead=f"model.config.hidden_act={near[0] if near else 'silu'}",
        )


def one_layer(config: Any) -> nn.Module:
    """The model with only its first layer, on the meta device."""
    one = copy.deepcopy(config)
    if getattr(one, "layer_types", None) is not None:
        one.layer_types = one.layer_types[:1]
    one.num_hidden_layers = 1
    return meta_model(one)


# -- chosen fields take effect
# -------------------------------------------------------------------------------------


def _check_effective(config: Any, fields: Mapping[str, Any], *, chosen: Mapping[str, Any]) -> None:
    """Compare each chosen value with the built config and its modules (raises UserError for
    the first that differs).
    """
    _check_fields(config, chosen=chosen)
    if config.model_type not in plain.TYPES:
        _built(lambda: meta_model(config), fields, chosen=chosen)
        return
    if any(
        key in chosen
        for key in (
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
            "num_hidden_layers",
        )
    ):
        expected = overrides.windows(fields, layers=config.num_hidden_layers)
        windows = [plain.window(config, index) for index in range(config.num_hidden_layers)]
        named = next(
            (
                key
                for key in ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers")
                if key in chosen
            ),
            "num_hidden_layers",
        )
        if windows != expected:
            raise _not_effective(named, chosen[named], f"windows {windows} instead of {expected}")
        asks = chosen.get("use_sliding_window") or "sliding_attention" in (chosen.get("layer_types") or [])
        if asks and getattr(config, "sliding_window", None) is None:
            words = (
                "without use_sliding_window and sliding_window "
                "no layer has a window, so it would have no effect"
            )
            instead = "model.config.use_sliding_window=true model.config.sliding_window=4096"
            raise refusal(f"model.config.{named}", chosen[named], words, allowed="with both", instead=instead)
    if any(key in chosen for key in overrides.ROPE):
        _check_rotary(config, overrides.rope_of(fields), chosen=chosen)
    model = _built(lambda: one_layer(config), fields, chosen=chosen)
    embed, attention = (
        model.get_submodule(plain.EMBED),
        model.get_submodule(f"{plain.LAYERS}.0.{plain.ATTENTION}"),
    )
    for key, effective in (
        ("vocab_size", embed.num_embeddings),
        ("hidden_size", embed.embedding_dim),
        ("head_dim", attention.head_dim),
    ):
        if chosen.get(key) is not None and chosen[key] != effective:
            raise _not_effective(key, chosen[key], effective)


def _check_names(config: Any, *, chosen: Mapping[str, Any], inside: str) -> None:
    """Refuse chosen fields that a config, or one `inside` it, does not have (raises UserError)."""
    defaults = type(config)().to_dict()
    known = {*defaults, *type(config).attribute_map, *_NOT_OURS}
    if config.model_type in plain.TYPES:
        known |= {"head_dim", *overrides.ROPE}
    elif (inside or "rope_parameters" in defaults) and not overrides.of_layer_types(
        getattr(config, "rope_parameters", None)
    ):
        known |= set(overrides.ROPE)  # older names, which configs inside read without declaring them
    if classifier.kind_of(chosen.get("architectures")) == classifier.TOKENS:
        known.add("classifier_dropout")  # which heads of decoders read without declaring it
    if "head_dim" in chosen and "head_dim" not in known and _uses_head_dim(config):
        known.add("head_dim")
    for key, value in chosen.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            raise refusal(
                f"model.config.{inside}{key}",
                value,
                f"a {config.model_type} config has no such field",
                allowed="the fields of its config.json",
                instead=f"model.config.{inside}{nearest[0]}={value}" if nearest else "leave it out",
            )
        if isinstance(value, Mapping) and hasattr(within := getattr(config, key, None), "to_dict"):
            _check_names(within, chosen=value, inside=f"{inside}{key}.")


def _uses_head_dim(config: Any) -> bool:
    """Whether a model reads a field that its config does not declare."""
    shapes = []
    for size in (HEAD_DIM, 2 * HEAD_DIM):
        small = reduced(config, random=False, tp=1)
        small.head_dim = size
        shapes.append([parameter.shape for parameter in meta_model(small).parameters()])
    return shapes[0] != shapes[1]


def _check_fields(config: Any, *, chosen: Mapping[str, Any]) -> None:
    """Compare each chosen value with the built config."""
    built = config.to_dict()  # the config itself refuses to say what differs between its layers
    for key, value in chosen.items():
        if key in (*overrides.ROPE, *_NOT_OURS, "per_layer_config") or (
            value is None and key != "sliding_window"
        ):
            continue
        if key == "sliding_window" and chosen.get("use_sliding_window") is False:
            continue  # published Qwen configs have a window that is switched off
        effective = built[key] if key in built else getattr(config, key)
        if not overrides.same(effective, value):
            raise _not_effective(key, value, effective)


def _built(
    build: Callable[[], nn.Module], fields: Mapping[str, Any], *, chosen: Mapping[str, Any]
) -> nn.Module:
    """The model that `build` makes. Raises UserError for fields that it does not accept."""
    try:
        return build()
    except (KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise _invalid(error, fields, chosen=chosen) from error


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _not_effective(key: str, value: object, effective: object) -> UserError:
    instead = {"sliding_window": "model.config.use_sliding_window=true too"}.get(key, "leave it out")
    words = f"transformers makes {effective} of it, so it would have no effect"
    return refusal(
        f"model.config.{key}", value, words, allowed="a value that the model uses", instead=instead
    )


def _check_rotary(config: Any, expected_fields: Mapping[str, Any], *, chosen: Mapping[str, Any]) -> None:
    """Compare the rotary module with the fields `expected_fields`: its type, its base, and each key."""
    key = next(key for key in overrides.ROPE if key in chosen)
    for name, value in expected_fields.items():
        if config.rope_parameters.get(name) != value:
            raise _not_effective(
                key, chosen[key], f"{name}={config.rope_parameters.get(name)} instead of {value}"
            )
    try:
        rotary: Any = type(one_layer(config).get_submodule(plain.ROTARY))(config=config)
    except (KeyError, ValueError, RuntimeError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise refusal(
            f"model.config.{key}",
            chosen[key],
            f"no rotary positions ({error})",
            allowed="fields of its kind",
            instead="leave it out",
        ) from error
    kind, theta = config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]
    if rotary.rope_type != kind:
        raise _not_effective(key, chosen[key], f"rope_type={rotary.rope_type} instead of {kind}")
    for name, effective in (
        ("partial_rotary_factor", 2 * len(rotary.inv_freq) / _head_dim(config)),
        ("attention_factor", rotary.attention_scaling),
    ):
        if name in expected_fields and expected_fields[name] != effective:
            raise _not_effective(key, chosen[key], f"{name}={effective} instead of {expected_fields[name]}")
    if kind in ("default", "linear"):  # the other types change the frequencies in their own ways
        dim = 2 * len(rotary.inv_freq)
        expected = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) / float(
            config.rope_parameters.get("factor") or 1.0
        )
        if not torch.allclose(rotary.inv_freq.double(), expected, rtol=1e-4, atol=0.0):
            raise _not_effective(key, chosen[key], "other frequencies")


def meta_model(config: Any) -> nn.Module:
    """The model of `config` on the meta device, without allocating its weights."""
    with torch.device("meta"):
        return plain_model(config)


def empty_model(config: Any, *, initializing: AbstractContextManager[Any]) -> nn.Module:
    """The model of `config` with its buffers, and with parameters on meta.

    `initializing` is entered while the model's own rules initialize its weights, which only changes buffers.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model: Any = _own_model(config)
    with initializing:  # buffers have their own dtype while they are set: one in bfloat16 is rounded
        model.initialize_weights()
    model.tie_weights()
    return names.single(model.to(torch.float32).train())


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of those that are saved with the model, such as the bias of a router's scores.

    Training uses and does not change them.
    """
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def model_class(config: Any) -> Any:
    """transformers' class of the model."""
    found = auto_class(config)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def auto_class(config: Any) -> Any:
    """Where transformers looks for a causal LM, a classifier or an encoder."""
    import transformers

    kind = classifier.kind_of(config.architectures) or encoder.predicts(config)
    return {
        classifier.TEXTS: transformers.AutoModelForSequenceClassification,
        classifier.TOKENS: transformers.AutoModelForTokenClassification,
        classifier.ANSWERS: transformers.AutoModelForQuestionAnswering,
        encoder.MASKED: transformers.AutoModelForMaskedLM,
        encoder.PRETRAINING: transformers.AutoModelForPreTraining,
    }.get(kind, transformers.AutoModelForCausalLM)


def attention_of(config: Any) -> str:
    """The attention implementation that the model uses: what the config asks for, but eager for one without
    SDPA.
    """
    wanted = config._attn_implementation
    return "eager" if wanted == "sdpa" and not model_class(config)._supports_sdpa else wanted


def language_model(config: Any) -> Any:
    """The config of the language model with the layers of a decoder's classifier; else its own."""
    from hybridtrain.models import heads

    result = copy.deepcopy(config)
    if classifier.is_classifier(config.architectures) and not heads.is_encoder(config):
        result.architectures = None
    return result


def plain_model(config: Any) -> nn.Module:
    """Hugging Face's causal LM (or classifier, or encoder) of `config`, fp32, in training mode,
    on torch's default device.
    """
    return names.single(_own_model(config).to(torch.float32).train())


def _own_model(config: Any) -> Any:
    """Of a copy of the config, which models of decoders of encoder-decoder models change."""
    return auto_class(config).from_config(copy.deepcopy(config), attn_implementation=attention_of(config))


def logits(model: Any, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Tensor:
    """The head's output at every position, (B, T, outputs), also of a classifier, whose own forward returns
    only the last token's.
    """
    from hybridtrain.models import heads
    from hybridtrain.models.structure import structure_of

    given = {"position_ids": position_ids_BT, "use_cache": False}
    config = model.config  # of a model for images, too, that of its language model, which has no class here
    if config.model_type in plain.TYPES or type(config) not in auto_class(config)._model_mapping:
        taken: Collection[str] = inspect.signature(model.forward).parameters
    else:
        taken = structure_of(config).arguments
    given = {"input_ids": input_ids_BT, **{name: value for name, value in given.items() if name in taken}}
    if classifier.is_classifier(model.config.architectures):
        return heads.results_of(model, given)
    return logits_of(model(**given))


def pair_logits(model: Any, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """(logits of tokens (B, T, V), of pairs (B, 2)) of the plain model of an encoder for pre-training."""
    row_BT = ((batch.position_ids_BT == 0).cumsum(1) == 1).long()  # what follows is padding
    output = model(input_ids=batch.input_ids_BT, attention_mask=row_BT, **batch.arguments())
    return output.prediction_logits, output.seq_relationship_logits


def logits_of(output: Any) -> Tensor:
    """The logits of tokens in what a model returns; one with several heads names them otherwise. Of the first
    and the last token of an answer, (B, T, 2).
    """
    if hasattr(output, "start_logits"):
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits if hasattr(output, "logits") else output.prediction_logits
