"""train.samples: what the model under training makes of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hybridtrain as ht
from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.evaluate.generate import sample
from hybridtrain.export import hf
from tests.runs import arguments, assert_equal_state, finished, four_parts, on_this_rank, rows
from tests.user_rows import Numbers, config_of

PROMPTS = ["number 4 follows", "", "number 12"]
SAMPLES: dict[str, Any] = {"train__samples": json.dumps(PROMPTS), "train__sample_tokens": 6}
OPTIONS: dict[str, Any] = {
    "train__eval_every": 2,
    "train__eval_rows": 8,
    "train__steps": 4,
    "train__log_every": 2,
    "checkpoint__every": 2,
    "checkpoint__keep_last": 0,
    "model__config__initializer_range": 0.2,
    "model__config__attention_dropout": 0.1,
    "model__attention": "eager",
    "optim__ema": 0.9,
}
NO_AVERAGE = {"optim__ema": 0, "model__config__attention_dropout": 0.0, "model__attention": "sdpa"}


def texts(run: Path) -> dict[int, list[str]]:
    """Step -> the texts, in samples.jsonl."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        assert [each["prompt"] for each in line["samples"]] == PROMPTS
    return {line["step"]: [each["text"] for each in line["samples"]] for line in lines}


def generated(run: Path, step: int) -> list[str]:
    """Greedy continuations by transformers, of the export of a checkpoint."""
    source = hf.export(
        run / f"checkpoints/step-{step:08d}",
        run=hf.SourceRun(run, hf.compose.read_run(run / "config.yaml")),
        out=run / f"export-{step}",
        dtype="float32",
        which="last",
        merge=False,
        max_shard_bytes=1 << 30,
    )
    options = schema.GenerateConfig(max_new_tokens=6, temperature=0.0)
    more = {"inference": schema.InferenceConfig(), "seed": 0, "trust_remote_code": False}
    return sample(source, prompts=PROMPTS, options=options, **more)


def check(world_size: int, data: Path, folder: Path, **options: object) -> None:
    """Samples are what transformers generates, and training is as without them, bit for bit."""
    given = {**OPTIONS, **options}
    finished(world_size, arguments(folder / "run", data, **given, **SAMPLES))
    found = texts(folder / "run")
    assert found == {step: generated(folder / "run", step) for step in (2, 4)}
    assert len({text for step in found.values() for text in step}) >= 4  # a model of one answer shows nothing
    finished(world_size, arguments(folder / "plain", data, **given))
    assert not (folder / "plain/samples.jsonl").exists()
    assert rows(folder / "run") == rows(folder / "plain")
    last = "checkpoints/step-00000004"
    assert_equal_state(folder / "run" / last, folder / "plain" / last)


def test_samples_of_a_pipeline_are_those_of_transformers(data: Path, tmp_path: Path) -> None:
    check(2, data, tmp_path, parallel="pp2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, {"parallel": "tp2"}),  # each rank has a part of the vocabulary
        (2, {"parallel": "zero3", "batch__micro_batch_size": 2}),
        (4, {"parallel": "zero1_pp2", "parallel__schedule": "zbv_zero_bubble", "data__seq_len": 64}),
        (2, {"parallel": "tp2", "engine": "deepspeed", **NO_AVERAGE}),
        (2, {"parallel": "zero3", "engine": "deepspeed", **NO_AVERAGE}),
        (2, {"parallel": "pp2", "engine": "deepspeed", **NO_AVERAGE}),
    ],
    ids=lambda value: (
        str(value["parallel"]) + str(value.get("engine", "")) if isinstance(value, dict) else ""
    ),
)
def test_samples_of_other_layouts_are_those_of_transformers(
    data: Path, tmp_path: Path, world_size: int, options: dict[str, Any]
) -> None:
    check(world_size, data, tmp_path, **options)


def test_a_text_ends_at_an_end_token(tmp_path: Path) -> None:
    documents = [json.dumps({"text": f"{number} one two"}) for number in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(documents))
    given = schema.DataConfig(
        path=str(tmp_path / "data"), source=[str(tmp_path / "text.jsonl")], vocab_size=300, eval_fraction=0.2
    )
    data = prepare(given, options=schema.PrepareConfig())
    options = {**OPTIONS, **NO_AVERAGE, **SAMPLES, "train__samples": '["7 one"]', "optim__lr": 0.02}
    finished(1, arguments(tmp_path / "run", data, **{**options, "train__steps": 16, "train__eval_every": 8}))
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 16]
    assert lines[-1]["samples"] == [{"prompt": "7 one", "text": " two"}]


def refused(argv: list[str]) -> str:
    ended = on_this_rank(argv)
    assert ended.code == 2, ended
    return four_parts(ended.err, "train.samples")


def test_prompts_that_nothing_continues_are_refused(data: Path, tmp_path: Path) -> None:
    def of(**options: object) -> list[str]:
        return arguments(tmp_path / "run", data, **{**OPTIONS, **SAMPLES, **options})

    assert "there are none" in refused(of(train__eval_every=0))
    long = refused(of(train__sample_tokens=30))
    assert "tokens and train.sample_tokens=30 are more than a row, data.seq_len=32" in long
    bert = [
        "--config-dir",
        "conf",
        "experiment=bert",
        "task.next_sentence=false",
        f"data.path={data}",
        "train.samples=[ab]",
    ]
    assert "an encoder, which writes no text" in refused([*bert, f"run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
    config = config_of(tmp_path / "run", "train.samples=[ab]", "train.eval_every=2")
    with pytest.raises(ht.UserError, match="the data have no tokenizer"):
        ht.Trainer(config, data=Numbers(100, first=0), eval_data=Numbers(8, first=1)).fit()
