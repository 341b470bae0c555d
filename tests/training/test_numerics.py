"""numerics.jsonl of whole runs: which steps it has, what checks and callbacks make of it."""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

import json

import pytest
import torch

import hybridtrain as ht
from hybridtrain.cli.main import main
from hybridtrain.precision.numerics import Sample, sample_of
from hybridtrain.verify import verify_run
from tests import cases
from tests.cases import Case
from tests.dispatch import NoWait
from tests.parallel.test_monitor import monitor_of
from tests.runs import arguments, finished, on_this_rank


def lines(run):
    return [json.loads(line) for line in (run / "numerics.jsonl").read_text().splitlines()]


class Collects(ht.Callback):
    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def on_numerics(self, run: ht.Run, sample: Sample) -> None:
        self.samples.append(sample)


def test_a_run_with_the_monitor(data, run_dir):
    """Sampled steps, continued; as a callback sees them; verified."""
    options = {"precision__monitor_every": 2, "checkpoint__every": 3, "train__eval_every": 2}
    argv = arguments(run_dir, data, train__steps=4, **options)
    seen = Collects()
    ht.Trainer(ht.compose(*argv), callbacks=[seen]).fit()
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 4]
    assert [sample_of(line).step for line in lines(run_dir)] == [sample.step for sample in seen.samples]
    every = seen.samples[-1].modules
    assert {"model.embed_tokens", "model.norm", "lm_head"} <= every.keys()
    assert sum(every["model.norm"]["x"].histogram) == 8 * 32 * 64  # what evaluations compute is not counted
    again = arguments(run_dir, data, train__steps=6, **options)
    (run_dir / "numerics.jsonl").open("a").write('{"step": 9}\n')  # of an attempt that went further
    ended = on_this_rank(again)
    assert ended.code == 0, ended.err
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 4, 6]
    assert main(["verify", str(run_dir)]) == 0
    text = (run_dir / "numerics.jsonl").read_text()
    (run_dir / "numerics.jsonl").write_text(text.replace('"histogram": [[', '"histogram": [[999, 1], [', 1))
    problems, _ = verify_run(run_dir)
    assert [problem.partition(": line")[0] for problem in problems] == [str(run_dir / "numerics.jsonl")]


def test_a_run_without_it_has_no_such_file(data, run_dir):
    ended = on_this_rank(arguments(run_dir, data, train__steps=1))
    assert ended.code == 0, ended.err
    assert not (run_dir / "numerics.jsonl").exists()


@pytest.mark.slow
def test_the_line_of_two_ranks_is_that_of_one(data, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for world_size, (run, layout) in enumerate(zip(runs, ("single", "pp2"), strict=True), 1):
        finished(
            world_size, arguments(run, data, train__steps=1, parallel=layout, precision__monitor_every=9)
        )
    one, two = (lines(run)[0] for run in runs)
    assert one["modules"] == two["modules"]


def test_a_sampled_step_does_not_wait_for_the_device():
    """But for bincount, in whose place GPUs have histc."""
    case = Case()
    engine = cases.start(case)
    monitor = monitor_of(engine, case)
    engine.train_step(case.batches(0, dp_rank=0, dp=1), lr=case.lr)
    batches = case.batches(1, dp_rank=0, dp=1)

    class AsOnGpus(NoWait):
        def before(self, name, args):
            if not name.startswith("bincount"):
                super().before(name, args)

    with AsOnGpus(), monitor.sampling(1):
        engine.train_step(batches, lr=case.lr)
    assert torch.isfinite(monitor.amax).all()
