"""LoRA: two matrices of low rank beside a linear layer whose own weight is frozen (arXiv 2106.09685).

    x (..., K) --> W (N, K) ------------------------------------+--> y (..., N)
              \\-> A (rank, K) --> B (N, rank) --> times scale --/

A module keeps its class, its weight and its names; A and B are its modules `lora_A` and `lora_B`, as in peft,
and a hook adds their product. B begins at zero, so that training begins at the model; A is a pure function of
seed and name, as all initial weights.

Under tensor parallelism A and B are cut as W is, by `sliced`:

    W cut along            A                     B                     example
    N, its outputs         whole, gradient a sum cut along N           q_proj, up_proj
    K, its inputs          cut along K           whole, gradient a sum o_proj, down_proj
    nothing                whole                 whole                 gradients are sums where W's is
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.config.schema import AdaptersConfig
from hybridtrain.errors import refusal
from hybridtrain.models import build, dora, patterns, quantised
from hybridtrain.models.init import Slices, Step, WeightSource, replay
from hybridtrain.models.linears import Linear, is_transposed, linears_in, linears_of
from hybridtrain.models.slicing import Slicing
from hybridtrain.models.structure import structure_of

FIELD, SAVED = "adapters.match", "adapters.modules_to_save"
A, B = "lora_A", "lora_B"
DROPOUT = "lora_dropout"
"""Module that drops elements of the input of A; only with adapters.dropout."""


class Factor(nn.Module):
    """A or B. Not an nn.Linear, since it is none of the model's linear layers."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def scale_of(settings: AdaptersConfig) -> float:
    """What the product of A and B is multiplied by."""
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def is_chosen(linear: Linear, settings: AdaptersConfig) -> bool:
    """Whether a linear layer gets an adapter."""
    if settings.kind == "none":
        return False
    return patterns.matches(linear.path, settings.match) if settings.match else not linear.router


def chosen(config: Any, settings: AdaptersConfig) -> list[Linear]:
    """The linear layers of a model that get adapters."""
    return [linear for linear in linears_of(config) if is_chosen(linear, settings)]


def add(module: Any, settings: AdaptersConfig, *, inputs: int, outputs: int) -> None:
    """Give a linear layer an adapter, in place, on the device of its weight and in its dtype."""
    module.add_module(A, Factor(module.weight.detach().new_empty(settings.rank, inputs)))
    module.add_module(B, Factor(module.weight.detach().new_empty(outputs, settings.rank)))
    if settings.dropout:
        module.add_module(DROPOUT, nn.Dropout(settings.dropout))
    if settings.dora:
        dora.add(module, outputs=outputs)
    module.register_forward_hook(partial(_add, scale_of(settings)))


def _add(scale: float, module: Any, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """A hook after a linear layer."""
    x = module.lora_dropout(given[0]) if hasattr(module, DROPOUT) else given[0]
    change = module.lora_B(module.lora_A(x)) * scale
    if dora.MAGNITUDE not in module._parameters:
        return y + change
    base = y if x is given[0] else type(module).forward(module, x)
    return dora.applied(module, y, base=base, change=change, scale=scale)


def add_to(
    layers: Iterable[tuple[int, nn.Module]], settings: AdaptersConfig, *, prefix: str, config: Any
) -> None:
    """Give the layers of a model, with their numbers, the adapters that the settings ask for, in place.
    `prefix`: path to the layers.
    """
    for number, layer in layers:
        found = list(linears_in(layer, path=f"{prefix}.{number}", number=number, config=config))
        for linear, module in found:
            if is_chosen(linear, settings):
                add(module, settings, inputs=linear.inputs, outputs=linear.outputs)


def add_to_model(model: nn.Module, settings: AdaptersConfig, *, config: Any) -> None:
    """As `add_to`, for a whole model."""
    prefix = structure_of(config).layers
    add_to(enumerate(model.get_submodule(prefix).children()), settings, prefix=prefix, config=config)


def shapes(linears: Sequence[Linear], settings: AdaptersConfig) -> dict[str, torch.Size]:
    """Name -> whole shape of the parameters of adapters."""
    found = {}
    for linear in linears:
        found[f"{linear.path}.{A}.weight"] = torch.Size((settings.rank, linear.inputs))
        found[f"{linear.path}.{B}.weight"] = torch.Size((linear.outputs, settings.rank))
        if settings.dora:
            found[f"{linear.path}.{dora.MAGNITUDE}"] = torch.Size((linear.outputs,))
    return found


def values_kept(linears: Iterable[Linear], settings: AdaptersConfig) -> int:
    """Values of a token that dropout and magnitudes of adapters keep for the backward pass: the dropped input
    and its mask, of a byte each; both products.
    """
    dropped, products = (sum(getattr(linear, name) for linear in linears) for name in ("inputs", "outputs"))
    return 3 * dropped // 2 * (settings.dropout > 0) + 2 * products * settings.dora


def source(
    base: WeightSource, settings: AdaptersConfig, *, config: Any, dtype: torch.dtype, seed: int
) -> WeightSource:
    """The initial weights of a model whose own are those of `base`, and compute in `dtype`."""
    rounded = as_stored(base, settings, config=config, dtype=dtype)
    model = build.meta_model(config)

    def values(name: str, shape: tuple[int, ...], slices: Slices) -> Tensor:
        if not patterns.is_adapter(name):
            return base(name, shape, slices)
        path, _, key = name.rpartition(".")
        if key == dora.MAGNITUDE:
            module = model.get_submodule(path)
            return dora.initial(rounded, path, module=module, outputs=slices[0], dtype=dtype)
        bound = 1 / math.sqrt(shape[1])  # as torch and peft draw it
        step = (
            Step("uniform_", (-bound, bound), (), 0, math.prod(shape))
            if name.endswith(f".{A}.weight")
            else Step("zero_", (), (), 0, math.prod(shape))
        )
        return replay([step], shape, slices, key=f"{seed}:{name}")

    return values


def sliced(slicing: Slicing, settings: AdaptersConfig, *, config: Any) -> Slicing:
    """How tensor parallelism cuts a model with adapters, from how it cuts the model."""
    cuts, partial_, dropped = dict(slicing.cuts), set(slicing.partial), [*slicing.dropped]
    for path, transposed in _kinds(config).items():
        weight = f"{path}.weight"
        cut, names = slicing.cuts.get(weight), {A: f"{path}.{A}.weight", B: f"{path}.{B}.weight"}
        lengths = {f"{path}.{dora.MAGNITUDE}"} if settings.dora else set()
        if cut is None:
            partial_ |= {*names.values(), *lengths} if weight in slicing.partial else set()
            continue
        dim, rest = int(cut[0]), cut[1:]
        if settings.base_format != "none" and not dim:
            cuts[f"{path}.{quantised.LARGEST}"] = cut
        elif settings.base_format == "nf4":  # equal parts of whole blocks
            cuts[weight] = cuts[f"{path}.{quantised.LARGEST}"] = "1"
        part = B if dim == int(transposed) else A
        cuts[names[part]] = f"{int(part == A)}{rest}"
        cuts |= dict.fromkeys(lengths if part == B else (), f"0{rest}")
        partial_ |= {names[A]} if part == B else {names[B], *lengths}
        if part == A and settings.dropout:
            assert rest in ("", ":q"), f"ranks have no equal parts of the inputs of {path}"
            dropped.append(f"{path}.{DROPOUT}")
    return dataclasses.replace(slicing, cuts=cuts, partial=frozenset(partial_), dropped=tuple(dropped))


def with_codes(
    base: WeightSource, settings: AdaptersConfig, *, config: Any, dtype: torch.dtype
) -> WeightSource:
    """The weights of a model whose frozen ones are stored as the settings ask for, from its plain ones."""
    kind = settings.base_format
    return base if kind == "none" else quantised.stored(base, chosen(config, settings), kind, dtype=dtype)


def as_stored(
    base: WeightSource, settings: AdaptersConfig, *, config: Any, dtype: torch.dtype
) -> WeightSource:
    """The plain weights of a model, rounded as `with_codes` stores them."""
    kind = settings.base_format
    return base if kind == "none" else quantised.plain(base, chosen(config, settings), kind, dtype=dtype)


def codes_of(
    base: WeightSource, settings: AdaptersConfig, *, config: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What `with_codes` has of the weights that are stored in codes, whole."""
    kind = settings.base_format
    linears = [] if kind == "none" else chosen(config, settings)
    return quantised.tensors(base, linears, kind, dtype=dtype)


def _kinds(config: Any) -> dict[str, bool]:
    """Path inside a layer of each linear layer -> whether its weight is transposed."""
    layers: Any = build.meta_model(config).get_submodule(structure_of(config).layers)
    return {
        linear.path.removeprefix("."): is_transposed(module)
        for number, layer in enumerate(layers)
        for linear, module in linears_in(layer, path="", number=number, config=config)
    }


def check(config: Any, settings: AdaptersConfig) -> list[Linear]:
    """The linear layers that get adapters. Raises UserError for patterns that match none."""
    found = linears_of(config)
    names = [linear.path for linear in found]
    for pattern in settings.match:
        matching = any(patterns.matches(name, [pattern]) for name in names)
        if not matching and (expert := _expert(pattern, config)):
            raise refusal(
                FIELD,
                [pattern],
                f"{expert} holds the weights of all experts in one parameter, which gets no adapter yet",
                allowed=", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})),
                instead=f"{FIELD}=[] for all linear layers",
            )
        patterns.check_one(FIELD, pattern, names, what="linear layer")
    if not found:
        raise refusal(
            "adapters.kind",
            settings.kind,
            f"a {config.model_type} model has no linear layers of torch or transformers inside its layers",
            allowed="none",
            instead="model.freeze for what is not to be trained",
        )
    linears = [linear for linear in found if is_chosen(linear, settings)]
    if settings.base_format != "none":
        transposed = any(_kinds(config).values())
        quantised.check(linears, settings, transposed=transposed)
    return linears


def saved(config: Any, settings: AdaptersConfig) -> dict[str, torch.Size]:
    """Name -> shape of the model's own parameters that are trained beside adapters."""
    return {
        name: parameter.shape
        for name, parameter in build.meta_model(config).named_parameters()
        if not patterns.is_frozen(name, freeze=(), adapters=settings)
    }


def ends_of(model: Any) -> list[nn.Parameter]:
    """The weights of a model's embedding and of its head of tokens, if it has one; one twice if tied."""
    return [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end]


def check_saved(config: Any, settings: AdaptersConfig, linears: Sequence[Linear]) -> None:
    """Refuse patterns of modules that match none, or one that cannot be trained beside adapters: embedding
    and head of tokens, layers that have adapters (raises UserError).
    """
    model: Any = build.meta_model(config)
    ends = ends_of(model)
    paths = {name.rpartition(".")[0]: parameter for name, parameter in model.named_parameters()}
    others = {linear.path for linear in linears} | {
        path for path, each in paths.items() if any(each is end for end in ends)
    }
    for pattern in settings.modules_to_save:
        patterns.check_one(SAVED, pattern, [*paths], what="module")
        refused = sorted(path for path in others if patterns.matches(path, [pattern]))
        inside = [
            name
            for path in paths
            if patterns.matches(path, [pattern])
            for name in paths
            if name.startswith(f"{path}.") and not patterns.matches(name, settings.modules_to_save)
        ]
        if refused or inside:
            raise refusal(
                SAVED,
                [pattern],
                f"{refused[0]} has an adapter, or is the embedding or the head of tokens"
                if refused
                else f"{inside[0]} is inside a module that it matches, and is not saved itself",
                allowed="other modules, such as norms, and linear layers that adapters.match leaves out",
                instead="a pattern that does not match it",
            )


def _expert(pattern: str, config: Any) -> str:
    """A parameter of three dimensions that a pattern matches, with or without its last word; empty: none."""
    for name, parameter in build.meta_model(config).named_parameters():
        parts = (name, name.rpartition(".")[0])
        if parameter.dim() == 3 and any(patterns.matches(part, [pattern]) for part in parts):
            return name
    return ""


def merged(
    weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, *, scale: float, transposed: bool
) -> Tensor:
    """The weight of a linear layer that does what it and its adapter do, in fp32 at least."""
    change = b.float() @ a.float()
    total = (
        weight.to(torch.promote_types(weight.dtype, torch.float32))
        + (change.t() if transposed else change) * scale
    )
    return total if magnitude is None else dora.merged(total, magnitude, transposed=transposed)


def line(linears: Sequence[Linear], settings: AdaptersConfig, *, own: dict[str, torch.Size], of: int) -> str:
    """What is trained, in words. `own`: see `saved`; `of`: parameters of the model."""
    count = sum(map(math.prod, (shapes(linears, settings) | own).values()))
    kinds: Mapping[str, None] = dict.fromkeys(linear.path.rpartition(".")[2] for linear in linears)
    more = ", trained magnitudes (DoRA)" if settings.dora else ""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in own)
    whole = f", and {', '.join(modules)} whole" if modules else ""
    more += f", dropout {settings.dropout:g}" if settings.dropout else ""
    return (
        f"{settings.kind} of rank {settings.rank}, scale {scale_of(settings):.4g}{more}, beside "
        f"{len(linears)} linear layers ({', '.join(kinds)}){whole}: {count:,} parameters are trained, "
        f"{count / of:.2%} of the model's"
    )
