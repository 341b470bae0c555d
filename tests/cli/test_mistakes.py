"""Mistakes in the command line: each is answered once and at once, with what to write instead."""

import time

import pytest

from hybridtrain.cli.main import main
from hybridtrain.runtime import launch
from tests.cli.lines import TRAIN, python, refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["runs", "train.steps=5"],
            [
                "train.steps=5: no such option of `hybridtrain runs`",
                "allowed: sections runs",
                "hybridtrain train, parity, bench, evaluate, compare, quantize, submit",
            ],
        ),
        (["runs", "train.stepz=5"], ["no such option", "hybridtrain train, parity"]),
        (["logs", "run.seed=3"], ["run.seed=3: no such option of `hybridtrain logs`", "hybridtrain train,"]),
        (["verify", "model.config.x=3"], ["no such option of `hybridtrain verify`"]),
        (
            ["prepare", "parallel.tp=2"],
            ["no such option of `hybridtrain prepare`", "allowed: sections prepare, data"],
        ),
        (["export", "model=tiny"], ["no such option of `hybridtrain export`", "allowed: groups experiment"]),
        (
            ["train", "cluster=gpu8"],
            ["no such option of `hybridtrain train`", "try:     hybridtrain submit cluster"],
        ),
        (
            ["train", "cluster.environment.A=b"],
            ["no such option of `hybridtrain train`", "try:     hybridtrain submit cluster"],
        ),
    ],
)
def test_an_option_of_another_command_is_refused_with_the_commands_that_have_it(capsys, argv, words):
    said = refused(capsys, argv)
    assert all(word in said for word in words), said


def test_a_file_or_a_run_in_place_of_options_is_told_where_it_goes(capsys, tmp_path):
    assert "try:     a file of options is an experiment: FOLDER/experiment/mine.yaml" in refused(
        capsys, ["train", "mine.yaml"]
    )
    assert f"try:     run.dir={tmp_path} after the options" in refused(capsys, ["train", str(tmp_path)])
    assert f"try:     model.from_pretrained={tmp_path}\n" in refused(capsys, ["inspect", str(tmp_path)])
    (tmp_path / "config.yaml").touch()
    assert f"try:     model.from_pretrained={tmp_path / 'export'}\n" in refused(
        capsys, ["inspect", str(tmp_path)]
    )


MISTAKES = {
    "no model to inspect": (["inspect"], ["model=(none): no model chosen", "try:     model=nano, "]),
    "unknown command": (["trian"], ["no command 'trian'", "try:     hybridtrain train"]),
    "unknown section": (
        ["train", "trian.steps=5"],
        ["trian.steps=5: no such option", "try:     train.steps=VALUE"],
    ),
    "unknown option": (
        ["train", "train.step=5"],
        ["train.step=5: no such option", "allowed: train: steps, tokens", "try:     train.steps=VALUE"],
    ),
    "option without its section": (["train", "lr=5"], ["try:     optim.lr=VALUE"]),
    "almost an option without its section": (["train", "warmup=5"], ["try:     schedule.warmup_steps=VALUE"]),
    "a section as an option": (["train", "batch=5"], ["batch is a section", "batch.global_batch_size"]),
    "another command's section": (
        ["train", "export.dtype=float32"],
        [
            "export.dtype=float32: no such option of `hybridtrain train`",
            "try:     hybridtrain export export.dtype=float32",
        ],
    ),
    "an option of submit": (
        ["train", "cluster.nodes=2"],
        [
            "cluster.nodes=2: no such option of `hybridtrain train`",
            "try:     hybridtrain submit cluster.nodes=2",
        ],
    ),
    "a free option of submit": (
        ["bench", "cluster.environment.A=b"],
        ["try:     hybridtrain submit cluster.environment.A=b"],
    ),
    "null for a list": (
        ["train", "optim.betas=null"],
        ["optim.betas=null", "try:     optim.betas=[0.9, 0.95]"],
    ),
    "unknown file of a group": (
        ["train", "parallel=tp3"],
        ["there is no parallel/tp3.yaml", "zero1_tp2_pp2", "try:     parallel=tp"],
    ),
    "the name of a plugin as a file": (
        ["train", "schedule=onecycle"],
        ["schedule=onecycle: there is no", "schedule.kind=onecycle, if a module of run.plugins"],
    ),
    "a file of a group with a slip": (
        ["train", "schedule=cosin"],
        ["there is no schedule/cosin.yaml", "try:     schedule=cosine\n"],
    ),
    "a group set to nothing": (
        ["train", "optim=null"],
        [
            "optim=null: no file is chosen",
            "allowed: adafactor, adamw",
            "try:     no optim= at all, or optim=adafactor",
        ],
    ),
    "a file of a group in capitals": (
        ["train", "engine=NULL"],
        ["there is no engine/NULL.yaml", "allowed: deepspeed, torch"],
    ),
    "a group set to empty": (["train", "parallel="], ["parallel='': no file is chosen", "allowed: ddp, "]),
    "a group set to an empty list": (["train", "schedule=[]"], ["schedule=[]: no file is chosen"]),
    "a group set to a list of nothing": (
        ["train", "model=[tiny,null]"],
        ["model=[tiny,null]: no file is chosen", "tiny, null"],
    ),
    "the cluster set to nothing": (["submit", "cluster=null"], ["cluster=null: no file is chosen", "gpu8"]),
    "a group of Hydra's set to nothing": (
        ["train", "hydra/launcher=null"],
        ["hydra/launcher=null: no file is chosen"],
    ),
    "no equals sign": (["train", "quick"], ["argument=quick: not an override"]),
    "unknown flag": (["train", "--verbose"], ["argument=--verbose: no such flag"]),
    "unknown thing to show": (["train", "--cfg", "hydra"], ["--cfg=hydra", "allowed: job"]),
    "word for a number": (
        ["train", "train.steps=abc"],
        ["train.steps=abc", "allowed: a value of type int", "try:     train.steps="],
    ),
    "word in a list of numbers": (["train", "optim.betas=[0.9,x]"], ["optim.betas[1]=x", "list[float]"]),
    "list for a string": (["train", "run.name=[a]"], ["run.name", "a value of type str"]),
    "sweep without multirun": (["train", "experiment=smoke,quickstart"], ["--multirun"]),
    "environment variable that is not set": (
        ["train", "run.name=${oc.env:NOT_SET_ANYWHERE}"],
        ["run.name", "NOT_SET_ANYWHERE"],
    ),
    "LoRA section": (["train", "lora.rank=8"], ["lora.rank=8", "no such option", "try:     adapters=lora"]),
    "LoRA in the model": (
        [*TRAIN, "model.config.lora_rank=8"],
        ["model.config.lora_rank=8", "try:     adapters=lora"],
    ),
    "adapters of new weights": (
        [*TRAIN, "adapters=lora"],
        ["model.from_pretrained=''", "would be new, random ones"],
    ),
    "adapters without rank": ([*TRAIN, "adapters=lora", "adapters.rank=0"], ["adapters.rank=0"]),
    "no kind of adapters": ([*TRAIN, "adapters.kind=dora"], ["adapters.kind=dora", "none, lora"]),
    "options of no adapters": ([*TRAIN, "adapters.rank=8"], ["it does nothing: adapters.kind is none"]),
    "no format of frozen weights": (
        [*TRAIN, "adapters=lora", "adapters.base_format=int4"],
        ["adapters.base_format=int4", "none, nf4, int8"],
    ),
    "frozen weights in codes and products in fp8": (
        [*TRAIN, "adapters=lora", "adapters.base_format=nf4", "precision.compute=fp8_tensorwise"],
        ["precision.compute=fp8_tensorwise", "stored in codes"],
    ),
    "adapters and frozen weights": (
        [*TRAIN, "adapters=lora", "model.freeze=['*.mlp.*']"],
        ["model.freeze=", "all parameters of the model are frozen"],
    ),
    "adapters with muon": ([*TRAIN, "adapters=lora", "optim=muon"], ["optim.kind=muon"]),
    "adapters on added tokens": (
        [*TRAIN, "adapters=lora", "model.from_pretrained=x/y", "model.config.vocab_size=9"],
        ["model.config.vocab_size=9", "rows of added tokens"],
    ),
    "quantized weights": (
        [*TRAIN, "model.config.quantization_config={bits: 4}"],
        ["model.config.quantization_config", "not supported yet"],
    ),
    "no model": (["train", "data.path=x", "train.steps=1"], ["model=(none)", "model=nano"]),
    "no architecture": (
        ["train", "data.path=x", "train.steps=1", "model.config.hidden_size=8"],
        ["model.config.model_type=(missing)"],
    ),
    "no data": (["train", "model=tiny", "train.steps=1"], ["data.path=''"]),
    "nothing to prepare": (
        ["prepare", "data.path=x"],
        ["data.source=[]", "try:     data.source=[YOUR TEXT]"],
    ),
    "no end": (["train", "model=tiny", "data.path=x"], ["the run has no end", "train.steps=1000"]),
    "two ends": ([*TRAIN, "train.tokens=5"], ["the run has several ends", "train.steps=100, train.tokens=5"]),
    "negative end": (
        ["train", "model=tiny", "data.path=x", "train.steps=-1"],
        ["train.steps=-1: out of range"],
    ),
    "engine that nobody has": ([*TRAIN, "engine.kind=jax"], ["engine.kind=jax", "allowed: torch, deepspeed"]),
    "compile backend": (
        [*TRAIN, "engine.compile_backend=nvfuser"],
        ["engine.compile_backend=nvfuser", "aot_eager"],
    ),
    "precision": ([*TRAIN, "precision.kind=fp8"], ["precision.kind=fp8", "bf16_mixed"]),
    "optimizer": ([*TRAIN, "optim.kind=soap"], ["optim.kind=soap", "adamw"]),
    "schedule": ([*TRAIN, "schedule.kind=sqrt"], ["schedule.kind=sqrt", "wsd"]),
    "recompute": ([*TRAIN, "recompute.kind=some"], ["recompute.kind=some", "selective"]),
    "resume": ([*TRAIN, "run.resume=yes"], ["run.resume", "auto, never, required"]),
    "attention": ([*TRAIN, "model.attention=flash"], ["model.attention=flash", "sdpa, eager"]),
    "pipeline schedule": ([*TRAIN, "parallel.schedule=2f2b"], ["parallel.schedule=2f2b", "zbv_zero_bubble"]),
    "ZeRO stage": ([*TRAIN, "parallel.zero_stage=4"], ["parallel.zero_stage=4", "0, 1, 2, 3"]),
    "tracker": ([*TRAIN, "tracker.kinds=[mlflo]"], ["no tracker 'mlflo'", "tensorboard"]),
    "learning rate": ([*TRAIN, "optim.lr=0"], ["optim.lr=0"]),
    "infinite learning rate": ([*TRAIN, "optim.lr=inf"], ["optim.lr=inf"]),
    "betas": ([*TRAIN, "optim.betas=[0.9,1.0]"], ["optim.betas=[0.9, 1.0]"]),
    "three betas": ([*TRAIN, "optim.betas=[0.9,0.9,0.9]"], ["not two decay rates"]),
    "eps": ([*TRAIN, "optim.eps=0"], ["optim.eps=0"]),
    "weight decay": ([*TRAIN, "optim.weight_decay=-1"], ["optim.weight_decay=-1"]),
    "clip": ([*TRAIN, "optim.clip=-1"], ["optim.clip=-1"]),
    "decay without wsd": ([*TRAIN, "schedule.decay_steps=5"], ["schedule.kind=cosine has no such phase"]),
    "decay too long": (
        [*TRAIN, "schedule=wsd", "schedule.warmup_steps=60", "schedule.decay_steps=60"],
        ["60 warm-up + 60 decay steps exceed the run's 100"],
    ),
    "min_lr_ratio": ([*TRAIN, "schedule.min_lr_ratio=1.5"], ["schedule.min_lr_ratio=1.5"]),
    "first loss scale": (
        [*TRAIN, "precision=fp16_mixed", "precision.init_scale=0.5"],
        ["precision.init_scale=0.5"],
    ),
    "growth": ([*TRAIN, "precision.growth_factor=1"], ["precision.growth_factor=1"]),
    "back-off": ([*TRAIN, "precision.backoff_factor=1"], ["precision.backoff_factor=1"]),
    "growth interval": ([*TRAIN, "precision.growth_interval=0"], ["precision.growth_interval=0"]),
    "static loss scale": (
        [*TRAIN, "precision=fp16_mixed", "precision.static_scale=0"],
        ["precision.static_scale=0"],
    ),
    "hysteresis": ([*TRAIN, "precision.hysteresis=0"], ["precision.hysteresis=0"]),
    "loss scale floor": ([*TRAIN, "precision.min_scale=0"], ["precision.min_scale=0"]),
    "log_every": ([*TRAIN, "train.log_every=0"], ["train.log_every=0"]),
    "keep_last": ([*TRAIN, "checkpoint.keep_last=-1"], ["checkpoint.keep_last=-1"]),
    "eval_fraction": (
        ["prepare", "data.path=x", "data.source=[y]", "data.eval_fraction=1"],
        ["data.eval_fraction=1"],
    ),
    "vocabulary below the bytes": (
        ["prepare", "data.path=x", "data.source=[y]", "data.vocab_size=200"],
        ["data.vocab_size=200", "above 256"],
    ),
    "export dtype": (["export", "runs/x", "export.dtype=bf16"], ["export.dtype=bf16", "bfloat16"]),
    "shard size": (["export", "runs/x", "export.max_shard_gb=0"], ["export.max_shard_gb=0"]),
    "rows": (["evaluate", "runs/x", "evaluate.rows=-1"], ["evaluate.rows=-1"]),
    "temperature": (["generate", "runs/x", "generate.temperature=-1"], ["generate.temperature=-1"]),
    "top_p": (["generate", "runs/x", "generate.top_p=0"], ["generate.top_p=0"]),
    "new tokens": (["generate", "runs/x", "generate.max_new_tokens=0"], ["generate.max_new_tokens=0"]),
    "parity steps": (["parity", *TRAIN[1:], "parity.steps=0"], ["parity.steps=0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(capsys, mistake):
    argv, expected = MISTAKES[mistake]
    text = refused(capsys, argv)
    assert "allowed: " in text or "does not compose" in text
    for words in expected:
        assert words in text


@pytest.mark.parametrize("mistake", ["unknown option", "word for a number", "two ends"])
def test_a_mistake_is_answered_within_two_seconds_and_without_torch(mistake):
    argv, expected = MISTAKES[mistake]
    script = f"""
import sys, time
begin = time.monotonic()
from hybridtrain.cli.main import main
code = main({argv!r})
assert code == 2, code
assert not {{"torch", "transformers", "accelerate", "numpy"}} & set(sys.modules)
assert time.monotonic() - begin < 2
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert expected[0] in done.stderr


def test_other_ranks_keep_silent_about_a_mistaken_command_line_and_let_rank_0_speak(capsys, monkeypatch):
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "RANK_0_FIRST_S", 0.3)
    begin = time.monotonic()
    assert main(["train", "train.step=5"]) == 2
    assert time.monotonic() - begin >= 0.3
    assert main(["train", "--help"]) == 0
    assert main(["train", "--cfg", "job"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_mistake_that_only_another_rank_meets_is_said_by_it(capsys, monkeypatch, run_dir):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(launch, "RANK_0_FIRST_S", 0.0)
    assert main(["export", str(run_dir)]) == 2  # no such run: known only while the command runs
    assert capsys.readouterr().err.startswith("[rank 1] hybridtrain export: ")


def test_under_torchrun_a_mistake_is_said_once():
    done = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "hybridtrain.cli",
        "train",
        "train.step=5",
    )
    assert done.returncode != 0
    assert (
        sum(
            line.startswith("hybridtrain train: train.step=5: no such option")
            for line in done.stderr.splitlines()
        )
        == 1
    )
