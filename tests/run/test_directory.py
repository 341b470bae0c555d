"""The run directory: what continues a run, what is a new one, and the files that tools read."""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridtrain.config import compose
from hybridtrain.config.schema import Config
from hybridtrain.errors import UserError
from hybridtrain.run import directory, identity, start
from hybridtrain.run.record import METRICS, SUMMARY
from hybridtrain.runtime.files import unwritable, write_atomically
from hybridtrain.types import Progress


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run with the default directory, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    made = Config()
    made.run.name, made.run.dir = "trial", "runs/trial"
    made.model.config, made.data.path, made.train.steps = {"hidden_size": 64}, "data/a", 10
    return made


def newest(folder: Path) -> Path | None:
    return max(folder.glob("step-*"), default=None) if folder.is_dir() else None


def opened(config: Config) -> directory.RunDir:
    """The run directory, begun; its lock is given back at once, so that the next command can have it."""
    entry = start.lock_run(config)
    try:
        checkpoint = newest(entry.path / "checkpoints") if entry.before else None
        if config.run.resume == "required" and checkpoint is None:
            raise identity.not_resumable(entry.path, words="")
        return start.begin(
            entry,
            config,
            yaml_text=compose.to_yaml(config),
            versions={"torch": "2"},
            checkpoint=checkpoint,
            step=0,
        )
    finally:
        entry.leave()


def refusal_of(config: Config) -> str:
    with pytest.raises(UserError) as refused:
        opened(config)
    return str(refused.value)


def test_a_new_run_writes_its_config_and_a_running_summary(config: Config) -> None:
    run = opened(config)
    assert (run.path, run.continued, run.checkpoint, dict(run.changed)) == (
        Path("runs/trial"),
        False,
        None,
        {},
    )
    assert compose.read_run(run.path / "config.yaml") == config
    summary = json.loads((run.path / "summary.json").read_text())
    assert tuple(summary) == SUMMARY
    assert summary["status"] == "running"
    assert summary["versions"] == {"torch": "2"}
    assert summary["final_loss"] is None
    revision = summary["git_revision"]
    checkout = (Path(__file__).parents[2] / ".git").exists()
    assert len(revision.removesuffix("-dirty")) == 40 if checkout else revision is None


def test_the_same_command_continues_from_the_newest_checkpoint(config: Config) -> None:
    first = opened(config)
    again = opened(config)
    assert (again.path, again.continued, again.checkpoint) == (first.path, True, None)
    (first.checkpoints / "step-00000010").mkdir(parents=True)
    assert opened(config).checkpoint == first.checkpoints / "step-00000010"


def alter(config: Config, key: str, value: object) -> Config:
    changed = copy.deepcopy(config)
    section, _, field = key.partition(".")
    assert hasattr(getattr(changed, section), field)
    setattr(getattr(changed, section), field, value)
    return changed


NOT_IDENTITY = [
    ("parallel.tp", 2),
    ("engine.compile", True),
    ("precision.kind", "bf16_mixed"),
    ("train.steps", 20),
    ("checkpoint.every", 5),
]
NOT_IDENTITY += [
    ("tracker.kinds", ["wandb"]),
    ("batch.micro_batch_size", 2),
    ("recompute.kind", "full"),
    ("model.name", "label"),
]
IDENTITY = [
    ("model.config", {"hidden_size": 128}),
    ("model.freeze", ["*"]),
    ("data.path", "data/b"),
    ("data.seq_len", 128),
    ("optim.lr", 1.0),
]
IDENTITY += [
    ("schedule.kind", "linear"),
    ("run.seed", 1),
    ("batch.global_batch_size", 16),
    ("model.from_pretrained", "x"),
]


@pytest.mark.parametrize(("key", "value"), NOT_IDENTITY)
def test_what_is_not_identity_continues_the_run_and_is_told(config: Config, key: str, value: object) -> None:
    opened(config)
    changed = alter(config, key, value)
    run = opened(changed)
    assert (run.path, run.continued) == (Path("runs/trial"), True)
    section, _, field = key.partition(".")
    assert dict(run.changed) == {key: (getattr(getattr(config, section), field), value)}
    assert compose.read_run(run.path / "config.yaml") == changed
    assert not opened(changed).changed


@pytest.mark.parametrize(("key", "value"), IDENTITY)
def test_another_identity_is_a_new_run_with_a_number_which_it_finds_again(
    config: Config, key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    opened(config)
    other = alter(config, key, value)
    with caplog.at_level("INFO"):
        opened(other)
    assert f"runs/trial holds another run ({key}" in caplog.text
    assert (opened(other).path, opened(other).continued) == (Path("runs/trial-2"), True)
    assert opened(config).path == Path("runs/trial")
    third = alter(other, "optim.eps", 0.5)
    assert opened(third).path == Path("runs/trial-3")
    assert opened(other).path == Path("runs/trial-2")


@pytest.mark.parametrize(("key", "value"), IDENTITY)
def test_an_explicit_directory_of_another_run_is_refused_naming_the_field(
    config: Config, key: str, value: object, tmp_path: Path
) -> None:
    config.run.dir = str(tmp_path / "mine")
    before = opened(config)
    text = (before.path / "config.yaml").read_text()
    message = refusal_of(alter(config, key, value))
    assert (f"{key}.hidden_size was 64 and is 128" if key == "model.config" else f"{key} was") in message
    assert (before.path / "config.yaml").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_other_data_goes_on_in_the_run_when_asked_for_but_not_another_length(
    config: Config, tmp_path: Path
) -> None:
    config.run.dir = str(tmp_path / "mine")
    opened(config)
    other = alter(alter(config, "data.path", "data/b"), "run.allow_data_change", True)
    assert dict(opened(other).changed) == {"data.path": ("data/a", "data/b")}
    assert "data.seq_len" in refusal_of(alter(other, "data.seq_len", 8))


def test_the_rules_of_resume(config: Config) -> None:
    required, never = alter(config, "run.resume", "required"), alter(config, "run.resume", "never")
    assert "no complete checkpoint of this run" in refusal_of(required)
    assert not Path("runs").exists()
    opened(never)
    assert "holds a run already" in refusal_of(never)
    assert "no complete checkpoint" in refusal_of(required)
    Path("runs/trial/checkpoints/step-00000010").mkdir(parents=True)
    assert opened(required).checkpoint == Path("runs/trial/checkpoints/step-00000010")
    assert opened(alter(never, "run.seed", 5)).path == Path("runs/trial-2")


def test_a_folder_with_remains_but_no_config_is_refused(config: Config) -> None:
    Path("runs/trial/checkpoints").mkdir(parents=True)
    assert "no config.yaml" in refusal_of(config)


def test_a_folder_that_cannot_be_made_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "it is a file" in refusal_of(alter(config, "run.dir", str(tmp_path / "file")))
    assert "cannot be written" in refusal_of(alter(config, "run.dir", str(tmp_path / "file" / "run")))


def test_metrics_have_all_keys_and_null_for_what_is_not_a_number(config: Config) -> None:
    run = opened(config)
    run.append_metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    run.append_metrics({"step": 2, "loss": 0.1 + 0.2, "eval_loss": 3.0})
    first, second = map(json.loads, run.metrics.read_text().splitlines())
    assert tuple(first) == METRICS
    assert (first["loss"], first["grad_norm"], first["lr"], first["mfu"]) == (None, None, 0.5, None)
    assert second["loss"] == 0.1 + 0.2, "losses are compared bit for bit after a resume"
    assert second["eval_loss"] == 3.0


def test_cutting_keeps_the_steps_up_to_the_checkpoint_and_drops_a_torn_line(config: Config) -> None:
    run = opened(config)
    run.truncate(5)
    assert not run.metrics.exists()
    for step in range(1, 8):
        run.append_metrics({"step": step, "loss": step / 3})
    lines = run.metrics.read_text().splitlines(keepends=True)
    with run.metrics.open("a") as stream:
        stream.write("[" * 200_000 + '\n{"step": 3, "lo')
    run.truncate(5)
    assert run.metrics.read_text() == "".join(lines[:5])
    run.append_metrics({"step": 6})
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    run.truncate(0)
    assert run.metrics.read_text() == ""


def test_cutting_takes_away_the_samples_of_later_steps(config: Config) -> None:
    run = opened(config)
    for step in (4, 8):
        run.append_samples({"step": step, "time": 0.0, "samples": [{"prompt": "a", "text": "b"}]})
    run.truncate(5)
    assert [json.loads(line)["step"] for line in run.samples.read_text().splitlines()] == [4]


def test_a_cut_takes_away_the_events_that_come_again_and_keeps_starts_and_ends(config: Config) -> None:
    run = opened(config)
    for kind, step in (("started", 0), ("checkpoint", 5), ("skipped", 6), ("checkpoint", 8), ("failed", 9)):
        run.append_event(kind, step=step, detail=f"at {step}")
    with run.events.open("a") as stream:
        stream.write('{"time": 1, "st')
    run.truncate(5)
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [(event["kind"], event["step"], event["detail"]) for event in events] == [
        ("started", 0, "at 0"),
        ("checkpoint", 5, "at 5"),
        ("failed", 9, "at 9"),
    ]
    assert all(
        set(event) == {"time", "step", "kind", "detail"} and abs(event["time"] - time.time()) < 60
        for event in events
    )
    with pytest.raises(AssertionError):
        run.append_event("lunch", step=5, detail="")


def test_the_summary_takes_the_keys_of_the_interface_only(config: Config) -> None:
    run = opened(config)
    run.update_summary(status="finished", steps=10, final_loss=float("nan"), layout="pp2")
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["final_loss"], summary["layout"]) == (
        "finished",
        10,
        None,
        "pp2",
    )
    for wrong in ({"state": "x"}, {"status": "done"}):
        with pytest.raises(AssertionError):
            run.update_summary(**wrong)


def test_fingerprints() -> None:
    progress = Progress(7, 0, {"model": "m", "data": "d"})
    check: Callable[..., tuple[str, ...]] = functools.partial(
        identity.check_fingerprints, data=("data.path", "data/mine"), run=Path("runs/a")
    )
    assert check(progress, fingerprints={"model": "m", "data": "d"}, allow_data_change=False) == ()
    with pytest.raises(
        UserError,
        match=(
            r"data\.path=data/mine: the checkpoint of step 7 .*prepared again since.*"
            r"\(d then, e now\)[^$]*allow_data_change=true.*branch_from=runs/a"
        ),
    ):
        check(progress, fingerprints={"model": "m", "data": "e"}, allow_data_change=False)
    assert check(progress, fingerprints={"model": "m", "data": "e"}, allow_data_change=True) == ("data",)
    for model in ("n", None):
        with pytest.raises(UserError, match="of another model"):
            check(
                progress,
                fingerprints={"data": "d", **({"model": model} if model else {})},
                allow_data_change=True,
            )


@pytest.mark.parametrize(
    "name", ["model/config.json", "events.jsonl", "machine.json", "trackers/mine", "logs/rank-0.log", "lock"]
)
def test_a_folder_with_files_of_others_that_a_run_would_write_is_refused_and_stays(
    config: Config, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / "project" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    message = refusal_of(alter(config, "run.dir", str(tmp_path / "project")))
    assert "but no config.yaml" in message
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [
        mine.relative_to(tmp_path)
    ]


@pytest.mark.parametrize(
    "place", ["checkpoints", "checkpoints/step-00000004", "checkpoints/step-00000004/new/run"]
)
def test_a_run_among_the_checkpoints_of_another_would_be_removed_with_them(
    config: Config, tmp_path: Path, place: str
) -> None:
    other = opened(alter(config, "run.dir", str(tmp_path / "other")))
    (other.path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert "among the checkpoints of" in refusal_of(alter(config, "run.dir", str(other.path / place)))


def test_a_folder_with_other_files_and_with_logs_of_a_scheduler_is_taken(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "project" / "logs").mkdir(parents=True)
    (tmp_path / "project" / "logs" / "slurm-7.out").write_text("mine")
    (tmp_path / "project" / "train.py").write_text("mine")
    assert opened(alter(config, "run.dir", str(tmp_path / "project"))).path == tmp_path / "project"


def test_the_model_that_a_run_starts_from_is_not_written_over(config: Config) -> None:
    Path("runs/trial/model").mkdir(parents=True)
    Path("runs/trial/config.yaml").write_text(compose.to_yaml(config))
    assert "the model that it starts from" in refusal_of(
        alter(config, "model.from_pretrained", "runs/trial/model")
    )


def test_values_that_went_through_yaml_are_the_same_run(config: Config) -> None:
    config.model.config = {
        "eps": 1e-6,
        "theta": 10000,
        "list": [1, 2.5],
        "deep": {"x": float("nan")},
        "flag": True,
    }
    opened(config)
    same = alter(
        config,
        "model.config",
        {"eps": 0.000001, "theta": 10000.0, "list": (1, 2.5), "deep": {"x": float("nan")}, "flag": True},
    )
    assert opened(same).path == Path("runs/trial")
    assert opened(alter(config, "model.config", {**config.model.config, "flag": 1})).path == Path(
        "runs/trial-2"
    )


def test_attempts_are_counted_by_events_not_by_words(config: Config) -> None:
    run = opened(config)
    run.append_event("started", step=0, detail="")
    run.append_event("failed", step=0, detail='it said "kind": "started"')
    run.append_event("resumed", step=0, detail='"kind": "resumed"')
    with run.events.open("a") as stream:
        stream.write('{"kind": "started", "st')
    assert opened(config).attempt == 2
    run.append_event("finished", step=1, detail="")
    assert json.loads(run.events.read_text().splitlines()[-1])["kind"] == "finished", (
        "on a line of its own after a torn one"
    )


def test_a_folder_that_cannot_be_made_is_not_said_to_be_gone(tmp_path: Path) -> None:
    for path in (Path("/proc/x"), Path("/proc/x/y")):
        with pytest.raises(
            UserError, match=rf"run\.dir={path}: it cannot be written: nothing can be made in /proc"
        ):
            directory.make_folders(path)
    gone = tmp_path / "gone"
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(gone / "file", "")
    assert "it has been moved or removed" in str(unwritable("run.dir", gone, error.value))
