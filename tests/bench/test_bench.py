"""`hybridtrain bench`: the plain loop is a fair one, and the two sides do the same work."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hybridtrain.bench import compare, result
from hybridtrain.bench.plain import PlainLoop, PlainProcess, PlainSettings
from hybridtrain.bench.rounds import Side
from hybridtrain.cli import commands
from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.data.synthetic import Synthetic
from hybridtrain.errors import UserError
from hybridtrain.plan import layout
from hybridtrain.plan.batch import plan_batch
from hybridtrain.tasks.causal_lm import CausalLM
from tests import runs
from tests.cases import GPT2, Case, model, reference
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model=tiny",
    "data.seq_len=16",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=2",
    "bench.warmup=2",
    "bench.steps=2",
    "bench.rounds=2",
]
NOT_THERE = (
    "wandb",
    "tensorboard",
    "tensorboardX",
    "datasets",
    "pyarrow",
    "matplotlib",
    "deepspeed",
    "pandas",
    "psutil",
)


def config_of(case: Case) -> schema.BenchRoot:
    return schema.BenchRoot(**vars(case.config()))


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(
            fields=model("qwen3", tie_word_embeddings=True),
            micro_batch_size=4,
            freeze=("model.embed_tokens.*",),
        ),
        Case(overrides=(("recompute.kind", "full"), ("optim.clip", 0.0))),
        Case(overrides=(("engine.compile", True), ("engine.compile_backend", "eager"))),
        Case(fields=GPT2, overrides=(("model.attention", "eager"), ("recompute.kind", "full"))),
    ],
    ids=["llama", "tied, frozen", "recompute, no clipping", "compiled", "dropout"],
)
def test_the_plain_loop_trains_as_the_reference_does(case):
    loop = PlainLoop(config_of(case), device=torch.device("cpu"))
    losses = [float(loop.step(case.batches(step, dp_rank=0, dp=1))) for step in range(case.steps)]
    expected = reference(case)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    parameters = {
        name.replace("_orig_mod.", ""): parameter.detach()
        for name, parameter in loop.model.named_parameters()
    }
    assert parameters.keys() == expected.parameters.keys()
    for name, wanted in expected.parameters.items():
        assert float((parameters[name] - wanted).abs().max()) < 0.05 * case.lr * case.steps, name


@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16_pure", "fp16_mixed"])
def test_the_plain_loop_in_other_recipes(precision):
    """Autocast with fp32 master weights, or weights in bf16; the first loss within what `bench` allows."""
    case = Case(precision=precision, steps=2)
    loop = PlainLoop(config_of(case), device=torch.device("cpu"))
    assert {p.dtype for p in loop.model.parameters()} == {
        torch.bfloat16 if precision == "bf16_pure" else torch.float32
    }
    losses = [float(loop.step(case.batches(step, dp_rank=0, dp=1))) for step in range(2)]
    expected = reference(case).losses
    assert losses[0] == pytest.approx(expected[0], rel=result.LOSS_TOLERANCE[precision])
    assert losses[1] == pytest.approx(expected[1], rel=10 * result.LOSS_TOLERANCE[precision])


# -- runs ----------------------------------------------------------------------------------------------------


def bench(argv: list[str]) -> int:
    return commands.run_command("bench", argv)


@pytest.mark.slow
def test_two_pipeline_stages_beside_the_plain_loop(tmp_path):
    out = tmp_path / "bench.json"
    argv = [*TINY, "parallel=pp2", f"bench.out={out}", "bench.parts=true", "precision.monitor_every=50"]
    assert run_ranks(2, bench, argv) == [0, 0]
    told = json.loads(out.read_text())
    assert [pair["sampled_s"] > pair["plain_s"] > 0 for pair in told["sampled"]] == [True, True]
    ours, theirs = told["sides"]["hybridtrain pp2"], told["sides"]["plain loop"]
    assert [len(steps) for steps in ours["rounds"]] == [len(steps) for steps in theirs["rounds"]] == [2, 2]
    assert (
        (ours["processes"], theirs["processes"])
        == (len(ours["memory_gib"]), len(theirs["memory_gib"]))
        == (2, 1)
    )
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)  # all six steps
    assert len(ours["losses"]) == 6
    assert told["agreement"]["holds"]
    assert told["ratio"]["rounds"] == 2
    assert ours["tokens_per_s"] == pytest.approx(
        64 / statistics.median(step for steps in ours["rounds"] for step in steps)
    )
    assert told["config"]["parallel"]["pp"] == 2
    assert told["machine"][0]["ranks"] == [0, 1]
    assert any("mm" in part["name"] for part in told["parts"]["plain loop"])
    assert 0.2 < sum(part["share"] for part in told["parts"]["hybridtrain"]) <= 1.0


def test_a_corpus_and_what_is_waited_for_it(tmp_path):
    out = tmp_path / "bench.json"
    argv = [
        *TINY,
        "bench.plain=false",
        "bench.corpus=true",
        f"data.path={runs.corpus(tmp_path)}",
        "model.config.vocab_size=300",
        f"bench.out={out}",
    ]
    assert run_ranks(1, bench, argv) == [0]
    told = json.loads(out.read_text())
    assert list(told["sides"]) == ["hybridtrain single"]
    assert "ratio" not in told
    assert 0 < told["sides"]["hybridtrain single"]["data_share"] < 1


ABSENT = """
import importlib.machinery, sys
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
"""


def test_it_runs_where_there_is_little_besides_torch_and_transformers(tmp_path):
    """From a checkout, with the libraries of trackers, reports and data preparation missing in this process
    and in the plain loop's."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(missing=NOT_THERE))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    code = "import sys, wandb"
    # the hook holds
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=False
        ).returncode
        == 1
    )
    done = subprocess.run(
        [sys.executable, "-m", "hybridtrain.bench", *TINY, "precision=fp8_tensorwise"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "parameters, bf16_mixed fp8_tensorwise (fp8_tensorwise emulated), recompute none",
        "in one process, bf16_mixed, recompute none",
        "hybridtrain single",
        "plain loop",
        "times as fast as the plain loop: median of 2 paired rounds",
        "the same work",
        "round 2/2",
    ):
        assert said in done.stdout
    assert not [
        path for path in tmp_path.iterdir() if path.name not in ("sitecustomize.py", "__pycache__")
    ], "a benchmark leaves nothing unless asked to"


def waiting(seconds: float) -> float:
    """CPU seconds that this rank used while rank 0 was busy elsewhere."""
    group = dist.new_group(backend="gloo")
    dist.barrier(group=group)
    if dist.get_rank() == 0:
        time.sleep(seconds)
    began = time.process_time()
    compare._wait(group)
    return time.process_time() - began


def test_ranks_wait_for_the_plain_loop_without_using_the_cpu():
    assert run_ranks(2, waiting, 2.0)[1] < 0.2


# -- the plain loop's process --------------------------------------------------------------------------------


@pytest.fixture
def plain():
    case = Case()
    plan = plan_batch(case.config().batch, layout=layout.ParallelLayout(1, 1, 1, 1, 1), seq_len=case.seq_len)
    ballast = torch.ones(1 << 28)  # 1 GiB of this process
    process = PlainProcess(PlainSettings(config_of(case), plan, 256, threads=1))
    del ballast
    yield process
    process.close()


def test_rounds_go_on_where_the_last_one_ended_in_memory_of_their_own(plain):
    case = Case()
    plan = plan_batch(case.config().batch, layout=layout.ParallelLayout(1, 1, 1, 1, 1), seq_len=case.seq_len)
    loop = PlainLoop(config_of(case), device=torch.device("cpu"))
    tokens = Synthetic(
        vocab=256,
        plan=plan,
        dp_rank=0,
        dp_size=1,
        seed=7,
        labels=0,
        head="",
        collate=CausalLM().collate,
    )
    here = Side(loop.step, tokens=tokens, device=torch.device("cpu"), before_gib=0.0).run(3)
    there = [plain.run(2), plain.run(1)]
    assert [loss for a_round in there for loss in a_round.losses] == pytest.approx(here.losses, rel=1e-5)
    assert [len(a_round.steps_s) for a_round in there] == [2, 1]
    assert all(seconds > 0 for a_round in there for seconds in a_round.steps_s)
    memory = plain.memory()
    assert 0.1 < memory.before_gib < memory.peak_gib < 0.9  # this process held 1 GiB when it was started


def test_a_plain_loop_that_is_killed_is_a_refusal(plain):
    os.kill(plain._process.pid, signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"(?s)bench\.plain=true: the plain loop failed: its process died.*bench\.plain=false"
    ):
        plain.run(1)


def test_a_plain_loop_that_cannot_be_built_is_a_refusal():
    case = Case(fields=model(num_attention_heads=7))
    plan = plan_batch(case.config().batch, layout=layout.ParallelLayout(1, 1, 1, 1, 1), seq_len=case.seq_len)
    with pytest.raises(
        UserError, match=r"bench\.plain=true: the plain loop failed: UserError: model\.config="
    ):
        PlainProcess(PlainSettings(config_of(case), plan, 256, threads=1))


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["bench"], "model"),
        (["bench", *TINY, "bench.rounds=0"], "bench.rounds"),
        (["bench", *TINY, "bench.warmup=0"], "bench.warmup"),
        (["bench", *TINY, "bench.plain_compile=all"], "bench.plain_compile"),
        (["bench", *TINY, "bench.corpus=true"], "bench.corpus"),
        (["bench", *TINY, "bench.corpus=true", "data.path=no/such/folder"], "data.path"),
        (["bench", *TINY, "bench.out=/proc/nowhere/bench.json"], "bench.out"),
        (["bench", *TINY, "parallel=tp2"], "parallel"),
    ],
)
def test_mistakes_are_answered_before_anything_starts(capsys, argv, field):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert field in runs.four_parts(err, field.split(".")[0] if "." not in field else field)


# -- the script for a machine with GPUs ----------------------------------------------------------------------


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", ROOT / "launch/bench_gpu.sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_gpu_script_says_what_it_measures_and_what_it_wants(tmp_path):
    told = script("--help")
    assert told.returncode == 0
    assert all(f"  {part}  " in told.stdout for part in ("headline", "trainer", "variants", "tests"))
    assert script("--rehears").returncode == 2
    without = script(str(tmp_path / "results"))
    assert without.returncode == 2
    assert "torch sees no NVIDIA GPU here" in without.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_gpu_script_rehearses_on_the_cpu(tmp_path):
    """Every part, small; two processes where it wants two GPUs.

    A part that runs out of time is a row that says so.
    """
    done = script("--rehearse", "--minutes", "12", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    names = ["compiled", "plain-compiled", "eager", "plain", "compiled-8-rows", "trainer", "trainer-compiled"]
    names += [
        "packed",
        "rows-of-4096",
        "selective",
        "bf16-pure",
        "zero3: hybridtrain dp_shard2-zero3",
        "tp2: hybridtrain tp2",
        "pp2: hybridtrain pp2",
    ]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][
        1:
    ] == names
    with tarfile.open(tmp_path / "results.tar.gz") as together:
        assert {"./cases.jsonl", "./table.md", "./zero3.json", "./variants.log"} <= set(together.getnames())
    late = script("--rehearse", "--minutes", "0.01", str(tmp_path))
    assert late.returncode == 1
    assert "headline: no time left" in late.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_formats_of_the_gpu_script_rehearse_on_the_cpu(tmp_path):
    """torchao's cases are rows that say that it is not installed."""
    done = script("--formats", "--rehearse", "--minutes", "12", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows if not row["case"].startswith("torchao")] == [
        "compiled",
        "fp8-tensorwise",
        "fp8-rowwise",
        "plain-compiled",
        "fp16",
        "rows-of-4096",
        "fp8-tensorwise-4096",
        "fp8-rowwise-4096",
    ]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert "torchao: left out" in (tmp_path / "missed.txt").read_text()
    assert json.loads((tmp_path / "monitor.json").read_text())
