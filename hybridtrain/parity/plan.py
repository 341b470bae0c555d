"""What parity compares: the user's config, adapted for a fair comparison, and a list of layouts.

No torch: a layout that cannot run is refused before anything starts.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridtrain import registry
from hybridtrain.analysis.facts import facts_of_run
from hybridtrain.analysis.of_layout import facts_of_layout
from hybridtrain.config import deepspeed_checks, precision_checks, schema
from hybridtrain.errors import UserError, refusal
from hybridtrain.models.source import read_config
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import notation, rules, schedules
from hybridtrain.plan.batch import BatchPlan, plan_batch
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.precision.rules import has_loss_scale
from hybridtrain.types import Capabilities, ModelFacts

MIN_EPS = 1e-6
"""Smallest Adam epsilon. Adam hardly moves an element whose gradient is far below eps, and moves one with a
larger gradient by about lr. With eps 1e-8 rounding errors of 1e-8 in a gradient of 1e-9 would decide in which
direction the element moves by lr."""
LOSS_SCALE = 1024.0
"""fp16_mixed: one fixed scale on both sides, so high that few gradients underflow, so
low that none overflow."""
DEFAULT_SET = (
    "single",
    "dp_replicate2",
    "dp_shard2-zero1",
    "dp_shard2-zero2",
    "dp_shard2-zero3",
    "tp2",
    "pp2",
    "pp2-gpipe",
    "pp2-interleaved_1f1b",
    "pp2-zbv_zero_bubble",
    "dp_replicate2-tp2",
    "pp2-dp_replicate2",
    "pp2-tp2",
    "dp_replicate2-dp_shard2-zero3",
    "dp_shard2-tp2-zero3",
    "pp2-dp_shard2-zero1",
    "pp2-tp2-zbv_zero_bubble",
    "tp4",
    "pp4",
    "pp2-dp_replicate2-tp2",
    "pp2-dp_shard2-tp2-zero1",
    "pp2-dp_shard2-tp2-zero3",
    "dp_replicate2-dp_shard2-tp2-zero2",
    "pp2-dp_shard2-tp2-zero1-zbv_zero_bubble",
    "pp4-tp2-interleaved_1f1b",
)
"""Every axis, ZeRO stage and type of schedule; pairs of them; with 8 processes triples. Layouts that do not
fit are left out."""
_SMALL_VOCAB = 2048
_SMALL_WIDTH = 512
_SMALL_LAYERS = 4
_NOT_MODEL = ("auto_map", "torch_dtype", "dtype", "transformers_version")


@dataclass(frozen=True)
class LayoutCase:
    """A checked layout to compare."""

    name: str
    engine: str
    parallel: schema.ParallelConfig
    layout: ParallelLayout
    plan: BatchPlan


@dataclass(frozen=True)
class Comparison:
    """Everything that will run."""

    config: schema.ParityRoot
    facts: ModelFacts
    cases: list[LayoutCase]
    left_out: dict[str, str]
    """Layouts of the default set that do not fit -> the reason."""
    changes: list[str]
    """What was changed in the user's config, as text."""

    @property
    def plan(self) -> BatchPlan:
        """Batch plan of the reference: all rows in one process."""
        return plan_batch(
            self.config.batch, layout=ParallelLayout(1, 1, 1, 1, 1), seq_len=self.config.data.seq_len
        )


def prepare(
    config: schema.ParityRoot, *, capabilities: Mapping[str, Capabilities], devices: int | None
) -> Comparison:
    """Choose layouts and model. Raises UserError for a named layout that cannot run.

    `capabilities`: engine -> its capabilities, of the engines to compare. `devices`: number of
    GPUs, None on CPU.
    """
    config, changes = _prepared_config(config)
    model = facts_of_run(config)
    cases, left_out = _choose(config, model, capabilities, devices)
    if config.parity.shrink:
        small = shrunk(
            read_config(config.model),
            model=model,
            layouts=[case.layout for case in cases],
            layers=_layers_needed(cases),
            vocab=not config.data.named,
        )
        changes.append(_shrink_note(config, read_config(config.model), small))
        config.model = dataclasses.replace(config.model, from_pretrained="", config=small)
        model = facts_of_run(config)
        cases, left_out = _choose(config, model, capabilities, devices)
    if not cases:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise refusal(
            "parity.layouts",
            "[]",
            f"no layout fits ({reasons})",
            allowed="layouts this model and batch can run",
            instead="parity.layouts=[single]",
        )
    return Comparison(config, model, cases, left_out, changes)


def _prepared_config(config: schema.ParityRoot) -> tuple[schema.ParityRoot, list[str]]:
    """A copy of the config with a fixed loss scale and an epsilon of at least MIN_EPS; and
    the changes as text.
    """
    precision_checks.check_fixed(config.precision, command="parity")
    config = copy.deepcopy(config)
    changes = [f"constant lr {config.optim.lr:g}, no warm-up"]
    ours = config.optim.kind in registry.BUILT_IN["optimizer"]
    if config.optim.eps < MIN_EPS and (config.optim.kind in ("adamw", "muon") or not ours):
        changes.append(
            f"optim.eps {MIN_EPS:g} instead of {config.optim.eps:g}"
            f"{'' if ours else ', if the function of ' + config.optim.kind + ' reads it'}: "
            "rounding noise is magnified where gradients are below it"
        )
        config.optim.eps = MIN_EPS
    if has_loss_scale(config.precision):
        scale = LOSS_SCALE
        changes.append(f"fixed loss scale {scale:g} on both sides, so that no step is skipped")
        config.precision.static_scale = scale
    if config.task.next_sentence and not config.data.named:
        problem, allowed = "random tokens are no pairs of sentences", "a corpus of data.sentences=true"
        instead = "data.path=FOLDER, or task.next_sentence=false"
        raise refusal("task.next_sentence", True, problem, allowed=allowed, instead=instead)
    if config.task.kind == "masked_lm" and not (config.task.tokens or config.data.named):
        changes.append("token 0 stands for the mask: random tokens have no tokenizer")
        config.task.tokens = {"mask": 0}
    return config, changes


def _choose(
    config: schema.ParityRoot,
    model: ModelFacts,
    capabilities: Mapping[str, Capabilities],
    devices: int | None,
) -> tuple[list[LayoutCase], dict[str, str]]:
    """The layouts to run, grouped by engine; and those of the default set that are left out -> the reason."""
    cases: list[LayoutCase] = []
    left_out: dict[str, str] = {}
    for engine, supported in capabilities.items():
        chosen, missing = _choose_for(engine, config, model, supported, devices)
        cases += chosen
        left_out |= {
            f"{engine} {name}" if len(capabilities) > 1 else name: why for name, why in missing.items()
        }
    return cases, left_out


def _choose_for(
    engine: str, config: schema.ParityRoot, model: ModelFacts, supported: Capabilities, devices: int | None
) -> tuple[list[LayoutCase], dict[str, str]]:
    named = [_parse(text) for text in config.parity.layouts]
    cases: dict[str, LayoutCase] = {}
    left_out: dict[str, str] = {}
    for candidate in named or [_parse(text) for text in DEFAULT_SET] + [_layout_of(config.parallel)]:
        parallel = _without_unsupported(candidate, supported)
        layout = layouts.resolve(parallel, world_size=_processes(parallel))
        name = notation.write(parallel, layout)
        try:
            if not named and layout.world_size > config.parity.max_processes:
                continue
            if devices is not None and layout.world_size > devices:
                raise _too_few(name, layout.world_size, devices)
            plan = plan_batch(config.batch, layout=layout, seq_len=config.data.seq_len)
            rules.check(
                parallel,
                layout=layout,
                plan=plan,
                precision=config.precision.kind,
                facts=facts_of_layout(model, config.model, parallel, tp=layout.tp, engine=engine),
                capabilities=supported,
            )
            if engine == "deepspeed":
                deepspeed_checks.check_layout(config, parallel)
        except UserError as error:
            if named:
                raise UserError(
                    f"parity.layouts: {name} cannot run with this model and batch:\n{error}"
                ) from error
            left_out[name] = str(error).splitlines()[0]
            continue
        cases.setdefault(name, LayoutCase(name, engine, parallel, layout, plan))
    return list(cases.values()), left_out


def _parse(text: str) -> schema.ParallelConfig:
    return schema.ParallelConfig(**notation.parse(text))


def _without_unsupported(parallel: schema.ParallelConfig, supported: Capabilities) -> schema.ParallelConfig:
    """A layout, without sequence parallelism (in its name -nosp) if the engine does not support it."""
    return (
        parallel
        if supported.sequence_parallel or parallel.tp == 1
        else dataclasses.replace(parallel, sequence_parallel="false")
    )


def _layout_of(parallel: schema.ParallelConfig) -> schema.ParallelConfig:
    """The layout of the config itself, with degrees of -1 replaced by the smallest possible ones."""
    fill = {"dp_shard": 2 if parallel.zero_stage else 1}
    open_axes = {axis: fill.get(axis, 1) for axis in layouts.AXES if getattr(parallel, axis) == -1}
    return dataclasses.replace(parallel, **open_axes)  # type: ignore[arg-type]


def _processes(parallel: schema.ParallelConfig) -> int:
    return math.prod(getattr(parallel, axis) for axis in layouts.AXES)


def _too_few(name: str, processes: int, devices: int) -> UserError:
    return refusal(
        "parity.layouts",
        name,
        f"{processes} processes, but there are {devices} GPUs",
        allowed=f"layouts of up to {devices} processes",
        instead="CUDA_VISIBLE_DEVICES= in front of the command, to compare on the CPU",
    )


def _layers_needed(cases: Sequence[LayoutCase]) -> int:
    """One for each stage, and those at which stages begin."""
    stages = (case.layout.pp * schedules.stages_per_rank(case.parallel) for case in cases)
    return max((*stages, *(layer + 1 for case in cases for layer in case.parallel.cut)), default=1)


def shrunk(
    fields: Mapping[str, Any],
    *,
    model: ModelFacts,
    layouts: Sequence[ParallelLayout],
    layers: int,
    vocab: bool,
) -> dict[str, Any]:
    """config.json fields of a smaller model of the same family: fewer layers and heads, smaller width,
    same ratio of heads.

    `layouts`: what the model must still be divisible into; `layers`: how many it needs; `vocab`: whether the
    vocabulary may shrink, too.
    """
    degrees = {layout.tp for layout in layouts}
    group = model.heads // model.kv_heads
    fits = [
        kv
        for kv in range(1, model.kv_heads + 1)
        if model.kv_heads % kv == 0
        and all(kv * group % tp == 0 and (kv % tp == 0 or tp % kv == 0) for tp in degrees)
    ]
    kv_heads = next((kv for kv in fits if kv > 1), model.kv_heads)
    heads = kv_heads * group
    head_dim = model.head_dim
    while head_dim > 16 and heads * head_dim > _SMALL_WIDTH:
        head_dim //= 2
    layers = min(model.layers, max(_SMALL_LAYERS, layers))
    width = model.hidden * heads * head_dim // (model.heads * model.head_dim)
    ffn = max(1, round(model.ffn / model.hidden * width / 64)) * 64
    small = {key: value for key, value in fields.items() if not key.startswith("_") and key not in _NOT_MODEL}
    small |= {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": width,
        "intermediate_size": ffn,
    }
    if "head_dim" in fields or width != heads * head_dim:
        small["head_dim"] = head_dim
    if isinstance(fields.get("layer_types"), list):
        small["layer_types"] = fields["layer_types"][:layers]
    if vocab and model.vocab > _SMALL_VOCAB:
        small["vocab_size"] = _SMALL_VOCAB + model.vocab % 2  # an odd vocabulary stays odd
        small |= {
            key: None
            for key in ("pad_token_id", "bos_token_id", "eos_token_id")
            if fields.get(key) is not None
        }
    return small


def _shrink_note(config: schema.ParityRoot, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    keys = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    )
    cuts = [
        f"{key} {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)
    ]
    weights = (
        "; its weights are new, not those of model.from_pretrained" if config.model.from_pretrained else ""
    )
    return f"parity.shrink: {', '.join(cuts) or 'nothing to cut'}{weights}"
