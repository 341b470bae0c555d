"""The command line as a user meets it: help, composed config, mistakes answered once and fast, rank 0 alone speaking."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridtrain import __version__
from hybridtrain.cli import commands
from hybridtrain.cli.main import main
from hybridtrain.config import compose, keys, schema
from hybridtrain.config.sweep import sweep
from hybridtrain.run import entry as entries
from hybridtrain.runtime import launch
from hybridtrain.training import trainer
from tests.runs import arguments

TRAIN = ["train", "model=tiny", "data.path=x", "train.steps=100"]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run `argv`, expect exit code 2 and one message on stderr, and return it."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120)


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in commands.COMMANDS)
    assert set(commands.COMMANDS) == set(schema.ROOTS)
    assert main([]) == 2
    capsys.readouterr()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybridtrain {__version__}\n"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_a_command_explains_its_own_options_and_groups_alone(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    options = [field for fields in keys.sections(name).values() for field in fields]
    assert all(f"  {field.key}" in text and field.doc in words for field in options)
    groups = {group: files for group, files in keys.groups([keys.shipped()]).items() if group in ("experiment", *keys.sections(name))}
    assert all(f"{group} {', '.join(files)}" in words for group, files in groups.items())
    entries = [line.split()[0] for line in text.partition("\ngroups ")[2].splitlines()[1:] if re.match(r"  \S", line)]
    assert entries == [*groups, *(field.key for field in options)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["runs", "train.steps=5"],
            ["train.steps=5: no such option of `hybridtrain runs`", "allowed: sections runs", "hybridtrain train, parity, bench, evaluate, submit"],
        ),
        (["runs", "train.stepz=5"], ["no such option", "hybridtrain train, parity"]),
        (["logs", "run.seed=3"], ["run.seed=3: no such option of `hybridtrain logs`", "hybridtrain train,"]),
        (["verify", "model.config.x=3"], ["no such option of `hybridtrain verify`"]),
        (["prepare", "parallel.tp=2"], ["no such option of `hybridtrain prepare`", "allowed: sections prepare, data"]),
        (["export", "model=tiny"], ["no such option of `hybridtrain export`", "allowed: groups experiment"]),
        (["train", "cluster=gpu8"], ["no such option of `hybridtrain train`", "try:     hybridtrain submit cluster"]),
        (["train", "cluster.environment.A=b"], ["no such option of `hybridtrain train`", "try:     hybridtrain submit cluster"]),
    ],
)
def test_an_option_of_another_command_is_refused_with_the_commands_that_have_it(capsys, argv, words):
    said = refused(capsys, argv)
    assert all(word in said for word in words), said


def test_a_file_or_a_run_in_place_of_options_is_told_where_it_goes(capsys, tmp_path):
    assert "try:     a file of options is an experiment: FOLDER/experiment/mine.yaml" in refused(capsys, ["train", "mine.yaml"])
    assert f"try:     run.dir={tmp_path} after the options" in refused(capsys, ["train", str(tmp_path)])


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_its_function(name):
    module, function, _ = commands.COMMANDS[name]
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is not there"
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(found.args.args) == 1


def test_cfg_job_prints_what_composes(capsys):
    assert main(["train", "experiment=smoke", "train.steps=3", "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "  steps: 3\n" in text
    assert "  dir: runs/smoke\n" in text
    assert main(["export", "runs/mine run", "--cfg=job"]) == 0
    assert "  dir: runs/mine run\n" in capsys.readouterr().out


MISTAKES = {
    "unknown command": (["trian"], ["no command 'trian'", "try:     hybridtrain train"]),
    "unknown section": (["train", "trian.steps=5"], ["trian.steps=5: no such option", "try:     train.steps=VALUE"]),
    "unknown option": (["train", "train.step=5"], ["train.step=5: no such option", "allowed: train: steps, tokens", "try:     train.steps=VALUE"]),
    "option without its section": (["train", "lr=5"], ["try:     optim.lr=VALUE"]),
    "almost an option without its section": (["train", "warmup=5"], ["try:     schedule.warmup_steps=VALUE"]),
    "a section as an option": (["train", "batch=5"], ["batch is a section", "batch.global_batch_size"]),
    "another command's section": (
        ["train", "export.dtype=float32"],
        ["export.dtype=float32: no such option of `hybridtrain train`", "try:     hybridtrain export export.dtype=float32"],
    ),
    "an option of submit": (
        ["train", "cluster.nodes=2"],
        ["cluster.nodes=2: no such option of `hybridtrain train`", "try:     hybridtrain submit cluster.nodes=2"],
    ),
    "a free option of submit": (["bench", "cluster.environment.A=b"], ["try:     hybridtrain submit cluster.environment.A=b"]),
    "null for a list": (["train", "optim.betas=null"], ["optim.betas=null", "try:     optim.betas=[0.9, 0.95]"]),
    "unknown file of a group": (["train", "parallel=tp3"], ["there is no parallel/tp3.yaml", "zero1_tp2_pp2", "try:     parallel=tp"]),
    "the name of a plugin as a file": (
        ["train", "schedule=onecycle"],
        ["schedule=onecycle: there is no", "schedule.kind=onecycle, if a module of run.plugins"],
    ),
    "a file of a group with a slip": (["train", "schedule=cosin"], ["there is no schedule/cosin.yaml", "try:     schedule=cosine\n"]),
    "a group set to nothing": (["train", "optim=null"], ["optim=null: no file is chosen", "allowed: adamw", "try:     no optim= at all, or optim=adamw"]),
    "a file of a group in capitals": (["train", "engine=NULL"], ["there is no engine/NULL.yaml", "allowed: deepspeed, torch"]),
    "a group set to empty": (["train", "parallel="], ["parallel='': no file is chosen", "allowed: ddp, "]),
    "a group set to an empty list": (["train", "schedule=[]"], ["schedule=[]: no file is chosen"]),
    "a group set to a list of nothing": (["train", "model=[tiny,null]"], ["model=[tiny,null]: no file is chosen", "tiny, null"]),
    "the cluster set to nothing": (["submit", "cluster=null"], ["cluster=null: no file is chosen", "gpu8"]),
    "a group of Hydra's set to nothing": (["train", "hydra/launcher=null"], ["hydra/launcher=null: no file is chosen"]),
    "no equals sign": (["train", "quick"], ["argument=quick: not an override"]),
    "unknown flag": (["train", "--verbose"], ["argument=--verbose: no such flag"]),
    "unknown thing to show": (["train", "--cfg", "hydra"], ["--cfg=hydra", "allowed: job"]),
    "word for a number": (["train", "train.steps=abc"], ["train.steps=abc", "allowed: a value of type int", "try:     train.steps="]),
    "word in a list of numbers": (["train", "optim.betas=[0.9,x]"], ["optim.betas[1]=x", "list[float]"]),
    "list for a string": (["train", "run.name=[a]"], ["run.name", "a value of type str"]),
    "sweep without multirun": (["train", "experiment=smoke,quickstart"], ["--multirun"]),
    "environment variable that is not set": (["train", "run.name=${oc.env:NOT_SET_ANYWHERE}"], ["run.name", "NOT_SET_ANYWHERE"]),
    "LoRA section": (["train", "lora.rank=8"], ["lora.rank=8", "not supported yet", "model.freeze"]),
    "LoRA in the model": ([*TRAIN, "model.config.lora_rank=8"], ["model.config.lora_rank=8", "not supported yet"]),
    "quantised weights": ([*TRAIN, "model.config.quantization_config={bits: 4}"], ["model.config.quantization_config", "not supported yet"]),
    "no model": (["train", "data.path=x", "train.steps=1"], ["model=(none)", "model=nano"]),
    "no architecture": (["train", "data.path=x", "train.steps=1", "model.config.hidden_size=8"], ["model.config.model_type=(missing)"]),
    "no data": (["train", "model=tiny", "train.steps=1"], ["data.path=''"]),
    "nothing to prepare": (["prepare", "data.path=x"], ["data.source=[]", "try:     data.source=[YOUR TEXT]"]),
    "no end": (["train", "model=tiny", "data.path=x"], ["the run has no end", "train.steps=1000"]),
    "two ends": ([*TRAIN, "train.tokens=5"], ["the run has several ends", "train.steps=100, train.tokens=5"]),
    "negative end": (["train", "model=tiny", "data.path=x", "train.steps=-1"], ["train.steps=-1: out of range"]),
    "engine that nobody has": ([*TRAIN, "engine.kind=jax"], ["engine.kind=jax", "allowed: torch, deepspeed"]),
    "compile backend": ([*TRAIN, "engine.compile_backend=nvfuser"], ["engine.compile_backend=nvfuser", "aot_eager"]),
    "precision": ([*TRAIN, "precision.kind=fp8"], ["precision.kind=fp8", "bf16_mixed"]),
    "optimizer": ([*TRAIN, "optim.kind=sgd"], ["optim.kind=sgd", "adamw"]),
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
    "decay too long": ([*TRAIN, "schedule=wsd", "schedule.warmup_steps=60", "schedule.decay_steps=60"], ["60 warm-up + 60 decay steps exceed the run's 100"]),
    "min_lr_ratio": ([*TRAIN, "schedule.min_lr_ratio=1.5"], ["schedule.min_lr_ratio=1.5"]),
    "first loss scale": ([*TRAIN, "precision=fp16_mixed", "precision.init_scale=0.5"], ["precision.init_scale=0.5"]),
    "growth": ([*TRAIN, "precision.growth_factor=1"], ["precision.growth_factor=1"]),
    "back-off": ([*TRAIN, "precision.backoff_factor=1"], ["precision.backoff_factor=1"]),
    "growth interval": ([*TRAIN, "precision.growth_interval=0"], ["precision.growth_interval=0"]),
    "loss scale floor": ([*TRAIN, "precision.min_scale=0"], ["precision.min_scale=0"]),
    "log_every": ([*TRAIN, "train.log_every=0"], ["train.log_every=0"]),
    "keep_last": ([*TRAIN, "checkpoint.keep_last=-1"], ["checkpoint.keep_last=-1"]),
    "eval_fraction": (["prepare", "data.path=x", "data.source=[y]", "data.eval_fraction=1"], ["data.eval_fraction=1"]),
    "vocabulary below the bytes": (["prepare", "data.path=x", "data.source=[y]", "data.vocab_size=200"], ["data.vocab_size=200", "above 256"]),
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
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "SPEAK_FIRST_S", 0.3)
    begin = time.monotonic()
    assert main(["train", "train.step=5"]) == 2
    assert time.monotonic() - begin >= 0.3
    assert main(["train", "--help"]) == 0
    assert main(["train", "--cfg", "job"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_mistake_that_only_another_rank_meets_is_said_by_it(capsys, monkeypatch, run_dir):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(launch, "SPEAK_FIRST_S", 0.0)
    assert main(["export", str(run_dir)]) == 2  # no such run: known only while the command runs
    assert capsys.readouterr().err.startswith("[rank 1] hybridtrain export: ")


def test_under_torchrun_a_mistake_is_said_once():
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hybridtrain.cli", "train", "train.step=5")
    assert done.returncode != 0
    assert sum(line.startswith("hybridtrain train: train.step=5: no such option") for line in done.stderr.splitlines()) == 1


def test_multirun_is_refused_under_torchrun(capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "outside torchrun" in refused(capsys, ["train", "-m", "optim.lr=1,2"])


@pytest.mark.parametrize("name", ["train", "submit"])
def test_runs_of_a_sweep_do_not_share_a_folder(capsys, name):
    line = [name, "-m", "experiment=smoke", "optim.lr=1e-3,3e-4"]
    assert "run.dir=runs/all: one folder for several of 2 runs" in refused(capsys, [*line, "run.dir=runs/all"])
    assert [compose.compose(name, job).run.dir for job in sweep(name, [*line[2:], "run.dir='all/${run.name}'"])] == ["all/smoke-0", "all/smoke-1"]


@pytest.mark.slow
def test_a_sweep_ends_with_a_table(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [text for text in arguments(tmp_path, data, train__steps=2) if not text.startswith("run.dir=")]
    for rates, runs in (("1e-3,3e-4", ("sweep-0", "sweep-1")), ("2e-3,5e-4", ("sweep-0-2", "sweep-1-2")), ("2e-3,5e-4", ("sweep-0-2", "sweep-1-2"))):
        done = python("-m", "hybridtrain.cli", "train", "--multirun", *given, "run.name=sweep", f"optim.lr={rates}", PYTHONPATH=str(Path(__file__).parents[2]))
        assert done.returncode == 0, done.stderr
        assert all((tmp_path / "runs" / run / "config.yaml").is_file() for run in runs)
        table = done.stdout[done.stdout.rindex("[2/2] hybridtrain train") :].partition("\noptim.lr ")[2].partition("\n")[0]
        assert table.split() == [f"{float(rate):g}" for rate in rates.split(",")], "of these runs, not of those of before"


def test_a_run_of_a_sweep_tells_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(launch.ENTERED, str(tmp_path / "told"))
    for rate, folder in (("1e-3", "runs/x"), ("2e-3", "runs/x-2"), ("2e-3", "runs/x-2")):
        config = compose.compose("train", [*TRAIN[1:], "run.name=x", f"optim.lr={rate}"])
        entry = entries.enter(config)
        assert (tmp_path / "told").read_text() == folder
        (entry.path / "config.yaml").write_text(compose.to_yaml(config))
        (entry.path / "summary.json").write_text('{"steps": 100}')
        entry.lock.release()
    assert trainer._finished(config) == trainer.Result(Path("runs/x-2"), "finished", 100, 0), "what a run that was at its end gives back"


def test_multirun_runs_every_combination():
    done = python("-m", "hybridtrain.cli", "report", "-m", "run.dir=no-such-a,no-such-b")
    assert done.returncode != 0
    assert "[1/2] hybridtrain report run.dir=no-such-a" in done.stdout
    assert "[2/2] hybridtrain report run.dir=no-such-b" in done.stdout


LOGGING = """
import logging, warnings
from pathlib import Path
from hybridtrain.runtime import log
log.setup(None)
log.setup(Path("logs"))
log.get("loop").info("step 1")
log.get("hybridtrain.training.loop").error("it broke")
logging.getLogger("transformers.models").warning("chatter")
warnings.warn("old habits")
"""


def test_rank_0_speaks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = python("-c", LOGGING, RANK="0", PYTHONPATH=str(Path(__file__).parents[2]))
    assert done.stdout == "step 1\nerror: it broke\n"
    assert "old habits" in done.stderr
    lines = (tmp_path / "logs" / "rank-0.log").read_text()
    assert lines.count("step 1") == 1
    assert "hybridtrain.training.loop: it broke" in lines


def test_other_ranks_only_say_errors_and_who_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = python("-c", LOGGING, RANK="3", PYTHONPATH=str(Path(__file__).parents[2]))
    assert done.stdout == ""
    assert done.stderr == "[rank 3] ERROR hybridtrain.training.loop: it broke\n"
    lines = (tmp_path / "logs" / "rank-3.log").read_text()
    assert all(words in lines for words in ("step 1", "it broke", "chatter", "old habits"))


def test_a_process_leaves_with_its_output_and_exit_functions_but_is_not_taken_apart():
    """A gloo thread that lets go of a tensor while the interpreter is being taken apart aborts the process."""
    script = """
import atexit, os
from hybridtrain.cli import main
from hybridtrain.run import entry as entries
from hybridtrain.runtime import launch
from hybridtrain.training import trainer
class Apart:
    def __del__(self):
        os.write(1, b"taken apart")
kept = Apart()
atexit.register(print, "exit function")
main.main = lambda: 3
main.program()
"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (3, "exit function\n", "")
