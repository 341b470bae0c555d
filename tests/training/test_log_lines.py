"""What a line of metrics.jsonl says of the steps since the last one, in a whole run; and Python's
garbage collection in it."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from hybridtrain.analysis.facts import facts_of
from hybridtrain.config import schema
from hybridtrain.config.compose import train_config
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.plan import layout as layouts
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.training import startup_log
from hybridtrain.training.loop import GarbageCollection
from tests import runs


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_a_line_is_the_mean_since_the_last_one(tmp_path):
    data = runs.corpus(tmp_path)
    runs.finished(1, runs.arguments(tmp_path / "each", data, train__steps=5))
    ended = runs.finished(1, runs.arguments(tmp_path / "some", data, train__steps=5, train__log_every=3))
    own = [line["step_loss"] for line in lines(tmp_path / "each")]
    assert [line["loss"] for line in lines(tmp_path / "each")] == own
    some = lines(tmp_path / "some")
    assert [line["step"] for line in some] == [1, 3, 5]
    assert [line["step_loss"] for line in some] == [own[0], own[2], own[4]]
    means = [own[0], sum(own[1:3]) / 2, sum(own[3:5]) / 2]
    assert [line["loss"] for line in some] == pytest.approx(means, rel=1e-6)
    assert runs.summary(tmp_path / "some")["final_loss"] == some[-1]["loss"]
    assert f"loss {means[-1]:.4f}" in ended.out + ended.err


def test_a_start_names_what_does_not_go_together(tmp_path):
    """End tokens of model and tokenizer, a tokenizer with more tokens than the model has rows, a warm-up
    longer than the run, options that nothing reads."""
    data, tokenizer = runs.corpus(tmp_path), tmp_path / "tokenizer"
    added = AutoTokenizer.from_pretrained(data / "tokenizer")
    added.add_tokens(["<|new|>"])
    added.save_pretrained(tokenizer)
    settings = schema.DataConfig(
        path=str(tmp_path / "more"),
        source=[str(tmp_path / "text")],
        tokenizer=str(tokenizer),
        eval_fraction=0.0,
    )
    options = {"train__steps": 1, "model__config__eos_token_id": 2, "schedule__warmup_steps": 5}
    options |= {"precision__min_scale": 4, "precision__monitor_modules": "['*.mpl.*']"}
    ended = runs.finished(
        1, runs.arguments(tmp_path / "run", prepare(settings, options=schema.PrepareConfig()), **options)
    )
    said = ended.out + ended.err
    assert "tokenizer config.json ends texts with [2], the tokenizer with 0" in said
    assert "precision.min_scale=4.0 does nothing: no loss scale adapts" in said
    assert "precision.monitor_modules=['*.mpl.*'] does nothing: precision.monitor_every is 0" in said
    assert (
        "tokenizer it has 301 tokens, the model's embedding 300 rows: the model cannot read the other tokens"
        in said
    )
    assert "schedule.warmup_steps=5: the run ends before its warm-up does" in said


def stage_lines(*words: str, micro_batches: int, can: tuple[str, ...]) -> list[str]:
    config = train_config(
        ["model=qwen3_0_6b", "data.path=there", "train.steps=1", "data.seq_len=1024", *words]
    )
    layout = layouts.resolve(config.parallel, world_size=config.parallel.pp)
    plan = BatchPlan(1, 1024, micro_batches, micro_batches)
    job = SimpleNamespace(config=config, layout=layout, plan=plan, facts=facts_of(config.model))
    return startup_log._stage_lines(job, schedules=frozenset(can))


def test_a_start_tells_the_layers_of_each_rank_and_what_more_stages_would_save():
    words, both = ("parallel=pp2", "parallel.pp=4"), ("1f1b", "interleaved_1f1b")
    told = "layers 0-8, 9-17, 18-26, 27; with the head, the heaviest rank is 5.1% above the mean"
    assert stage_lines(*words, micro_batches=16, can=both) == [told]
    [_, saved] = stage_lines("parallel=pp2", micro_batches=2, can=both)
    assert "parallel.virtual_stages=2 would take about 16% less time" in saved
    assert len(stage_lines("parallel=pp2", micro_batches=2, can=("1f1b",))) == 1
    [told] = stage_lines("parallel=pp2_zbv", "parallel.cut=[7,14,21]", micro_batches=4, can=both)
    assert told.startswith("layers 0-6 + 21-27, 7-13 + 14-20; with the head, the heaviest rank is ")
    assert stage_lines("parallel=single", micro_batches=4, can=both) == []


def test_garbage_is_collected_at_certain_steps_only():
    assert gc.isenabled()
    with GarbageCollection() as garbage:
        garbage.after(3)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        before = gc.get_stats()[1]["collections"]
        for step in range(4, 101):
            garbage.after(step)
        assert gc.get_stats()[1]["collections"] == before + 2  # at 50 and 100
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
