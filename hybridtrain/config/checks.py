"""Checks a whole config: enumerated options, registered names, and options that depend on each other.

Needs neither torch nor files, and never changes a value. Checks within one section are in section_checks.py,
ranges of numbers in ranges.py. Layouts are checked by plan.rules, models by models/, data files by data/,
where the facts are known.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridtrain import registry
from hybridtrain.config import (
    adapter_checks,
    command_checks,
    lm_eval_checks,
    offload_checks,
    precision_checks,
    ranges,
    schema,
)
from hybridtrain.config.precision import PRECISIONS, ROUNDINGS, STATES
from hybridtrain.config.section_checks import RULES, in_range, one_of, require
from hybridtrain.errors import install, refusal
from hybridtrain.plan.schedules import SCHEDULES as PIPELINE_SCHEDULES

RESUME = ("auto", "never", "required")
ATTENTION = ("sdpa", "eager")
ENGINES = ("torch", "deepspeed")
COMPILE_BACKENDS = ("inductor", "aot_eager", "eager")
STOP_SIGNALS = ("USR1", "USR2")
FP32_MATMUL = ("auto", "highest", "high", "medium")
SEQUENCE_PARALLEL = ("auto", "true", "false")
RECOMPUTE = ("none", "selective", "full")
TRACKERS = registry.BUILT_IN["tracker"]
"""Also the names of their packages."""
TRACKERS_OF_EXTRAS = {"wandb": "wandb", "tensorboard": "trackers"}
"""Trackers that an extra of this package installs -> the extra."""
CHAT_TEMPLATES = ("own", "plain")
CHAT_TURNS = ("all", "last")
DATA_FORMATS = (
    "auto",
    "text",
    "jsonl",
    "parquet",
    "datasets",
    "chat",
    "labelled",
    "labelled_words",
    "answers",
)
PLAIN_COMPILE = ("layer", "model")
ON_NONFINITE = ("skip", "stop", "rollback")
ON_SPIKE = ("off", *ON_NONFINITE)
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


_KINDS = {
    "engine.kind": ENGINES,
    "engine.compile_backend": COMPILE_BACKENDS,
    "run.stop_signal": STOP_SIGNALS,
    "engine.fp32_matmul": FP32_MATMUL,
    "precision.kind": PRECISIONS,
    "precision.state": STATES,
    "precision.rounding": ROUNDINGS,
    "recompute.kind": RECOMPUTE,
    "run.resume": RESUME,
    "model.attention": ATTENTION,
    "parallel.schedule": PIPELINE_SCHEDULES,
    "parallel.sequence_parallel": SEQUENCE_PARALLEL,
    "data.chat_template": CHAT_TEMPLATES,
    "data.chat_turns": CHAT_TURNS,
    "data.format": DATA_FORMATS,
    "export.dtype": EXPORT_DTYPES,
    "quantize.dtype": EXPORT_DTYPES,
    "bench.plain_compile": PLAIN_COMPILE,
    "train.on_nonfinite": ON_NONFINITE,
    "train.on_spike": ON_SPIKE,
}
"""Option -> its allowed values."""


_NO_TRAINING = {"evaluate", "compare", "quantize", "parity", "bench"}
"""Sections of commands that have all of training's and no run of their own."""


def check(config: schema.Root) -> None:
    """Raise UserError for values that cannot work, alone or together.

    Checks the sections that the command has. Imports the modules of run.plugins first: the names that they
    register are allowed values too.
    """
    if isinstance(config, schema.Config):
        registry.load(config.run.plugins)
    sections = {section.name: getattr(config, section.name) for section in dataclasses.fields(config)}
    options = {
        f"{name}.{option.name}": getattr(section, option.name)
        for name, section in sections.items()
        for option in dataclasses.fields(section)
    }
    for field, kinds in _KINDS.items():
        if field in options:
            one_of(field, options[field], kinds)
    _registered(options)
    for name, rule in (RULES | command_checks.RULES).items():
        if name in sections:
            rule(sections[name])
    if "precision" in sections:
        precision_checks.check(sections["precision"])
    ranges.check(config)
    if isinstance(config, schema.InspectRoot):
        _model_chosen(config.model)
    if isinstance(config, schema.Config):
        _optimizer_states(config)
        _engine(config)
        precision_checks.check_engine(config)
        adapter_checks.check(config, trains=not sections.keys() & _NO_TRAINING)
        evaluates, here = bool(sections.keys() & {"evaluate", "compare"}), "cluster" not in sections
        if evaluates or not sections.keys() & _NO_TRAINING:
            lm_eval_checks.check(config, evaluates=evaluates, here=here)
        if not sections.keys() & {"evaluate", "compare", "quantize"}:
            _model_chosen(config.model)
        if not sections.keys() & _NO_TRAINING:  # train or submit
            _trackers(config.tracker, here=here)
            _run_length(config)
            _policies(config)
            _require_path(config.data.named)
    if isinstance(config, schema.BenchRoot):
        command_checks.check_bench(config)
    if isinstance(config, schema.PrepareRoot):
        problem, allowed = "nothing to read", "files, folders, patterns, stdlib"
        require(
            bool(config.data.source),
            "data.source",
            config.data.source,
            problem,
            allowed=allowed,
            instead="data.source=[YOUR TEXT]",
        )
        _require_path(bool(config.data.path))


def _registered(options: Mapping[str, Any]) -> None:
    """Check names that a user's module may register, and options that only registered or
    only built-in names have.
    """
    for kind in ("task", "data", "optimizer", "schedule"):
        if (field := registry.FIELDS[kind]) in options:
            registry.check(kind, options[field])
    for name in options.get("run.callbacks", ()):
        registry.check("callback", name)
    for name in ("task.label_smoothing", "task.z_loss"):
        value, task = options.get(name), options.get("task.kind")
        holds = not value or task in registry.BUILT_IN["task"]
        require(
            holds,
            name,
            value,
            f"task.kind={task} computes its own loss",
            allowed="0 with a registered task",
            instead=f"{name}=0",
        )
    for section, kind in (("optim", "optimizer"), ("schedule", "schedule")):
        chosen, value = options.get(f"{section}.kind"), options.get(f"{section}.options")
        problem, holds = (
            f"{section}.kind={chosen} reads none",
            not value or chosen not in registry.BUILT_IN[kind],
        )
        allowed, instead = (
            f"{{}} unless {section}.kind is a registered {kind}",
            f"the options of {section} itself",
        )
        require(holds, f"{section}.options", value, problem, allowed=allowed, instead=instead)


def _trackers(tracker: schema.TrackerConfig, *, here: bool) -> None:
    """Check tracker.kinds. `here`: training runs in this environment, so the packages must be installed."""
    for kind in tracker.kinds:
        known = registry.names("tracker")
        require(
            kind in known,
            "tracker.kinds",
            tracker.kinds,
            f"no tracker {kind!r}",
            allowed=", ".join(known),
            instead="tracker.kinds=[wandb]",
        )
        if here and kind in TRACKERS:
            installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
            problem = f"the package {kind} is not installed here"
            command = (
                install(TRACKERS_OF_EXTRAS[kind]) if kind in TRACKERS_OF_EXTRAS else f"pip install {kind}"
            )
            require(
                kind in installed,
                "tracker.kinds",
                tracker.kinds,
                problem,
                allowed=", ".join(installed) or "none",
                instead=command,
            )


def _optimizer_states(config: schema.Config) -> None:
    problem = f"optim.kind={config.optim.kind} decides on its own state"
    require(
        config.precision.state == "auto" or config.optim.kind in registry.BUILT_IN["optimizer"],
        "precision.state",
        config.precision.state,
        problem,
        allowed="auto with a registered optimizer",
        instead="precision.state=auto, or optim=adamw",
    )
    optim = config.optim
    require(
        config.precision.state == "auto" or optim.kind not in ("adafactor", "sgd") or optim.momentum > 0,
        "precision.state",
        config.precision.state,
        f"optim.kind={optim.kind} with optim.momentum=0 keeps no moments",
        allowed="auto without momentum",
        instead="precision.state=auto, or optim.momentum=0.9",
    )
    require(
        config.precision.state != "8bit" or config.optim.kind == "adamw",
        "precision.state",
        "8bit",
        f"8 bits are for Adam's two moments, not for optim.kind={config.optim.kind}",
        allowed="auto, fp32, bf16",
        instead="precision.state=bf16, or optim=adamw",
    )


def _engine(config: schema.Config) -> None:
    engine, kinds = config.engine, {config.engine.kind}
    if isinstance(config, schema.ParityRoot) and config.parity.engines:
        for kind in config.parity.engines:
            require(
                kind in ENGINES,
                "parity.engines",
                config.parity.engines,
                f"no engine {kind!r}",
                allowed=", ".join(ENGINES),
                instead="parity.engines=[torch]",
            )
        kinds = set(config.parity.engines)
    offload_checks.check_values(engine)
    if "torch" in kinds:
        offload_checks.check_torch(config)
    if "deepspeed" not in kinds:
        problem = "these are keys of DeepSpeed's config"
        require(
            not engine.config_overrides,
            "engine.config_overrides",
            engine.config_overrides,
            problem,
            allowed="{}",
            instead="engine=deepspeed",
        )
    else:
        from hybridtrain.config import deepspeed_checks  # only with this engine

        deepspeed_checks.check(config)


def distinct_folders(configs: Sequence[schema.Root]) -> None:
    """Raise UserError if two runs of a sweep would write to the same folder."""
    folders = [config.run.dir for config in configs if isinstance(config, schema.Config)]
    shared = next((folder for folder in folders if folders.count(folder) > 1), None)
    if shared is not None:
        raise refusal(
            "run.dir",
            shared,
            f"one folder for several of {len(folders)} runs",
            allowed="a folder for each run; by default those of a sweep are runs/NAME-0, runs/NAME-1, ...",
            instead="run.name=NAME instead of run.dir, or run.dir='folder/${run.name}'",
        )


def _require_path(holds: bool) -> None:
    require(
        holds,
        "data.path",
        "''",
        "no folder of token files",
        allowed="a folder",
        instead="data.path=data/mine, or experiment=quickstart",
    )


def _model_chosen(model: schema.ModelConfig) -> None:
    require(
        bool(model.config or model.from_pretrained),
        "model",
        "(none)",
        "no model chosen",
        allowed="a file of conf/model, or model.from_pretrained",
        instead="model=nano, model.from_pretrained=FOLDER, or experiment=quickstart",
    )


def _policies(config: schema.Config) -> None:
    """Check what a run does about non-finite numbers and loss spikes."""
    for name in ("on_nonfinite", "on_spike"):
        value = getattr(config.train, name)
        require(
            value != "rollback" or config.checkpoint.every > 0,
            f"train.{name}",
            value,
            "there are no checkpoints to go back to (checkpoint.every=0)",
            allowed="skip, stop",
            instead="checkpoint.every=100",
        )
    require(
        config.train.on_spike != "skip" or config.engine.kind == "torch",
        "train.on_spike",
        "skip",
        "engine=deepspeed updates before the loss of all ranks is known",
        allowed="off, stop, rollback",
        instead="train.on_spike=rollback, or engine=torch",
    )


def _run_length(config: schema.Config) -> None:
    """Check that exactly one of steps, tokens and epochs is set, and that the phases of the schedule
    fit into the run.
    """
    train = config.train
    limits = {
        f"train.{name}": getattr(train, name)
        for name in ("steps", "tokens", "epochs")
        if getattr(train, name)
    }
    for field, value in limits.items():
        in_range(
            field, value, lambda n: n > 0, allowed="above 0", instead=1000 if field == "train.steps" else 1
        )
    if len(limits) != 1:
        raise refusal(
            "train",
            ", ".join(f"{field}={value}" for field, value in limits.items()) or "all 0",
            "the run has no end" if not limits else "the run has several ends",
            allowed="exactly one of train.steps, train.tokens, train.epochs above 0",
            instead="train.steps=1000" if not limits else "one of them, the others 0",
        )
    tokens_per_step = config.batch.global_batch_size * config.data.seq_len
    steps = train.steps or (0 if config.batch.ramp_start else math.ceil(train.tokens / tokens_per_step))
    if steps:
        phases(config.schedule, steps=steps)  # else later, once the steps are known


def phases(schedule: schema.ScheduleConfig, *, steps: int) -> None:
    """Raise UserError if the phases of the schedule do not fit into the run's steps."""
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    require(
        decay == 0 or warmup + decay <= steps,
        "schedule.decay_steps",
        decay,
        f"{warmup} warm-up + {decay} decay steps exceed the run's {steps}",
        allowed=f"up to {max(0, steps - warmup)}",
        instead="schedule.decay_steps=0",
    )
    if schedule.kind == "wsd" and not decay:
        tenth = max(1, steps // 10)
        require(
            warmup + tenth <= steps or warmup == 0,
            "schedule.warmup_steps",
            warmup,
            f"{warmup} warm-up steps and the decay of the last {tenth} overlap in a run of {steps}",
            allowed=f"up to {max(0, steps - tenth)}",
            instead=f"schedule.warmup_steps={max(0, steps // 10)}",
        )
