"""Trackers for real: files read back, servers that refuse or hang, a full disk.

Each run has a process of its own.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import pytest

from hybridtrain.run import trackers
from hybridtrain.run.trackers import kinds

TRACK = """
    import json, logging, os, resource, sys, time
    from pathlib import Path
    logging.basicConfig(level=logging.WARNING, format="LOG %(message)s", stream=sys.stdout)
    from hybridtrain.run import trackers
    from hybridtrain.run.trackers import Trackers
    {before}
    start = time.monotonic()
    tracking = Trackers()
    config = {"tracker": {"project": "proj"}, "run": {"name": "demo"}}
    config |= {"optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "hub": {"token": os.environ["A_TOKEN"]}}
    tracking.start(sys.argv[2:], config=config, folder=Path(sys.argv[1]), first_step={first_step})
    {setup}
    begin = time.monotonic()
    for step in range(1, 6):
        row = {"step": step, "loss": 1.0 / step, "grad_norm": None, "mfu": float("nan"), "time": 5.0}
        tracking.log(row, step)
        {between}
    tracking.log({"eval_loss": 9.5}, 5)
    logged = time.monotonic() - begin
    tracking.finish(failed={failed})
    print(json.dumps({"logged_s": logged, "total_s": time.monotonic() - start}))
"""


def track(
    folder, *kinds, before="pass", setup="pass", between="pass", failed=False, first_step=0, **env
) -> tuple[dict, list[str]]:
    """Run TRACK; returns its timings and its warnings."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("WANDB_") and key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment = clean | {"NETRC": os.devnull, "OMP_NUM_THREADS": "1", "A_TOKEN": "S3CRET"} | env
    script = (
        textwrap.dedent(TRACK)
        .replace("{before}", before)
        .replace("{setup}", setup)
        .replace("{between}", between)
    )
    script = script.replace("{failed}", str(failed)).replace("{first_step}", str(first_step))
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *kinds],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return json.loads(next(line for line in lines if line.startswith("{"))), [
        line for line in lines if line.startswith("LOG")
    ]


def wandb_records(folder) -> list:
    """The records of the one offline run below `folder`: LevelDB's log format behind a header of 7
    bytes, protobuf inside."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, position, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block that is too short for a header
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def wandb_history(records) -> dict[int, dict]:
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    return {
        row["_step"]: {key: value for key, value in row.items() if not key.startswith("_")} for row in rows
    }


@contextmanager
def server(*, listens: bool):
    """A local address where connections are taken and never answered, or where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listens:
            listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trackers"
    timings, warnings = track(folder, "wandb", "tensorboard")
    return folder, timings, warnings


def test_wandb_offline_files_hold_the_values(both):
    folder, _, warnings = both
    assert warnings == []
    records = wandb_records(folder)
    history = wandb_history(records)
    assert history == {
        step: {"loss": 1.0 / step} | ({"eval_loss": 9.5} if step == 5 else {}) for step in range(1, 6)
    }
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name, run.run_id) == (
        "proj",
        "demo",
        (folder / "wandb" / "run-id").read_text(),
    )
    config = {
        item.key: item.value_json
        for record in records
        if record.HasField("config")
        for item in record.config.update
    }
    assert json.loads(config["optim.lr"]) == 0.1


def test_tensorboard_files_hold_the_values(both):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = both
    events = EventAccumulator(str(folder / "tensorboard" / "proj" / "demo")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval_loss", "loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1.0 / step)) for step in range(1, 6)
    ]
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(5, 9.5)]
    (parameters,) = (folder / "tensorboard" / "proj" / "demo").glob("*/hparams.yml")
    assert "optim.lr: 0.1" in parameters.read_text()


def test_no_secret_reaches_a_tracker(both):
    folder, _, _ = both
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert all(b"S3CRET" not in path.read_bytes() for path in files)


def test_a_resumed_run_goes_on_in_the_same_wandb_run(both, tmp_path):
    folder, _, _ = both
    target = tmp_path / "wandb"
    target.mkdir()
    (target / "run-id").write_text((folder / "wandb" / "run-id").read_text())
    track(tmp_path, "wandb")
    (run,) = (record.run for record in wandb_records(tmp_path) if record.HasField("run"))
    assert run.run_id == (folder / "wandb" / "run-id").read_text()


def test_other_ranks_track_nothing(tmp_path):
    track(tmp_path, "wandb", "tensorboard", RANK="1")
    assert list(tmp_path.iterdir()) == []


def test_a_launched_process_gets_no_process_group_from_a_tracker(tmp_path):
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    _, warnings = track(
        tmp_path,
        "tensorboard",
        setup="import torch.distributed as dist; assert not dist.is_initialized()",
        **launched,
    )
    assert warnings == []
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_an_existing_process_group_is_left_as_it_is(tmp_path):
    store = tmp_path / "store"
    group = (
        "import torch.distributed as dist; "
        f"dist.init_process_group('gloo', init_method='file://{store}', rank=0, world_size=1)"
    )
    use = "assert dist.get_world_size() == 1 and dist.get_backend() == 'gloo'; dist.barrier()"
    _, warnings = track(
        tmp_path / "trackers",
        "tensorboard",
        before=group,
        setup=use,
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
    )
    assert warnings == []
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize("listens", [True, False], ids=["hangs", "refuses"])
def test_an_unreachable_wandb_costs_one_warning(tmp_path, listens):
    begin = time.monotonic()
    with server(listens=listens) as url:
        limits = "from hybridtrain.run.trackers import kinds; kinds.INIT_S, trackers.FINISH_S = 3.0, 6.0"
        timings, warnings = track(
            tmp_path,
            "wandb",
            "tensorboard",
            before=limits,
            WANDB_MODE="online",
            WANDB_API_KEY="a" * 40,
            WANDB_BASE_URL=url,
        )
    assert len(warnings) == 1
    assert "tracker wandb gave up" in warnings[0]
    assert timings["logged_s"] < 0.5
    assert timings["total_s"] < 6 + 5
    assert time.monotonic() - begin < 30  # the exit of the process is not held up either
    assert list(tmp_path.rglob("events.out.tfevents.*"))  # nor the other tracker


def test_a_tracker_that_cannot_start_costs_one_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    _, warnings = track(tmp_path, "tensorboard", "wandb")
    assert len(warnings) == 1
    assert "tracker tensorboard gave up (FileExistsError" in warnings[0]
    assert len(wandb_history(wandb_records(tmp_path))) == 5


def test_a_tracker_that_fails_while_logging_costs_one_warning(tmp_path):
    full = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "time.sleep(1); resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))"
    )
    _, warnings = track(tmp_path, "tensorboard", setup=full, between="time.sleep(0.2)")
    assert len(warnings) == 1
    assert "tracker tensorboard gave up (OSError: [Errno 27] File too large)" in warnings[0]


def test_without_trackers_nothing_is_imported_or_written(tmp_path):
    setup = "assert not {'accelerate', 'wandb', 'tensorboard'} & set(sys.modules)"
    timings, _ = track(tmp_path / "trackers", setup=setup)
    assert timings["total_s"] < 0.5
    assert not (tmp_path / "trackers").exists()


@pytest.mark.parametrize(
    ("env", "netrc", "expected"),
    [
        ({}, "", False),
        ({"WANDB_API_KEY": "x"}, "", True),
        ({}, "machine api.wandb.ai login user password x\n", True),
        ({}, "machine elsewhere.example login user password x\n", False),
        (
            {"WANDB_BASE_URL": "https://elsewhere.example"},
            "machine elsewhere.example login user password x\n",
            True,
        ),
        ({}, "not a netrc file", False),
    ],
)
def test_logged_in(tmp_path, monkeypatch, env, netrc, expected):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    for name, value in (env | {"NETRC": str(tmp_path / "netrc")}).items():
        monkeypatch.setenv(name, value)
    assert kinds.logged_in_to_wandb() is expected


def test_public_hides_secrets_and_keeps_the_rest():
    config = {
        "model": {"config": {"eos_token_id": 2, "tie": True, "rope": {"theta": 1e4}}, "api_key": "x"},
        "data": {
            "tokenizer": "train",
            "source": ["a", "b"],
            "url": "https://user:pw@host/x",
            "mirror": "https://host/x",
            "text_key": "text",
        },
        "train": {"tokens": 5, "note": None},
        "hub": {
            "HF_TOKEN": "x",
            "password": "x",
            "value": "hf_abcdefghijkl",
            "hub_tokens": ["x", "y"],
            "apikey": "x",
            "pw": "x",
            "auth": {"user": "x"},
        },
        "forms": {
            "a": "Bearer abcdef",
            "b": "AKIA" + "A" * 16,
            "c": "eyJhbGciOiJI.eyJzdWIi.x",
            "list": [{"token": "x", "size": 1}, {"plain": "y"}],
        },
        "env": {"token": "${oc.env:TOKEN}", "empty_key": ""},
    }
    hidden = trackers.HIDDEN
    assert trackers.public(config) == {
        "model.config.eos_token_id": 2,
        "model.config.tie": True,
        "model.config.rope.theta": 1e4,
        "model.api_key": hidden,
        "data.tokenizer": "train",
        "data.source": '["a", "b"]',
        "data.url": hidden,
        "data.mirror": "https://host/x",
        "data.text_key": "text",
        "train.tokens": 5,
        "hub.HF_TOKEN": hidden,
        "hub.password": hidden,
        "hub.value": hidden,
        "hub.hub_tokens": '["***", "***"]',
        "hub.apikey": hidden,
        "hub.pw": hidden,
        "hub.auth": '{"user": "***"}',
        "forms.a": hidden,
        "forms.b": hidden,
        "forms.c": hidden,
        "forms.list": '[{"token": "***", "size": 1}, {"plain": "y"}]',
        "env.token": "${oc.env:TOKEN}",
        "env.empty_key": "",
    }


def test_a_failed_run_is_failed_for_its_trackers_and_keeps_every_line(tmp_path):
    _, warnings = track(tmp_path, "wandb", failed=True)
    assert warnings == []
    records = wandb_records(tmp_path)
    assert len(wandb_history(records)) == 5
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


def test_what_a_resume_logs_again_is_once_in_tensorboard(tmp_path):
    """The second start goes on from step 2; one entry of hyperparameters remains."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = tmp_path / "tensorboard" / "proj" / "demo"
    track(tmp_path, "tensorboard")
    entries = sorted(place.glob("*/hparams.yml"))
    track(
        tmp_path,
        "tensorboard",
        before=(
            "trackers.Trackers.log = (lambda log: lambda self, row, step: "
            "log(self, row, step) if step > 2 else None)(Trackers.log)"
        ),
        first_step=2,
    )
    assert sorted(place.glob("*/hparams.yml")) == entries
    assert len(entries) == 1
    assert len(list(place.glob("events.out.tfevents.*"))) == 2
    steps = [event.step for event in EventAccumulator(str(place)).Reload().Scalars("loss")]
    assert steps == [1, 2, 3, 4, 5]
