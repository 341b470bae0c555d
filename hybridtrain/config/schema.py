"""The sections of each command.

Options, with type, default and documentation, are in sections.py, optim.py, adapters.py, precision.py,
commands.py and quantize.py.
"""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any

from hybridtrain.config.adapters import AdaptersConfig
from hybridtrain.config.commands import (
    BenchConfig,
    ClusterConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    InferenceConfig,
    InspectConfig,
    LmEvalConfig,
    LogsConfig,
    ParityConfig,
    PrepareConfig,
    ReportConfig,
    RunsConfig,
)
from hybridtrain.config.optim import OptimConfig, ScheduleConfig
from hybridtrain.config.options import Options, options
from hybridtrain.config.precision import PrecisionConfig
from hybridtrain.config.quantize import CompareConfig, QuantizeConfig
from hybridtrain.config.sections import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    RunFolder,
    TaskConfig,
    TrackerConfig,
    TrainConfig,
)


@options
class Root(Options):
    """The sections of a command: fields, each a dataclass of options."""

    # Options that the command line sets, filled in by compose. Without annotation, so
    # that it is not a section.
    given = frozenset[str]()


@options
class Config(Root):
    """All sections of a training run; some commands add their own section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)


@options
class SubmitRoot(Config):
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@options
class EvaluateRoot(Config):
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@options
class CompareRoot(Config):
    compare: CompareConfig = field(default_factory=CompareConfig)


@options
class QuantizeRoot(Config):
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)


@options
class ParityRoot(Config):
    parity: ParityConfig = field(default_factory=ParityConfig)


@options
class BenchRoot(Config):
    bench: BenchConfig = field(default_factory=BenchConfig)


@options
class InspectRoot(Root):
    """`hybridtrain inspect`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)


@options
class PrepareRoot(Root):
    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)


@options
class ExportRoot(Root):
    run: RunFolder = field(default_factory=RunFolder)
    export: ExportConfig = field(default_factory=ExportConfig)


@options
class GenerateRoot(Root):
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)


@options
class ReportRoot(Root):
    run: RunFolder = field(default_factory=RunFolder)
    report: ReportConfig = field(default_factory=ReportConfig)


@options
class VerifyRoot(Root):
    """`hybridtrain verify`; run.dir is what is verified."""

    run: RunFolder = field(default_factory=RunFolder)


@options
class RunsRoot(Root):
    runs: RunsConfig = field(default_factory=RunsConfig)


@options
class LogsRoot(Root):
    run: RunFolder = field(default_factory=RunFolder)
    logs: LogsConfig = field(default_factory=LogsConfig)


ROOTS: dict[str, type[Root]] = {
    "train": Config,
    "inspect": InspectRoot,
    "prepare": PrepareRoot,
    "parity": ParityRoot,
    "bench": BenchRoot,
    "export": ExportRoot,
    "evaluate": EvaluateRoot,
    "compare": CompareRoot,
    "quantize": QuantizeRoot,
    "generate": GenerateRoot,
    "report": ReportRoot,
    "submit": SubmitRoot,
    "runs": RunsRoot,
    "logs": LogsRoot,
    "verify": VerifyRoot,
}

SECTIONS: dict[str, Any] = {
    section.name: section.default_factory for root in (*ROOTS.values(), Config) for section in fields(root)
}
"""Section -> its dataclass, of all commands."""


def over_files(root: type[Root]) -> Any:
    """The schema for configuration files: sections of training and of the command `root`; those of
    other commands accept anything.

    The same file can be used for several commands, which ignore sections of others.
    """
    own: dict[str, Any] = {
        section.name: section.default_factory for kind in (root, Config) for section in fields(kind)
    }
    others: dict[str, Any] = dict.fromkeys(SECTIONS.keys() - own.keys(), dict[str, Any])
    return make_dataclass(
        "OverFiles",
        [
            (name, kind, field(default_factory=dict if name in others else kind))
            for name, kind in (own | others).items()
        ],
    )
