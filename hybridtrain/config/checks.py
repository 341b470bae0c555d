"""The check of a whole config: kinds, registered names, and what several sections decide together.

Needs neither torch nor files, and never changes a value. What a section decides alone: section_checks.py;
numbers: ranges.py.
Layouts are checked by plan.rules, models by models/, data files by data/: each where the facts are known.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridtrain import registry
from hybridtrain.config import ranges, schema
from hybridtrain.config.section_checks import RULES, in_range, one_of, require
from hybridtrain.config.sections import PRECISIONS
from hybridtrain.errors import install, refusal
from hybridtrain.plan.schedules import SCHEDULES as PIPELINE_SCHEDULES

RESUME = ("auto", "never", "required")
ATTENTION = ("sdpa", "eager")
ENGINES = ("torch", "deepspeed")
COMPILE_BACKENDS = ("inductor", "aot_eager", "eager")
STOP_SIGNALS = ("USR1", "USR2")
FP32_MATMUL = ("auto", "highest", "high", "medium")
OFFLOAD = ("none", "cpu")
RECOMPUTE = ("none", "selective", "full")
TRACKERS = registry.BUILT_IN["tracker"]
"""Also the names of their packages."""
TRACKERS_OF_EXTRAS = {"wandb": "wandb", "tensorboard": "trackers"}
"""Those that an extra of this package installs."""
CHAT_TEMPLATES = ("own", "plain")
CHAT_TURNS = ("all", "last")
DATA_FORMATS = ("auto", "text", "jsonl", "parquet", "datasets", "chat", "labelled")
PLAIN_COMPILE = ("layer", "model")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


_KINDS = {
    "engine.kind": ENGINES,
    "engine.compile_backend": COMPILE_BACKENDS,
    "run.stop_signal": STOP_SIGNALS,
    "engine.fp32_matmul": FP32_MATMUL,
    "precision.kind": PRECISIONS,
    "recompute.kind": RECOMPUTE,
    "run.resume": RESUME,
    "model.attention": ATTENTION,
    "parallel.schedule": PIPELINE_SCHEDULES,
    "data.chat_template": CHAT_TEMPLATES,
    "data.chat_turns": CHAT_TURNS,
    "data.format": DATA_FORMATS,
    "export.dtype": EXPORT_DTYPES,
    "bench.plain_compile": PLAIN_COMPILE,
}
"""Option -> the kinds there are."""


def check(config: schema.Root) -> None:
    """Refuse values that cannot work, alone or together (raises UserError). A command is checked in the sections that it has.
    The modules of run.plugins are imported first: the names that they register are kinds, too.
    """
    if isinstance(config, schema.Config):
        registry.load(config.run.plugins)
    sections = {section.name: getattr(config, section.name) for section in dataclasses.fields(config)}
    options = {f"{name}.{option.name}": getattr(section, option.name) for name, section in sections.items() for option in dataclasses.fields(section)}
    for field, kinds in _KINDS.items():
        if field in options:
            one_of(field, options[field], kinds)
    _registered(options)
    for name, rule in RULES.items():
        if name in sections:
            rule(sections[name])
    ranges.check(config)
    if isinstance(config, schema.Config):
        _engine(config)
        if "evaluate" not in sections:
            _trainable(config)
        if not sections.keys() & {"evaluate", "parity", "bench"}:  # a run is started: here, or where a job runs
            _trackers(config.tracker, here="cluster" not in sections)
            _end(config)
            _has_path(config.data.named)
    if isinstance(config, schema.BenchRoot):
        _bench(config)
    if isinstance(config, schema.PrepareRoot):
        words, allowed = "nothing to read", "files, folders, patterns, stdlib"
        require(bool(config.data.source), "data.source", config.data.source, words, allowed=allowed, instead="data.source=[YOUR TEXT]")
        _has_path(bool(config.data.path))


def _registered(options: Mapping[str, Any]) -> None:
    """Names that a user's module may add, and the settings that only such a one has."""
    for kind in ("task", "data", "optimizer", "schedule"):
        if (field := registry.FIELDS[kind]) in options:
            registry.check(kind, options[field])
    for name in options.get("run.callbacks", ()):
        registry.check("callback", name)
    for name in ("task.label_smoothing", "task.z_loss"):
        words, ours = f"task.kind={options.get('task.kind')} computes its own loss", options.get("task.kind") in registry.BUILT_IN["task"]
        require(ours or not options.get(name), name, options.get(name), words, allowed="0 with a registered task", instead=f"{name}=0")
    for section, kind in (("optim", "optimizer"), ("schedule", "schedule")):
        chosen, given = options.get(f"{section}.kind"), options.get(f"{section}.options")
        words = f"{section}.kind={chosen} reads none"
        allowed, instead = f"{{}} unless {section}.kind is a registered {kind}", f"the options of {section} itself"
        require(not given or chosen not in registry.BUILT_IN[kind], f"{section}.options", given, words, allowed=allowed, instead=instead)


def _trackers(tracker: schema.TrackerConfig, *, here: bool) -> None:
    """`here`: training tracks in this environment, so that the packages must be installed in it."""
    for kind in tracker.kinds:
        known = registry.names("tracker")
        require(kind in known, "tracker.kinds", tracker.kinds, f"no tracker {kind!r}", allowed=", ".join(known), instead="tracker.kinds=[wandb]")
        if here and kind in TRACKERS:
            there = [name for name in TRACKERS if importlib.util.find_spec(name)]
            words = f"the package {kind} is not installed here"
            command = install(TRACKERS_OF_EXTRAS[kind]) if kind in TRACKERS_OF_EXTRAS else f"pip install {kind}"
            require(kind in there, "tracker.kinds", tracker.kinds, words, allowed=", ".join(there) or "none", instead=command)


def _engine(config: schema.Config) -> None:
    engine, kinds = config.engine, {config.engine.kind}
    if isinstance(config, schema.ParityRoot) and config.parity.engines:
        for kind in config.parity.engines:
            require(
                kind in ENGINES, "parity.engines", config.parity.engines, f"no engine {kind!r}", allowed=", ".join(ENGINES), instead="parity.engines=[torch]"
            )
        kinds = set(config.parity.engines)
    parts = {"engine.offload_optimizer": engine.offload_optimizer, "engine.offload_parameters": engine.offload_parameters}
    for field, value in parts.items():
        if value == "nvme":
            raise refusal(field, value, "not supported yet", allowed=", ".join(OFFLOAD), instead=f"{field}=cpu")
        one_of(field, value, OFFLOAD)
    if "deepspeed" not in kinds:
        for field, value in parts.items():
            require(value == "none", field, value, "engine=torch does not offload yet", allowed="none", instead="engine=deepspeed, or parallel.zero_stage=3")
        words = "these are keys of DeepSpeed's config"
        require(not engine.config_overrides, "engine.config_overrides", engine.config_overrides, words, allowed="{}", instead="engine=deepspeed")
    else:
        from hybridtrain.config import deepspeed_checks  # for this engine alone

        deepspeed_checks.check(config)


def own_folders(configs: Sequence[schema.Root]) -> None:
    """Runs of a sweep each write into a folder of their own (raises UserError)."""
    folders = [config.run.dir for config in configs if isinstance(config, schema.Config)]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise refusal(
            "run.dir",
            twice,
            f"one folder for several of {len(folders)} runs",
            allowed="a folder for each run: those of a sweep are runs/NAME-0, runs/NAME-1 ... by themselves",
            instead="run.name=NAME instead of run.dir, or run.dir='folder/${run.name}'",
        )


def _has_path(holds: bool) -> None:
    require(holds, "data.path", "''", "no folder of token files", allowed="a folder", instead="data.path=data/mine, or experiment=quickstart")


def _trainable(config: schema.Config) -> None:
    require(
        bool(config.model.config or config.model.from_pretrained),
        "model",
        "(none)",
        "no model chosen",
        allowed="a file of conf/model, or model.from_pretrained",
        instead="model=nano, model.from_pretrained=FOLDER, or experiment=quickstart",
    )


def _end(config: schema.Config) -> None:
    """Exactly one of steps, tokens and epochs ends the run, and the phases of the schedule fit into it."""
    train = config.train
    given = {f"train.{name}": getattr(train, name) for name in ("steps", "tokens", "epochs") if getattr(train, name)}
    for field, value in given.items():
        in_range(field, value, lambda n: n > 0, allowed="above 0", instead=1000 if field == "train.steps" else 1)
    if len(given) != 1:
        words = "the run has no end" if not given else "the run has several ends"
        shown = ", ".join(f"{field}={value}" for field, value in given.items()) or "all 0"
        raise refusal(
            "train",
            shown,
            words,
            allowed="exactly one of train.steps, train.tokens, train.epochs above 0",
            instead="train.steps=1000" if not given else "one of them, the others 0",
        )
    tokens_per_step = config.batch.global_batch_size * config.data.seq_len
    steps = train.steps or (0 if config.batch.ramp_start else math.ceil(train.tokens / tokens_per_step))
    if steps:
        phases(config.schedule, steps=steps)  # of epochs and under a ramp, when the number of steps is known


def phases(schedule: schema.ScheduleConfig, *, steps: int) -> None:
    """Refuse a schedule whose phases do not fit into the run's steps (raises UserError)."""
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
        share = max(1, steps // 10)
        require(
            warmup + share <= steps or warmup == 0,
            "schedule.warmup_steps",
            warmup,
            f"{warmup} warm-up steps and the decay of the last {share} overlap in a run of {steps}",
            allowed=f"up to {max(0, steps - share)}",
            instead=f"schedule.warmup_steps={max(0, steps // 10)}",
        )


def _bench(config: schema.BenchRoot) -> None:
    words, instead = "bench times next-token prediction alone", "task=causal_lm"
    require(config.task.kind == "causal_lm" and not config.model.labels, "task.kind", config.task.kind, words, allowed="causal_lm", instead=instead)
    words, instead = "the plain loop beside it trains with AdamW", "bench.plain=false"
    require(config.optim.kind == "adamw" or not config.bench.plain, "optim.kind", config.optim.kind, words, allowed="adamw", instead=instead)
    require(
        not config.bench.corpus or bool(config.data.path),
        "bench.corpus",
        "true",
        "data.path is empty",
        allowed="true with a folder of token files",
        instead="data.path=FOLDER, or bench.corpus=false for random tokens",
    )
