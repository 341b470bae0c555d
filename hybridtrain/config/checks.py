"""Range checks and checks across sections that need neither torch nor files. Checks never change a value.

Layouts are checked by plan.rules, models by models/, data files by data/: each where the facts are known.
"""

from __future__ import annotations

import codecs
import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridtrain import registry
from hybridtrain.config import ranges, schema
from hybridtrain.config.keys import NOT_YET, nearest_of
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
BYTES = 256  # a byte-level BPE starts with one token per byte; the end-of-text token comes on top


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
            _one_of(field, options[field], kinds)
    _registered(options)
    for name, rule in _SECTION_RULES.items():
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
        _require(bool(config.data.source), "data.source", config.data.source, words, allowed=allowed, instead="data.source=[YOUR TEXT]")
        _has_path(bool(config.data.path))


def _require(holds: bool, field: str, value: object, problem: str, *, allowed: str, instead: str) -> None:
    if not holds:
        raise refusal(field, value, problem, allowed=allowed, instead=instead)


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, field, value, "not one of the kinds there are", allowed=", ".join(allowed), instead=f"{field}={nearest_of(value, allowed)}")


def _registered(options: Mapping[str, Any]) -> None:
    """Names that a user's module may add, and the settings that only such a one has."""
    for kind in ("task", "data", "optimizer", "schedule"):
        if (field := registry.FIELDS[kind]) in options:
            registry.check(kind, options[field])
    for name in options.get("run.callbacks", ()):
        registry.check("callback", name)
    for name in ("task.label_smoothing", "task.z_loss"):
        words, ours = f"task.kind={options.get('task.kind')} computes its own loss", options.get("task.kind") in registry.BUILT_IN["task"]
        _require(ours or not options.get(name), name, options.get(name), words, allowed="0 with a registered task", instead=f"{name}=0")
    for section, kind in (("optim", "optimizer"), ("schedule", "schedule")):
        chosen, given = options.get(f"{section}.kind"), options.get(f"{section}.options")
        words = f"{section}.kind={chosen} reads none"
        allowed, instead = f"{{}} unless {section}.kind is a registered {kind}", f"the options of {section} itself"
        _require(not given or chosen not in registry.BUILT_IN[kind], f"{section}.options", given, words, allowed=allowed, instead=instead)


def _trackers(tracker: schema.TrackerConfig, *, here: bool) -> None:
    """`here`: training tracks in this environment, so that the packages must be installed in it."""
    for kind in tracker.kinds:
        known = registry.names("tracker")
        _require(kind in known, "tracker.kinds", tracker.kinds, f"no tracker {kind!r}", allowed=", ".join(known), instead="tracker.kinds=[wandb]")
        if here and kind in TRACKERS:
            there = [name for name in TRACKERS if importlib.util.find_spec(name)]
            words = f"the package {kind} is not installed here"
            command = install(TRACKERS_OF_EXTRAS[kind]) if kind in TRACKERS_OF_EXTRAS else f"pip install {kind}"
            _require(kind in there, "tracker.kinds", tracker.kinds, words, allowed=", ".join(there) or "none", instead=command)


def _parallel(parallel: schema.ParallelConfig) -> None:
    zero, instead = parallel.zero_stage, "parallel.zero_stage=1 with parallel.dp_shard > 1"
    _require(zero in (0, 1, 2, 3), "parallel.zero_stage", zero, "no such ZeRO stage", allowed="0, 1, 2, 3", instead=instead)


def _engine(config: schema.Config) -> None:
    engine, kinds = config.engine, {config.engine.kind}
    if isinstance(config, schema.ParityRoot) and config.parity.engines:
        for kind in config.parity.engines:
            _require(
                kind in ENGINES, "parity.engines", config.parity.engines, f"no engine {kind!r}", allowed=", ".join(ENGINES), instead="parity.engines=[torch]"
            )
        kinds = set(config.parity.engines)
    parts = {"engine.offload_optimizer": engine.offload_optimizer, "engine.offload_parameters": engine.offload_parameters}
    for field, value in parts.items():
        if value == "nvme":
            raise refusal(field, value, "not supported yet", allowed=", ".join(OFFLOAD), instead=f"{field}=cpu")
        _one_of(field, value, OFFLOAD)
    if "deepspeed" not in kinds:
        for field, value in parts.items():
            _require(value == "none", field, value, "engine=torch does not offload yet", allowed="none", instead="engine=deepspeed, or parallel.zero_stage=3")
        words = "these are keys of DeepSpeed's config"
        _require(not engine.config_overrides, "engine.config_overrides", engine.config_overrides, words, allowed="{}", instead="engine=deepspeed")
    else:
        _deepspeed(config)


def _deepspeed(config: schema.Config) -> None:
    """What DeepSpeed cannot do or would do silently wrong; layouts are those of plan.rules."""
    engine, precision, there = config.engine, config.precision, importlib.util.find_spec("deepspeed") is not None
    instead = f"{install('deepspeed')}, or engine=torch"
    _require(there, "engine.kind", "deepspeed", "the package deepspeed is not installed here", allowed="torch", instead=instead)
    _require(not engine.compile, "engine.compile", True, "not with engine=deepspeed yet", allowed="false", instead="engine=torch, or engine.compile=false")
    kind, allowed = config.optim.kind, ", ".join(registry.BUILT_IN["optimizer"])
    _require(kind in registry.BUILT_IN["optimizer"], "optim.kind", kind, "engine=deepspeed runs AdamW alone", allowed=allowed, instead="engine=torch")
    frozen = config.model.freeze
    _require(not frozen, "model.freeze", frozen, "DeepSpeed keeps frozen weights in 16 bits only", allowed="[]", instead="engine=torch")
    if not isinstance(config, schema.ParityRoot):  # parity has a stage for each of its layouts
        deepspeed_stage(config, config.parallel.zero_stage)
    if precision.kind == "fp16_mixed":
        power = math.log2(precision.init_scale)
        words = "DeepSpeed's first loss scale is a power of two"
        _require(power == int(power), "precision.init_scale", precision.init_scale, words, allowed="powers of 2", instead="precision.init_scale=65536")
        for field, value, fixed in (("growth_factor", precision.growth_factor, 2.0), ("backoff_factor", precision.backoff_factor, 0.5)):
            words = "DeepSpeed's loss scale doubles and halves"
            _require(value == fixed, f"precision.{field}", value, words, allowed=str(fixed), instead=f"engine=torch, or precision.{field}={fixed}")


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


def deepspeed_stage(config: schema.Config, stage: int) -> None:
    """What depends on the ZeRO stage (raises UserError)."""
    words = f"only ZeRO 3 has sharded parameters to offload (parallel.zero_stage={stage})"
    offloads = config.engine.offload_parameters
    _require(offloads == "none" or stage == 3, "engine.offload_parameters", offloads, words, allowed="none", instead="parallel=zero3")
    recompute = config.recompute.kind
    words = "DeepSpeed gathers parameters inside what is recomputed, which torch's selective recomputation takes for a change"
    _require(stage < 3 or recompute != "selective", "recompute.kind", recompute, words, allowed="none, full", instead="recompute=full, or engine=torch")


def _in_range(field: str, value: float, holds: Callable[[float], bool], *, allowed: str, instead: object) -> None:
    _require(math.isfinite(value) and holds(value), field, value, "out of range", allowed=allowed, instead=f"{field}={instead}")


def _optim(optim: schema.OptimConfig) -> None:
    _in_range("optim.lr", optim.lr, lambda lr: lr > 0, allowed="above 0", instead="3e-4")
    _in_range("optim.eps", optim.eps, lambda eps: eps > 0, allowed="above 0", instead="1e-8")
    betas = optim.betas
    _require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "optim.betas",
        betas,
        "not two decay rates",
        allowed="two numbers of at least 0 and below 1",
        instead="optim.betas=[0.9,0.95]",
    )


def _schedule(schedule: schema.ScheduleConfig) -> None:
    _require(
        schedule.decay_steps == 0 or schedule.kind == "wsd",
        "schedule.decay_steps",
        schedule.decay_steps,
        f"schedule.kind={schedule.kind} has no such phase",
        allowed="0 unless schedule.kind is wsd",
        instead="schedule=wsd",
    )


def _precision(precision: schema.PrecisionConfig) -> None:
    _in_range("precision.min_scale", precision.min_scale, lambda scale: scale > 0, allowed="above 0", instead="1.0")
    _in_range("precision.init_scale", precision.init_scale, lambda scale: scale >= precision.min_scale, allowed="precision.min_scale or more", instead="65536")
    _in_range("precision.growth_factor", precision.growth_factor, lambda factor: factor > 1, allowed="above 1", instead="2.0")
    _in_range("precision.backoff_factor", precision.backoff_factor, lambda factor: 0 < factor < 1, allowed="above 0 and below 1", instead="0.5")


def _model(model: schema.ModelConfig) -> None:
    for key in model.config:
        if NOT_YET.search(str(key)):
            words = "low-rank adapters (LoRA, PEFT) are not supported yet"
            raise refusal(
                f"model.config.{key}", model.config[key], words, allowed="full training, or model.freeze", instead="model.freeze=['model.embed_tokens.*']"
            )
    if model.config and not model.from_pretrained and not model.config.get("model_type"):
        raise refusal(
            "model.config.model_type",
            "(missing)",
            "the fields belong to no architecture",
            allowed="llama, mistral, qwen2, qwen3",
            instead="model=nano, or model.config.model_type=llama",
        )


def _data(data: schema.DataConfig) -> None:
    _in_range("data.eval_fraction", data.eval_fraction, lambda share: 0 <= share < 1, allowed="0 or more, below 1", instead="0.02")
    _encoding(data.encoding)
    for field, value in (("data.text_key", data.text_key), ("data.messages_key", data.messages_key), ("data.dataset_split", data.dataset_split)):
        _require(bool(value), field, "''", "empty", allowed="a name", instead=f"{field}={getattr(schema.DataConfig(), field.partition('.')[2])}")
    if data.tokenizer == "train":
        _in_range("data.vocab_size", data.vocab_size, lambda size: size > BYTES, allowed=f"above {BYTES} (one token per byte, and end of text)", instead="4096")
    _blend(data)
    for field, given, nothing in (("data.path", data.path, "''"), ("data.blend", data.blend, "{}"), ("data.eval_path", data.eval_path, "''")):
        words = f"data.kind={data.kind} takes its place"
        _require(data.kind == "prepared" or not given, field, given, words, allowed=nothing, instead=f"{field}={nothing}")


def _has_path(holds: bool) -> None:
    _require(holds, "data.path", "''", "no folder of token files", allowed="a folder", instead="data.path=data/mine, or experiment=quickstart")


def _encoding(name: str) -> None:
    try:
        known = codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        known = False
    _require(
        known, "data.encoding", name, "Python has no such text encoding", allowed="utf-8, latin-1, cp1251, koi8-r, utf-16, ...", instead="data.encoding=utf-8"
    )


def _blend(data: schema.DataConfig) -> None:
    for path, weight in data.blend.items():
        _in_range(f"data.blend.{path}", weight, lambda share: share > 0, allowed="above 0", instead="0.5, or the blend without it")
    _require(
        not (data.blend and data.path),
        "data.path",
        data.path,
        "there is a data.blend too",
        allowed="one of data.path and data.blend",
        instead="data.path='' with the blend",
    )


def _trainable(config: schema.Config) -> None:
    _require(
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
        _in_range(field, value, lambda n: n > 0, allowed="above 0", instead=1000 if field == "train.steps" else 1)
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
    _require(
        decay == 0 or warmup + decay <= steps,
        "schedule.decay_steps",
        decay,
        f"{warmup} warm-up + {decay} decay steps exceed the run's {steps}",
        allowed=f"up to {max(0, steps - warmup)}",
        instead="schedule.decay_steps=0",
    )
    if schedule.kind == "wsd" and not decay:
        share = max(1, steps // 10)
        _require(
            warmup + share <= steps or warmup == 0,
            "schedule.warmup_steps",
            warmup,
            f"{warmup} warm-up steps and the decay of the last {share} overlap in a run of {steps}",
            allowed=f"up to {max(0, steps - share)}",
            instead=f"schedule.warmup_steps={max(0, steps // 10)}",
        )


def can_draw() -> bool:
    """Whether the package that draws reports is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _report(report: schema.ReportConfig) -> None:
    words = "the package matplotlib, which draws reports, is not installed here"
    _require(can_draw(), "report", "matplotlib", words, allowed="every other command without it", instead=install("report"))
    words = "one run alone cannot be compared"
    _require(len(report.compare) != 1, "report.compare", report.compare, words, allowed="two runs or more", instead="hybridtrain report RUN")


def _generate(generate: schema.GenerateConfig) -> None:
    _in_range("generate.top_p", generate.top_p, lambda mass: 0 < mass <= 1, allowed="above 0, up to 1", instead="0.95")
    words = "which of the two is meant is not clear"
    _require(
        not (generate.prompts and generate.prompts_file), "generate.prompts", generate.prompts, words, allowed="one of prompts and prompts_file", instead="one"
    )
    words = "a system message belongs to a chat"
    _require(generate.chat or not generate.system, "generate.system", generate.system, words, allowed="with generate.chat=true", instead="generate.chat=true")
    _require(all(generate.stop), "generate.stop", generate.stop, "an empty text stops everything", allowed="texts of a character or more", instead="without ''")


def _bench(config: schema.BenchRoot) -> None:
    words, instead = "bench times next-token prediction alone", "task=causal_lm"
    _require(config.task.kind == "causal_lm" and not config.model.labels, "task.kind", config.task.kind, words, allowed="causal_lm", instead=instead)
    words, instead = "the plain loop beside it trains with AdamW", "bench.plain=false"
    _require(config.optim.kind == "adamw" or not config.bench.plain, "optim.kind", config.optim.kind, words, allowed="adamw", instead=instead)
    _require(
        not config.bench.corpus or bool(config.data.path),
        "bench.corpus",
        "true",
        "data.path is empty",
        allowed="true with a folder of token files",
        instead="data.path=FOLDER, or bench.corpus=false for random tokens",
    )


_SECTION_RULES: dict[str, Callable[[Any], None]] = {
    "parallel": _parallel,
    "optim": _optim,
    "schedule": _schedule,
    "precision": _precision,
    "model": _model,
    "data": _data,
    "generate": _generate,
    "report": _report,
}
"""Section -> what it is checked by alone."""
