"""Where a model's embedding, layers and head are, and what it does between them: found by looking at a
reduced copy of the model (reduced.py) and calling it.

    before -> layers[0] -> ... -> layers[n - 1] -> after -> head -> logits = transform(head's output)

`before` and `after` name the modules that own parameters: embeddings of tokens and positions, norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.errors import UserError, refusal
from hybridtrain.models import attention, classifier, heads, known, tracing
from hybridtrain.models.build import attention_of, plain_model
from hybridtrain.models.pairs import pairs_of
from hybridtrain.models.reduced import HIDDEN, reduced
from hybridtrain.models.tracing import POSITIONS, ROWS

Before = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Structure:
    """Paths of modules are those of Hugging Face's model."""

    embed: str
    layers: str
    head: str
    before: Before
    """Modules that own parameters and are called before the first layer, and the shape of their result: B, T
    and D for rows, positions and width of the hidden states, as in "BTD", "?" for something else; empty for
    one that keeps its shape, such as a norm."""
    shared: tuple[str, ...]
    """Of `before`, the outermost modules on which layers depend by more than the hidden states, such as
    embeddings for each layer: every pipeline stage has and runs them."""
    chained: bool
    """Whether layers take the hidden states of the layer before and nothing else that layers compute or that
    is trained, as far as the reduced copy shows."""
    boundary: str
    """Shape of the hidden states between layers, as in "BTD"; digits are sizes of the model's own: "4BTD"."""
    after: tuple[str, ...]
    """Modules that own parameters and are called after the last layer, without the head."""
    returns: type
    """What a layer returns: a Tensor, or a tuple or list whose first item is the hidden states."""
    items: int
    """Length of that tuple or list; 0 for a Tensor."""
    scale: float
    """Logits are cap * tanh(scale * z / cap), where z is the head's output; without a cap scale * z."""
    cap: float | None
    arguments: tuple[str, ...]
    """Those of position_ids, attention_mask and use_cache that the model's forward has and that do not change
    its result."""
    attention: str
    """Name of its attention implementation (attention.py)."""
    pairs: tuple[str, str] | None
    """Of a model that tells whether the second part of a row follows the first: (the module whose result
    the head for that takes, the head); else None."""


class Stop(Exception):
    """Ends a model's forward, and carries the hidden states out of it."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


def structure_of(config: Any) -> Structure:
    """The structure of the model of a transformers config.

    Raises UserError for a model without an embedding, one list of layers and a linear head.
    """
    kind = (type(config).__name__, config.architectures, config._attn_implementation)
    request = repr((*kind, config.to_json_string()))
    if request not in _FOUND:
        _FOUND[request] = _find(config)
    return _FOUND[request]


_FOUND: dict[str, Structure] = {}
"""What this process has found: each of its stages asks for the same."""


def stub(layer: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A layer of the same class and attributes, without parameters, that calls `forward` instead of its own.

    Models read attributes of their layers, such as the kind of attention, and of the modules in them, which
    are not registered here.
    """
    result = copy.copy(layer)
    result.__dict__ = {
        **layer.__dict__,
        **layer._modules,
        "_modules": {},
        "_parameters": {},
        "_buffers": {},
        "forward": forward,
        "extra_repr": str,
        "stub": True,
    }
    return result


def is_stub(module: nn.Module) -> bool:
    """Whether `stub` made it: it stands for a module of another stage."""
    return "stub" in module.__dict__


def hidden_of(given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    return given[0] if given else options["hidden_states"]


@torch.no_grad()
def _find(config: Any) -> Structure:
    """The structure, with the attention that has our masks if the model computes the same with it."""
    own, plain = attention.registered(config), attention_of(config)
    model = _copy(config, own)
    try:
        same = torch.allclose(
            tracing.logits(model), tracing.logits(_copy(config, plain)), rtol=1e-4, atol=1e-5
        )
    except Exception:  # a model's own code, for a name that it does not know; the model's own masks remain
        same = False
    return _structure(model, attention=own) if same else _structure(_copy(config, plain), attention=plain)


def _copy(config: Any, implementation: str) -> Any:
    small = reduced(config, random=False, tp=1)
    small._attn_implementation = implementation
    if getattr(small, "pad_token_id", None) is None:
        small.pad_token_id = 1  # a classifier takes several rows only with one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return plain_model(small).eval()


def _structure(model: Any, *, attention: str) -> Structure:
    classifies = classifier.is_classifier(model.config.architectures)
    head = heads.head_of(model) if classifies else model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        problem = f"its head is no linear layer ({type(head).__name__})"
        raise cannot_train(model.config.model_type, problem, instead=OTHER)
    embed, head = _path_of(model, model.get_input_embeddings()), _path_of(model, head)
    layers = _layers(model)
    before, after, output = _trace(model, layers=layers, head=head)
    shared, chained = _shared(model, layers=layers, before=outermost(before))
    # A classifier's logits are the head's results, or those of one token for each row.
    scale, cap = (1.0, None) if classifies else _transform(model, head=head)
    items = 0 if isinstance(output, Tensor) else len(output)
    arguments = tuple(
        name for name in tracing.arguments(model) if name != "position_ids" or _counts_from_zero(model)
    )
    return Structure(
        embed=embed,
        layers=layers,
        head=head,
        before=before,
        shared=shared,
        chained=chained,
        boundary=_named(output if isinstance(output, Tensor) else output[0]),
        after=after,
        returns=type(output),
        items=items,
        scale=scale,
        cap=cap,
        arguments=arguments,
        attention=attention,
        pairs=pairs_of(model),
    )


def _counts_from_zero(model: Any) -> bool:
    """Whether the positions of a row are 0, 1, ... by default. RoBERTa and its like have others."""
    positions = torch.arange(POSITIONS).expand(ROWS, -1)
    default, explicit = tracing.logits(model), tracing.logits(model, position_ids=positions)
    return torch.allclose(default, explicit, rtol=1e-4, atol=1e-5)


def outermost(modules: Before) -> Before:
    """Those that are not inside another."""
    paths = [path for path, _ in modules]
    return tuple(
        (path, shape) for path, shape in modules if not any(path.startswith(f"{other}.") for other in paths)
    )


OTHER = "a model of another architecture"


def cannot_train(model_type: object, problem: str, *, instead: str) -> UserError:
    """The refusal of a model."""
    return refusal(
        "model.config.model_type",
        model_type,
        problem,
        allowed="causal language models of an embedding, one list of layers and a linear head "
        "that pass `hybridtrain inspect`",
        instead=instead,
    )


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def _layers(model: Any) -> str:
    """The list of as many modules with parameters as the config has layers: one of `_no_split_modules`, not
    of an encoder, with the shortest path.
    """
    if (known_path := known.LAYERS.get(model.config.model_type)) is not None:
        return known_path
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    found = [
        (
            not any(type(item).__name__ in unsplit for item in module),
            any(word in path for word in ("encoder", "vision", "audio")),
            len(path),
            path,
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(True for _ in item.parameters()) for item in module)
    ]
    if not found:
        problem = f"no list of {count} layers was found in it"
        raise cannot_train(model.config.model_type, problem, instead=OTHER)
    return min(found)[-1]


def _trace(model: Any, *, layers: str, head: str) -> tuple[Before, tuple[str, ...], Any]:
    """`before`, `after`, and what a layer returns."""
    called: list[str] = []
    shapes: dict[str, str] = {}
    outputs: list[Any] = []
    order: list[int] = []
    handles = []
    listed = model.get_submodule(layers)
    for path, module in model.named_modules():
        inside = path.startswith(f"{layers}.")
        if not inside and any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: called.append(path)))
            handles.append(module.register_forward_hook(partial(_shape, shapes, path)))
    for index, layer in enumerate(listed):
        handles.append(layer.register_forward_pre_hook(lambda *_: called.append(layers)))
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: order.append(index)))
        handles.append(layer.register_forward_hook(lambda module, given, result: outputs.append(result)))  # noqa: ARG005
    with tracing.hooked(*handles):
        tracing.call(model)
    if not order or sorted(set(order)) != order:  # a layer for images is not called for text
        problem = f"its {len(listed)} layers are called {len(outputs)} times"
        raise cannot_train(model.config.model_type, problem, instead=OTHER)
    first, last = called.index(layers), len(called) - 1 - called[::-1].index(layers)
    after = tuple(path for path in called[last + 1 :] if path != head)
    before = tuple((path, shapes[path]) for path in dict.fromkeys(called[:first]))
    return before, after, outputs[0]


def _shape(shapes: dict[str, str], path: str, module: nn.Module, given: Any, result: Any) -> None:  # noqa: ARG001
    """Note the shape of a module's result."""
    if not isinstance(result, Tensor):
        shapes[path] = "?"
    elif given and isinstance(given[0], Tensor) and given[0].shape == result.shape:
        shapes[path] = ""
    else:
        shapes[path] = _named(result)


def _named(tensor: Tensor) -> str:
    """The shape of a tensor of a trace."""
    names = {ROWS: "B", POSITIONS: "T", HIDDEN: "D"}
    return "".join(names.get(size, str(size) if size < 10 else "?") for size in tensor.shape)


@torch.enable_grad()
def _shared(model: Any, *, layers: str, before: Before) -> tuple[tuple[str, ...], bool]:
    """(modules before the layers on which tensors with gradients depend that layers take besides the hidden
    states, and that no layer has made; Structure.chained).
    """
    taken: list[Tensor] = []
    chained = True

    def note(layer: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:  # noqa: ARG001
        nonlocal chained
        rest = tuple(value for key, value in options.items() if given or key != "hidden_states")
        values = list(_flat((given[1:], rest)))
        # A dict or list may be filled by one layer for another, and hidden states be added to others later.
        chained = chained and not any(_is_state(value) for value in values)
        taken.extend(value for value in values if isinstance(value, Tensor) and value.requires_grad)

    listed: Any = model.get_submodule(layers)
    with tracing.hooked(*(layer.register_forward_pre_hook(note, with_kwargs=True) for layer in listed)):
        tracing.call(model)
    of_layers = list(listed.parameters())
    owned = [(path, each) for path, _ in before for each in model.get_submodule(path).parameters()]
    found = set()
    for tensor in taken:
        wanted = [*of_layers, *(each for _, each in owned)]
        gradients = torch.autograd.grad(
            tensor, wanted, torch.ones_like(tensor), retain_graph=True, allow_unused=True
        )
        if all(gradient is None for gradient in gradients[: len(of_layers)]):
            reached = gradients[len(of_layers) :]
            found |= {path for (path, _), got in zip(owned, reached, strict=True) if got is not None}
    return tuple(path for path, _ in before if path in found), chained


def _flat(values: Any) -> Iterator[Any]:
    """The values in nested tuples, lists and dicts, with the lists and dicts."""
    if not isinstance(values, tuple):
        yield values
    parts = values.values() if isinstance(values, dict) else values
    for value in parts if isinstance(values, tuple | list | dict) else ():
        yield from _flat(value)


def _is_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad or (value.is_floating_point() and value.shape[-1:] == (HIDDEN,))
    return isinstance(value, dict | list)


def _transform(model: Any, *, head: str) -> tuple[float, float | None]:
    """(scale, cap) of what the model makes of the head's output."""
    module = model.get_submodule(head)
    outputs: list[Tensor] = []

    def numbers(module: nn.Module, given: Any, result: Tensor) -> Tensor:  # noqa: ARG001 - a hook's signature
        outputs.append(torch.linspace(-40.0, 40.0, result.numel()).view_as(result))
        return outputs[-1]

    with tracing.hooked(module.register_forward_hook(numbers)):
        logits = tracing.logits(model)
    z = outputs[-1].reshape(-1)[-logits.numel() :].view_as(logits)
    scale = (logits[z.abs() < 0.5] / z[z.abs() < 0.5]).median().item() if logits.numel() > 8 else 1.0
    for candidate in (1.0, *_scales(model)):
        if torch.allclose(logits, z * candidate, rtol=1e-5, atol=1e-6):
            return candidate, None
    cap = logits.abs().max().item()
    for candidate in (*_caps(model), cap):
        if torch.allclose(logits, candidate * torch.tanh(z / candidate), rtol=1e-4, atol=1e-4):
            return 1.0, candidate
    if torch.allclose(logits, z * scale, rtol=1e-4, atol=1e-5):
        return scale, None
    problem = "what it makes of its head's output is neither a scale nor a soft cap"
    raise cannot_train(model.config.model_type, problem, instead=OTHER)


def _scales(model: Any) -> list[float]:
    """Numbers in the config by which logits may be multiplied, exactly."""
    values = _numbers(model, ("logit", "lm_head", "multiplier"))
    return [*values, *(1.0 / value for value in values if value)]


def _caps(model: Any) -> list[float]:
    return [value for value in _numbers(model, ("cap",)) if value > 0]


def _numbers(model: Any, words: tuple[str, ...]) -> list[float]:
    fields = model.config.get_text_config(decoder=True).to_dict()
    return [
        float(value)
        for key, value in fields.items()
        if any(word in key for word in words)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    ]
