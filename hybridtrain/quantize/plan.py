"""A plan: the scheme of each linear layer, as a YAML file that one can read, edit and hand back.

    layers:
      model.layers.0.mlp.down_proj: int8
      model.layers.0.mlp.up_proj: int4-g32-gptq
      model.layers.1.mlp.experts: int8            all experts of a layer

Layers that it does not name stay as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from hybridtrain.errors import refusal
from hybridtrain.models.linears import Linear
from hybridtrain.quantize import schemes
from hybridtrain.quantize.experts import key
from hybridtrain.quantize.schemes import Scheme

FIELD, FILE = "quantize.plan", "plan.yaml"
AUTO = "auto"

Plan = Mapping[str, Scheme]


def uniform(scheme: Scheme, linears: Sequence[Linear]) -> Plan:
    """One scheme for all, but for routers of experts."""
    return {key(linear): scheme for linear in linears if not linear.router}


def choice(plan: Plan) -> Callable[[Linear], Scheme | None]:
    """The scheme that a plan gives a linear layer; None: left as it is."""
    return lambda linear: plan.get(key(linear))


def read(file: Path, linears: Sequence[Linear]) -> Plan:
    """The plan in a file. Raises UserError for layers that the model does not have, and unknown schemes."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = str(error).partition("\n")[0]
        raise refusal(
            FIELD, file, problem, allowed="auto, or a YAML file", instead="quantize.plan=auto"
        ) from error
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise refusal(
            FIELD,
            file,
            "it has no layers",
            allowed="layers: {PATH: SCHEME}",
            instead="the plan.yaml of an earlier quantize.plan=auto",
        )
    check_paths(layers, linears, field=FIELD, value=file)
    return {
        str(path): schemes.parse(str(name), field=f"{FIELD}={file}: {path}") for path, name in layers.items()
    }


def check_paths(layers: Iterable[object], linears: Sequence[Linear], *, field: str, value: object) -> None:
    """Refuse paths of layers that the model does not have (raises UserError)."""
    known = list(dict.fromkeys(map(key, linears)))
    for path in layers:
        if path not in known:
            near = difflib.get_close_matches(str(path), known, n=1)
            raise refusal(
                field,
                value,
                f"the model has no linear layer {path}",
                allowed=f"{known[0]} and {len(known) - 1} more",
                instead=near[0] if near else known[0],
            )


def write(plan: Plan, file: Path, *, comment: str) -> None:
    """Write a plan, with lines of comment above."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    layers = {path: scheme.name for path, scheme in plan.items()}
    file.write_text(lines + yaml.safe_dump({"layers": layers}, sort_keys=False))
