"""Engines: `settle` computes layout, batch and model facts of a config, `build` creates
an engine from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridtrain import tasks
from hybridtrain.analysis.facts import facts_of_run
from hybridtrain.analysis.of_layout import facts_of_layout
from hybridtrain.config.schema import Config
from hybridtrain.engine import deepspeed_config
from hybridtrain.errors import refusal
from hybridtrain.models import weights
from hybridtrain.plan import capabilities, memory, rules
from hybridtrain.plan import layout as layouts
from hybridtrain.plan.batch import BatchPlan, plan_batch
from hybridtrain.plan.layout import ParallelLayout
from hybridtrain.types import ModelFacts

if TYPE_CHECKING:
    import torch

    from hybridtrain.engine.deepspeed import DeepSpeedEngine
    from hybridtrain.engine.torch_native import TorchEngine
    from hybridtrain.tasks.task import Task


@dataclass(frozen=True)
class Settled:
    """Layout, batch plan and model facts of a config for a number of processes."""

    layout: ParallelLayout
    plan: BatchPlan
    facts: ModelFacts


def settle(config: Config, *, world_size: int) -> Settled:
    """Layout, batch plan and model facts of a config for `world_size` processes. Raises UserError.

    Without torch, but for a model type that has to be analysed.
    """
    model = facts_of_run(config)
    weights.check(config.model, facts=model)
    layout = layouts.resolve(config.parallel, world_size=world_size)
    model = facts_of_layout(model, config.model, config.parallel, tp=layout.tp, engine=config.engine.kind)
    plan = plan_batch(config.batch, layout=layout, seq_len=config.data.seq_len)
    supported = capabilities.with_options(config.engine, kind=config.engine.kind)
    rules.check(
        config.parallel,
        layout=layout,
        plan=plan,
        precision=config.precision.kind,
        facts=model,
        capabilities=supported,
    )
    if config.engine.kind == "deepspeed":
        deepspeed_config.build(config, plan=plan)  # raises UserError for contradictions
        if config.precision.monitor_every and layout.tp > 1:
            raise refusal(
                "precision.monitor_every",
                config.precision.monitor_every,
                "the numerics monitor does not know what DeepSpeed's tensor parallelism cuts",
                allowed="0 with engine=deepspeed and parallel.tp > 1",
                instead="engine=torch, or precision.monitor_every=0",
            )
    check_device([config.engine.kind], precision=config.precision.kind)
    return Settled(layout, plan, model)


def check_task(config: Config, *, facts: ModelFacts) -> None:
    """Raise UserError if the model's head does not fit the task.

    `config` has the labels of the data (data.blend.adapt_model).
    """
    classifies = {"classification": "", "token_classification": "tokens", "question_answering": "answers"}
    if config.task.kind in classifies and not facts.labels:
        problem, allowed = "neither the data nor model.from_pretrained names classes", "names of the classes"
        raise refusal(
            "model.labels",
            "[]",
            problem,
            allowed=allowed,
            instead="model.labels=[negative,positive], or data of data.format=labelled"
            + ("_words" if classifies[config.task.kind] else ""),  # answers need no names
        )
    if config.task.kind in classifies and facts.head != classifies[config.task.kind]:
        task = next(kind for kind, head in classifies.items() if head == facts.head)
        raise refusal(
            "task.kind",
            config.task.kind,
            f"the model's head is that of {task}",
            allowed=task,
            instead=f"task={task}, or another model",
        )
    if config.task.kind in ("causal_lm", "masked_lm") and facts.labels:
        problem = f"the model is a classifier of {len(facts.labels)} classes: it has no head for tokens"
        raise refusal(
            "task.kind",
            config.task.kind,
            problem,
            allowed=", ".join(classifies),
            instead="task=classification, or a model without model.labels",
        )
    check_encoder(config.task.kind, masks=config.task.kind == "masked_lm", facts=facts)
    if config.task.next_sentence and not facts.pairs:
        raise refusal(
            "task.next_sentence",
            True,
            f"the {facts.model_type} model has no head that tells whether a part of a row follows another",
            allowed="a model ...ForPreTraining, such as BertForPreTraining",
            instead="model.config.architectures=[BertForPreTraining], or task.next_sentence=false",
        )


def check_encoder(kind: str, *, masks: bool, facts: ModelFacts) -> None:
    """Raise UserError for an encoder and a task, task.kind=`kind`, that do not go together.

    `masks`: whether the task masks the tokens that it predicts.
    """
    if masks == (facts.encoder and not facts.labels) or (facts.labels and not masks):
        return
    problem = f"a {facts.model_type} model is an encoder: its tokens see those that they are to predict"
    instead = "task=masked_lm, or for a model that has it model.config.is_decoder=true"
    if masks:
        problem = f"the {facts.model_type} model is none that predicts masked tokens"
        instead = "task=causal_lm, or an encoder's model.config.architectures=[...ForMaskedLM]"
    allowed = "causal_lm" if masks else "masked_lm"
    raise refusal("task.kind", kind, problem, allowed=allowed, instead=instead)


def check_device(engines: list[str], *, precision: str) -> None:
    """Raise UserError for fp16 with DeepSpeed on a CPU whose oneDNN does not support it."""
    if precision != "fp16_mixed" or "deepspeed" not in engines:
        return
    import torch

    if not (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()):
        problem, instead = "engine=deepspeed has no fp16 on this CPU", "precision=bf16_mixed, or engine=torch"
        raise refusal("precision.kind", precision, problem, allowed="fp32, bf16_mixed", instead=instead)


def _check_formats(config: Config, *, device: torch.device, plan: BatchPlan) -> None:
    """Raise UserError for formats that the device does not have, and for options that nothing follows."""
    from hybridtrain.models.build import hf_config
    from hybridtrain.models.linears import linears_of
    from hybridtrain.models.source import read_config
    from hybridtrain.precision import device as devices
    from hybridtrain.precision import rules

    devices.check(config.precision, device=device, tokens=plan.micro_batch_size * plan.seq_len)
    rules.check_options(config.precision)
    if rules.names_of(config.precision) or config.precision.rules:
        built = hf_config(
            read_config(config.model), chosen=config.model.config, attention=config.model.attention
        )
        rules.check(linears_of(built), config.precision)


def build(
    config: Config, *, layout: ParallelLayout, plan: BatchPlan, device: torch.device
) -> TorchEngine | DeepSpeedEngine:
    """An engine with initial weights (collective; needs a process group)."""
    return build_for(None, config, layout=layout, plan=plan, device=device, initial=True)


def build_for(
    task: Task | None,
    config: Config,
    *,
    layout: ParallelLayout,
    plan: BatchPlan,
    device: torch.device,
    initial: bool,
) -> TorchEngine | DeepSpeedEngine:
    """The engine for a task; None: that of task.kind (collective; needs a process group). Raises UserError.

    `initial`: set initial weights. Not needed before a checkpoint is loaded: it takes time, and their
    source may be missing.
    """
    from hybridtrain.models.parameters import check
    from hybridtrain.runtime import cpu

    check(config)
    model = facts_of_run(config)
    model = facts_of_layout(model, config.model, config.parallel, tp=layout.tp, engine=config.engine.kind)
    _check_formats(config, device=device, plan=plan)
    if task is None:
        check_task(config, facts=model)
    if device.type == "cuda":
        import torch

        available, place = torch.cuda.get_device_properties(device).total_memory, "GPU memory"
        memory.check(config, layout=layout, plan=plan, facts=model, available=available, place=place)
    else:
        available, place = memory.host_share(), "host memory"
        memory.check_host(config, layout=layout, plan=plan, facts=model)
    memory.warn(config, layout=layout, plan=plan, facts=model, available=available, place=place)
    tf32 = config.precision.kind == "tf32" and not config.precision.emulate
    cpu.apply(config.engine, device=device, tf32=tf32)
    task = task or tasks.of(config, labels=len(model.labels), vocab=model.vocab, encoder=model.encoder)
    if config.engine.kind == "deepspeed":
        from hybridtrain.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, layout=layout, plan=plan, device=device, initial=initial, task=task)
    from hybridtrain.engine.torch_native import TorchEngine

    return TorchEngine(config, layout=layout, plan=plan, device=device, initial=initial, task=task)
