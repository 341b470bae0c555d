"""An interrupted run goes on as if nothing had happened: the same losses, each step once, and what
was resumed is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hybridtrain import engine as engines
from hybridtrain.config import compose
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import notation
from hybridtrain.plan.batch import plan_batch
from hybridtrain.tasks.causal_lm import CausalLM
from tests.ranks import run_ranks
from tests.runs import (
    arguments,
    assert_equal_state,
    checkpoints,
    corpus,
    cut_off,
    finished,
    rows,
    summary,
    torchrun,
)

LAYOUTS = {
    "dp_replicate2": {},
    "dp_shard2-zero3": {"parallel__dp_replicate": 1, "parallel__dp_shard": 2, "parallel__zero_stage": 3},
    "tp2": {"parallel__tp": 2},
    "pp2": {"parallel__pp": 2},
    "pp2-tp2": {"parallel__pp": 2, "parallel__tp": 2},
    "pp2-zbv_zero_bubble": {"parallel__pp": 2, "parallel__schedule": "zbv_zero_bubble"},
    "pp2-dp_shard2": {
        "parallel__pp": 2,
        "parallel__dp_replicate": 1,
        "parallel__dp_shard": 2,
        "parallel__zero_stage": 1,
    },
}
RANKS = {
    name: notation.parse(name).get("pp", 1) * notation.parse(name).get("tp", 1) * 2 ** name.count("dp_")
    for name in LAYOUTS
}
LONG = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on two data ranks without a pause, every checkpoint kept."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finished(2, arguments(run, data, checkpoint__every=2, checkpoint__keep_last=0))
    return run


@pytest.mark.parametrize(
    "name", ["pp2", *(pytest.param(name, marks=LONG) for name in LAYOUTS if name != "pp2")]
)
def test_a_run_that_stops_and_goes_on_is_bit_for_bit_the_uninterrupted_one(
    data: Path, tmp_path: Path, name: str
) -> None:
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    finished(RANKS[name], arguments(straight, data, **LAYOUTS[name]))
    finished(RANKS[name], arguments(paused, data, train__steps=5, **LAYOUTS[name]))
    said = finished(RANKS[name], arguments(paused, data, **LAYOUTS[name])).out
    assert len(rows(straight)) == 8
    assert rows(paused) == rows(straight)
    assert_equal_state(paused / "checkpoints" / "step-00000008", straight / "checkpoints" / "step-00000008")
    assert "resumed   step-00000005 at step 5, 1280 tokens" in said
    assert "changed   train.steps: 5 -> 8" in said
    assert (summary(paused)["status"], summary(paused)["steps"], summary(paused)["tokens"]) == (
        "finished",
        8,
        2048,
    )


@pytest.mark.parametrize(
    "precision", [pytest.param(kind, marks=LONG) for kind in ("bf16_mixed", "fp16_mixed")]
)
def test_mixed_precision_goes_on_too(data: Path, tmp_path: Path, precision: str) -> None:
    # overflows first, then grows
    options = {"precision": precision, "precision__init_scale": 2.0**18, "precision__growth_interval": 2}
    options |= {"train__eval_every": 5}  # checkpoints beside evaluations
    finished(2, arguments(tmp_path / "straight", data, train__steps=16, **options))
    for steps in (5, 10, 16):
        finished(2, arguments(tmp_path / "paused", data, train__steps=steps, **options))
    assert rows(tmp_path / "paused") == rows(tmp_path / "straight")
    if precision == "fp16_mixed":
        assert len({row["loss_scale"] for row in rows(tmp_path / "straight")}) > 2


@pytest.mark.parametrize(
    "name",
    [
        "pp2-dp_shard2",
        *(
            pytest.param(name, marks=LONG)
            for name in ("tp2", "dp_shard2-zero3", "pp2", "pp2-zbv_zero_bubble")
        ),
    ],
)
def test_another_layout_goes_on_with_the_same_losses(
    data: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    run = cut_off(whole, tmp_path / "run", step=4)
    said = finished(RANKS[name], arguments(run, data, checkpoint__keep_last=0, **LAYOUTS[name])).out
    before, after = rows(whole), rows(run)
    assert after[:4] == before[:4]
    errors = [abs(now["loss"] - then["loss"]) / then["loss"] for now, then in zip(after, before, strict=True)]
    assert errors[4] < 1e-6, errors
    assert max(errors[5:]) < 1e-5, errors
    assert [row["tokens_seen"] for row in after] == [row["tokens_seen"] for row in before]
    first = next(iter(LAYOUTS[name]))
    assert f"changed   {first.replace('__', '.')}:" in said
    assert summary(run)["world_size"] == RANKS[name]


def resave(argv: list[str], source: Path, target: Path) -> tuple[int, list[int]]:
    """On each rank: load a checkpoint under the layout of `argv` and save it again, nothing in between.

    Returns step and this rank's next rows.
    """
    from hybridtrain.data.blend import open_data
    from hybridtrain.data.loader import Loader

    config = compose.compose("train", argv)
    layout = layouts.resolve(config.parallel, world_size=torch.distributed.get_world_size())
    plan = plan_batch(config.batch, layout=layout, seq_len=config.data.seq_len)
    engine = engines.build(config, layout=layout, plan=plan, device=torch.device("cpu"))
    progress = engine.load(source)
    engine.save(target, progress).result()
    data = open_data(config.data, timeout_s=0)
    loader = Loader(
        data,
        plan=plan,
        dp_rank=engine.mesh.dp_rank,
        dp_size=layout.dp,
        seed=config.run.seed,
        vocab=300,
        collate=CausalLM().collate,
    )
    return engine.mesh.dp_rank, loader.row_ids(progress.step)[:, 1].tolist()


# 3 divides no dimension
UNEVEN = {
    "parallel__dp_replicate": 1,
    "parallel__dp_shard": 3,
    "parallel__zero_stage": 3,
    "batch__global_batch_size": 12,
}


@pytest.mark.parametrize(
    "name",
    ["pp2-tp2", *(pytest.param(name, marks=LONG) for name in ("uneven", *LAYOUTS) if name != "pp2-tp2")],
)
def test_state_and_rows_under_another_layout_are_the_same_bit_for_bit(
    data: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    source, target = whole / "checkpoints" / "step-00000004", tmp_path / "step-00000004"
    options = UNEVEN if name == "uneven" else LAYOUTS[name]
    found = run_ranks(
        3 if name == "uneven" else RANKS[name], resave, arguments(tmp_path, data, **options), source, target
    )
    assert_equal_state(target, source)
    batch = {key: value for key, value in options.items() if key.startswith("batch")}
    single = run_ranks(1, resave, arguments(tmp_path, data, **batch), source, tmp_path / "single")
    assert [
        row for _, share in sorted({(rank, tuple(share)) for rank, share in found}) for row in share
    ] == single[0][1]


def test_a_crash_long_after_the_last_checkpoint_leaves_each_step_once(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = cut_off(whole, tmp_path / "run", step=2)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "loss": 1.2')  # torn by the crash
    (run / "checkpoints" / "step-00000004.partial").mkdir()
    finished(2, arguments(run, data, checkpoint__every=2, checkpoint__keep_last=0))
    assert rows(run) == rows(whole)
    assert checkpoints(run) == checkpoints(whole)


def test_the_same_command_after_the_end_says_so_and_changes_nothing(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = cut_off(whole, tmp_path / "run", step=8)
    before = content(run)
    said = finished(2, arguments(run, data, checkpoint__every=2, checkpoint__keep_last=0)).out
    assert f"{run} is finished, 8 of 8 steps are done: nothing is left to do" in said
    assert "resumed" not in said
    assert content(run) == before


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_that_could_not_say_that_it_had_finished_is_finished_by_the_next_command(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    """Killed between its last checkpoint and its last word. No engine is built for that, no torch loaded."""
    run = cut_off(whole, tmp_path / "run", step=8)
    (run / "summary.json").write_text(json.dumps({**summary(run), "status": "running", "steps": 7}))
    code = (
        "import sys; from hybridtrain.cli.commands import run_command; "
        "print(run_command('train', sys.argv[1:]), 'torch' in sys.modules)"
    )
    argv = arguments(run, data, checkpoint__every=2, checkpoint__keep_last=0, parallel__dp_replicate=1)
    ended = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.stdout.endswith("0 False\n"), ended
    assert (summary(run)["status"], summary(run)["steps"], summary(run)["tokens"]) == ("finished", 8, 2048)
    assert summary(run)["final_loss"] == summary(whole)["final_loss"]


def test_a_longer_run_under_a_decaying_schedule_says_that_the_learning_rate_changes(
    data: Path, tmp_path: Path
) -> None:
    finished(1, arguments(tmp_path / "run", data, train__steps=2, schedule="cosine"))
    said = finished(1, arguments(tmp_path / "run", data, train__steps=4, schedule="cosine")).out
    assert "changed   train.steps: 2 -> 4" in said
    assert "warning: the cosine schedule now ends at step 4" in said
    assert len(rows(tmp_path / "run")) == 4


def test_an_end_before_what_is_done_is_said_and_changes_nothing(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = cut_off(whole, tmp_path / "run", step=8)
    said = finished(1, arguments(run, data, train__steps=5)).out
    assert f"warning: {run} has done 8 steps, and is asked to end after 5: nothing is left to do" in said
    assert content(run) == content(whole)


@pytest.mark.slow  # torchrun gives rank 0 half a minute to end
def test_a_failing_rank_that_is_not_0_is_named(data: Path, tmp_path: Path) -> None:
    finished(2, arguments(tmp_path / "run", data, train__steps=1))
    (tmp_path / "run" / "logs" / "rank-1.log").unlink()
    (tmp_path / "run" / "logs" / "rank-1.log").mkdir()  # rank 1 cannot open its log
    process = torchrun(2, arguments(tmp_path / "run", data))
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "[rank 1]" in said
    assert "rank-1.log" in said
    assert "[rank 0]" not in said


@pytest.mark.slow
def test_a_rank_killed_by_the_system_ends_the_run_and_the_same_command_goes_on(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = arguments(run, data, train__steps=400, checkpoint__every=10)
    process = torchrun(2, argv)
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 30:
        assert process.poll() is None, process.communicate()
    ranks = {
        child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)
    }
    ranks["1"].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank      : 1" in said  # torchrun's own report
    finished(2, argv)
    assert [row["step"] for row in rows(run)] == list(range(1, 401))


def test_the_decision_about_the_run_directory_is_made_without_torch(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    """Here: another seed is another run."""
    code = (
        "import sys; from hybridtrain.cli.commands import run_command; "
        "print(run_command('train', sys.argv[1:]), 'torch' in sys.modules)"
    )
    run = cut_off(whole, tmp_path / "run", step=4)
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments(run, data, run__seed=5)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.stdout == "2 False\n"
    assert "run.seed was 0 and is 5" in ended.stderr


@pytest.mark.slow
def test_a_bf16_run_of_an_earlier_version_goes_on_rounding_to_nearest(tmp_path):
    """Its config.yaml has no precision.rounding; a command that sets one gets it."""
    data, run = corpus(tmp_path), tmp_path / "run"
    options = {"precision": "bf16_pure", "optim__lr": 1e-4}
    nearest = {**options, "precision__rounding": "nearest"}
    finished(1, arguments(tmp_path / "whole", data, train__steps=4, **nearest))
    finished(1, arguments(run, data, train__steps=2, **nearest))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  rounding: nearest\n", ""))
    shutil.copytree(run, tmp_path / "changed")
    ended = finished(1, arguments(run, data, train__steps=4, **options))
    assert "precision.rounding" not in ended.out + ended.err
    assert rows(run) == rows(tmp_path / "whole")
    assert compose.read_run(run / "config.yaml").precision.rounding == "nearest"
    words = {**options, "precision__rounding": "kahan"}
    ended = finished(1, arguments(tmp_path / "changed", data, train__steps=4, **words))
    assert "changed   precision.rounding: nearest -> kahan" in ended.out + ended.err
    assert "master weights bfloat16 compensated (kahan), optimizer state bfloat16" in ended.out + ended.err
