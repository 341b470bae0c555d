"""One loss scale for every layout and engine: what a step scales, skips and saves does not depend on the
number of data ranks."""

import dataclasses
import itertools
import json
import math
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.checkpoint import origin
from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.precision.loss_scale import NONFINITE, LossScaler
from hybridtrain.types import Progress
from tests.cases import Case, start
from tests.ranks import run_ranks

SLOW = pytest.mark.slow

# -- the scale after each step -------------------------------------------------------------------------------


def scaler(**settings: Any) -> LossScaler:
    return LossScaler(PrecisionConfig(kind="fp16_mixed", **settings), device=torch.device("cpu"))


def scales(of: LossScaler, nonfinite: str) -> list[float]:
    """The scale after each step: "." is finite, "x" is not, "-" has no targets."""
    result = []
    for step in nonfinite:
        of.update(torch.tensor(float(step == "x")), empty=torch.tensor(float(step == "-")))
        result.append(float(of.scale))
    return result


@pytest.mark.parametrize(
    ("hysteresis", "wanted"),
    # . x x . x - x . .   growth after two finite steps in a row
    [
        (1, [16, 8, 4, 4, 2, 2, 1, 1, 2]),
        (2, [16, 16, 8, 8, 4, 4, 2, 2, 4]),
        (3, [16, 16, 16, 16, 8, 8, 4, 4, 8]),
    ],
)
def test_the_scale_falls_after_as_many_steps_as_hysteresis_since_it_grew(hysteresis, wanted):
    of = scaler(init_scale=16.0, growth_interval=2, hysteresis=hysteresis)
    assert scales(of, ".xx.x-x..") == wanted
    assert scales(of, "x") == [wanted[-1] / (2 if hysteresis == 1 else 1)], "growth restores the full count"


def test_before_the_first_finite_step_the_exponent_is_halved_and_hysteresis_waits():
    of = scaler(init_scale=2.0**100, min_scale=2.0**14, hysteresis=5)
    assert [math.log2(scale) for scale in scales(of, "xx-xxxx")] == [50, 25, 25, 16, 15, 14, 14]
    assert [math.log2(scale) for scale in scales(of, ".xxxxx")] == [14] * 6
    of = scaler(init_scale=2.0**40, hysteresis=2)
    assert [math.log2(scale) for scale in scales(of, "x.xxx")] == [20, 20, 20, 19, 18]


def test_a_static_scale_never_changes():
    of = scaler(static_scale=3.0, growth_interval=1)
    assert set(scales(of, "..xxx..")) == {3.0}


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_that_of_megatrons_scaler(seed):
    """Its DynamicGradScaler, in plain numbers; ours begins after a finite step, where both are the same."""
    draw = random.Random(seed)
    steps = "." + "".join(draw.choices(".x", weights=(3, 1), k=200))
    ours = scales(scaler(init_scale=1024.0, growth_interval=3, hysteresis=3, min_scale=0.25), steps)
    scale, growth, hysteresis, theirs = 1024.0, 0, 3, []
    for step in steps:
        if step == "x":
            growth, hysteresis = 0, hysteresis - 1
            if hysteresis <= 0:
                scale = max(scale * 0.5, 0.25)
        else:
            growth += 1
            if growth == 3:
                growth, hysteresis, scale = 0, 3, scale * 2
        theirs.append(scale)
    assert ours == theirs
    assert len(set(theirs)) > 5


# -- under every layout --------------------------------------------------------------------------------------

STATIC = ("precision.static_scale", 512.0)
SETTINGS = (
    ("precision.init_scale", 2.0**40),  # fp16 overflows at first
    ("precision.growth_interval", 3),
    ("precision.hysteresis", 2),
)
PLANTED = (6, 8, 9)


class Plant:
    """Makes rank 0's gradients infinite in the steps in which `now` is set, and sums up what they are inside
    the backward pass: absolute values behind the first layer's gate, of this rank's rows."""

    def __init__(self, engine: Any):
        self.now, self.total = False, 0.0
        stage = engine.stages[0] if hasattr(engine, "stages") else engine.stage
        if stage.first:
            layer = next(layer for _, layer in stage.layer_modules())
            layer.mlp.gate_proj.register_forward_hook(self.hook)

    def hook(self, module: Any, inputs: Any, output: torch.Tensor) -> None:  # noqa: ARG002
        if output.requires_grad:
            output.register_hook(self.seen)

    def seen(self, gradient: torch.Tensor) -> torch.Tensor | None:
        self.total += float(gradient.float().abs().sum())
        return gradient * float("inf") if self.now and torch.distributed.get_rank() == 0 else None


def steps(case: Case) -> list[tuple[float, ...]]:
    """(scale, skipped, next scale, loss, sum of Plant) of each step."""
    engine = start(case)
    plant, found = Plant(engine), []
    for number in range(case.steps):
        plant.now, plant.total = number in PLANTED, 0.0
        batches = case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
        result = engine.train_step(batches, lr=case.lr)
        numbers = (result.loss_scale, result.skipped, result.next_scale, result.loss, plant.total)
        found.append(tuple(float(number) for number in numbers))
    return found


def fp16(layout: str, engine: str, *overrides: tuple[str, Any]) -> Case:
    """One row a micro-batch, so that what is in an fp16 number is the same wherever the row is computed."""
    return Case(
        layout,
        precision="fp16_mixed",
        steps=12,
        micro_batch_size=1,
        global_batch_size=4,
        overrides=(*SETTINGS, ("engine.kind", engine), *overrides),
    )


DEFAULT = (("torch", "dp_replicate2"), ("torch", "pp2"), ("deepspeed", "dp_shard2-zero1"))
WIDE = (
    *itertools.product(
        ("torch",),
        (
            *("tp2", "dp_replicate4", "dp_shard2-zero1", "dp_shard2-zero2", "dp_shard2-zero3"),
            *("dp_shard4-zero3", "dp_replicate2-dp_shard2-zero2", "pp2-dp_shard2-zero2"),
            *("pp2-tp2", "pp2-zbv_zero_bubble"),
        ),
    ),
    *itertools.product(
        ("deepspeed",), ("single", "dp_shard2-zero2", "dp_shard2-zero3", "dp_shard4-zero1", "pp2")
    ),
)


@pytest.fixture(scope="module")
def single() -> list[tuple[float, ...]]:
    return run_ranks(1, steps, fp16("single", "torch"))[0]


def test_what_is_planted_is_skipped_and_counted(single):
    """Two planted steps after growth: the first is only skipped."""
    skipped = [number for number, step in enumerate(single) if step[1]]
    assert skipped[-3:] == list(PLANTED)
    assert 1 <= len(skipped) - 3 <= 5, single
    assert single[0][2] == 2.0**20
    scale = single[6][0]
    assert [step[2] / scale for step in single[6:10]] == [1, 1, 0.5, 0.25], single
    assert [step[0] for step in single[1:]] == [step[2] for step in single[:-1]]


@pytest.mark.parametrize(
    ("engine", "layout"), [*DEFAULT, *(pytest.param(*each, marks=SLOW) for each in WIDE)]
)
def test_scales_skips_and_losses_agree_under_every_layout(engine, layout, single):
    pytest.importorskip("deepspeed") if engine == "deepspeed" else None
    case = fp16(layout, engine)
    ranks = run_ranks(case.world_size, steps, case)
    assert sum(found[-1][4] for found in ranks) == pytest.approx(single[-1][4], rel=0.02)
    for found in ranks:
        assert [step[:3] for step in found] == [step[:3] for step in single]
        assert [step[3] for step in found] == pytest.approx([step[3] for step in single], rel=1e-3)


@pytest.mark.parametrize(
    ("engine", "layout"), [("torch", "single"), pytest.param("deepspeed", "dp_shard2-zero1", marks=SLOW)]
)
def test_a_static_scale_stays_though_steps_are_skipped(engine, layout):
    pytest.importorskip("deepspeed") if engine == "deepspeed" else None
    case = dataclasses.replace(fp16(layout, engine), overrides=(("engine.kind", engine), STATIC))
    for found in run_ranks(case.world_size, steps, case):
        assert {(step[0], step[2]) for step in found} == {(512.0, 512.0)}
        assert [number for number, step in enumerate(found) if step[1]] == list(PLANTED)


# -- checkpoints ---------------------------------------------------------------------------------------------


def saved(case: Case, path: Path, count: bool) -> None:
    """A finite step and one that overflows; without `count` as versions before hysteresis wrote it."""
    engine = start(case)
    if not count:
        state = engine.scaler.state
        engine.scaler.state = lambda: {key: value for key, value in state().items() if key != NONFINITE}
    plant = Plant(engine)
    for number in range(2):
        plant.now = number == 1
        engine.train_step(case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=0.0)
    engine.save(path, Progress(0, 0, {})).result()


def loaded(case: Case, path: Path, overflow: bool) -> tuple[float, float]:
    """(scale, next scale) of a step after loading."""
    engine = start(case)
    engine.load(path)
    Plant(engine).now = overflow
    batches = case.batches(0, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp)
    result = engine.train_step(batches, lr=0.0)
    return float(result.loss_scale), float(result.next_scale)


SCALING = (("precision.init_scale", 512.0),)


def test_a_saved_scale_is_the_same_under_another_layout_and_engine(tmp_path):
    """Saved in the middle of a count: of two steps that lower the scale, one is before the checkpoint."""
    pytest.importorskip("deepspeed")
    first = Case("dp_shard2-zero1", precision="fp16_mixed", overrides=SCALING)
    run_ranks(2, saved, first, tmp_path / "c", True)
    for layout, engine in (("single", "torch"), ("dp_shard2-zero2", "deepspeed")):
        case = Case(layout, precision="fp16_mixed", overrides=(("engine.kind", engine),))
        assert set(run_ranks(case.world_size, loaded, case, tmp_path / "c", True)) == {(512.0, 256.0)}


@pytest.mark.parametrize("count", [True, False])
def test_a_checkpoint_without_the_count_is_read_with_the_full_one(tmp_path, count):
    case = Case(precision="fp16_mixed", overrides=SCALING)
    run_ranks(1, saved, case, tmp_path / "c", count)
    assert run_ranks(1, loaded, case, tmp_path / "c", True) == [(512.0, 256.0 if count else 512.0)]
    static = Case(precision="fp16_mixed", overrides=(("precision.static_scale", 64.0),))
    assert run_ranks(1, loaded, static, tmp_path / "c", True) == [(64.0, 64.0)]


def events(folder: Path, *lines: tuple[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text(
        "".join(
            json.dumps({"time": 0.0, "step": 3, "kind": kind, "detail": detail}) + "\n"
            for kind, detail in lines
        )
    )
    return folder / "checkpoints" / "step-00000003"


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (
            [
                ("started", "dp_replicate2 on 2 process(es)"),
                ("checkpoint", "step-00000003"),
                ("resumed", "single on 1 process(es); from step-00000003"),
            ],
            2,
        ),
        (
            [
                ("started", "dp_shard4-tp2-zero1 on 8 process(es)"),
                ("resumed", "single on 1 process(es); from step-00000003"),
            ],
            4,
        ),
        (
            [
                ("started", "single on 1 process(es)"),
                ("resumed", "pp2-dp_shard2-zero1 on 4 process(es)"),
                ("checkpoint", "step-00000003"),
            ],
            2,
        ),
        ([("started", "no layout")], 1),
        ([], 1),
    ],
)
def test_the_data_ranks_that_wrote_a_checkpoint(tmp_path, lines, wanted):
    assert origin.data_ranks(events(tmp_path, *lines)) == wanted


@pytest.mark.parametrize(
    ("layout", "engine"), [("single", "torch"), ("dp_replicate2", "torch"), ("dp_shard2-zero1", "deepspeed")]
)
def test_a_checkpoint_of_version_0_1_is_read_with_its_data_ranks(tmp_path, layout, engine):
    """Two data ranks wrote a scale of 2048 on twice the loss: 4096 on the loss."""
    pytest.importorskip("deepspeed") if engine == "deepspeed" else None
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "v0_1" / "v0_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "runs" / "fp16"
    fields = json.loads((run / "model" / "config.json").read_text())
    case = Case(layout, fields, precision="fp16_mixed", overrides=(("engine.kind", engine),))
    found = run_ranks(case.world_size, loaded, case, run / "checkpoints" / "step-00000004", False)
    assert {scale for scale, _ in found} == {4096.0}
