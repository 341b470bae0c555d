"""One loss scale for every layout and engine: what a step scales, skips and saves does not depend on the
number of data ranks."""

import json
import tarfile
from pathlib import Path

import pytest

from hybridtrain.checkpoint import origin
from hybridtrain.types import Progress
from tests.cases import Case, start
from tests.ranks import run_ranks

SETTINGS = (("precision.init_scale", 2.0**24), ("precision.growth_interval", 2))
"""So large that fp16 overflows at first: the scale comes down to what the gradients bear, which is a number
of the model, not of the layout."""


def steps(case: Case) -> list[tuple[float, float]]:
    engine = start(case)
    found = []
    for number in range(case.steps):
        result = engine.train_step(
            case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=0.0
        )
        found.append((float(result.loss_scale), float(result.skipped)))
    return found


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_scales_and_skips_agree_under_every_layout(engine):
    """One row a micro-batch, so that what is in an fp16 number is the same wherever the row is computed."""
    pytest.importorskip("deepspeed") if engine == "deepspeed" else None
    layouts = (
        ("single", "dp_shard2-zero1", "dp_shard2-zero3", "pp2")
        if engine == "torch"
        else ("single", "dp_shard2-zero1", "dp_shard2-zero2")
    )
    overrides = (*SETTINGS, ("engine.kind", engine), ("optim.clip", 1.0))
    cases = [
        Case(
            layout,
            precision="fp16_mixed",
            steps=12,
            micro_batch_size=1,
            global_batch_size=4,
            overrides=overrides,
        )
        for layout in layouts
    ]
    found = {case.layout: run_ranks(case.world_size, steps, case)[0] for case in cases}
    assert any(skipped for _, skipped in found["single"])
    assert not all(skipped for _, skipped in found["single"])
    assert all(series == found["single"] for series in found.values()), found


def saved(case: Case, path: Path) -> None:
    engine = start(case)
    engine.save(path, Progress(0, 0, {})).result()


def loaded(case: Case, path: Path) -> float:
    engine = start(case)
    engine.load(path)
    return float(
        engine.train_step(
            case.batches(0, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=0.0
        ).loss_scale
    )


def test_a_saved_scale_is_the_same_under_another_layout_and_engine(tmp_path):
    pytest.importorskip("deepspeed")
    scaling = (("precision.init_scale", 512.0),)
    run_ranks(2, saved, Case("dp_shard2-zero1", precision="fp16_mixed", overrides=scaling), tmp_path / "c")
    for layout, engine in (("single", "torch"), ("dp_shard2-zero2", "deepspeed")):
        case = Case(layout, precision="fp16_mixed", overrides=(("engine.kind", engine),))
        assert set(run_ranks(case.world_size, loaded, case, tmp_path / "c")) == {512.0}


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
    assert set(run_ranks(case.world_size, loaded, case, run / "checkpoints" / "step-00000004")) == {4096.0}
