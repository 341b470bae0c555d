"""Run directories as training leaves them: finished, and with everything that can happen."""

import json
import math

from hybridtrain.config import compose, schema

BEGIN = 1.7e9


def row(step: int, **changes) -> dict:
    values = {
        "step": step,
        "tokens_seen": 4096 * step,
        "loss": 3 + 5 * math.exp(-step / 40),
        "grad_norm": 1.0,
        "lr": 1e-5 * step,
        "loss_scale": 1.0,
        "skipped": 0,
        "tokens_per_s": 20000.0,
        "tokens_per_s_per_device": 5000.0,
        "step_time_s": 0.2,
        "mfu": None,
        "max_memory_gib": 1.5,
        "time": BEGIN + 0.2 * step,
    }
    return values | changes


def write(folder, rows, *, summary=None, config=None, events=(), torn=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in rows) + torn)
    if events:
        lines = [
            json.dumps({"time": BEGIN + at, "step": step, "kind": kind, "detail": detail})
            for at, step, kind, detail in events
        ]
        (folder / "events.jsonl").write_text("\n".join(lines) + "\n" + torn)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (folder / "config.yaml").write_text(compose.to_yaml(config))
    return folder


def finished(folder):
    config = schema.Config()
    config.run.name, config.train.steps = "demo", 200
    summary = {
        "status": "finished",
        "wall_s": 203.4,
        "tokens_per_s": 20900.0,
        "layout": "pp2-dp_shard2",
        "world_size": 4,
        "exit_reason": "train.steps",
    }
    rows = [row(step, **({"eval_loss": 4.25} if step % 50 == 0 else {})) for step in range(2, 201, 2)]
    return write(folder, rows, summary=summary, config=config)


def eventful(folder):
    """A run with everything: evaluations, MFU, a loss scale that falls, skipped updates, a failure with a
    resume an hour later, hosts, and markup in its words."""
    config = schema.Config()
    config.run.name, config.train.steps, config.tracker.project = (
        "eventful <b>",
        200,
        "<script>alert(1)</script>",
    )
    host = {
        "os": "Linux 6.1",
        "cpu": "EPYC & co",
        "cores": 96,
        "memory_gib": 1511.5,
        "gpu": "H200",
        "gpus": 4,
        "gpu_memory_gib": 139.8,
    }
    machine = [{"host": f"node{n}", **host, "ranks": list(range(4 * n, 4 * n + 4))} for n in range(2)]
    summary = {
        "status": "finished",
        "wall_s": 20.0,
        "tokens_per_s": 2e4,
        "layout": "pp2-dp_shard2-tp2-zero1",
        "world_size": 8,
        "exit_reason": "reached the end",
    }
    summary |= {
        "parameters": 7_000_000,
        "total_steps": 200,
        "machine": machine,
        "versions": {"torch": "2.13"},
        "git_revision": "abc",
    }
    rows = [
        row(step, mfu=0.4, time=BEGIN + 0.2 * step + (3600 if step > 100 else 0)) for step in range(1, 201)
    ]
    for values in rows:
        values |= {"eval_loss": 4.25 - values["step"] / 1000} if values["step"] % 50 == 0 else {}
        values |= {
            "loss_scale": 2.0 ** (16 if values["step"] < 30 else 15),
            "skipped": int(values["step"] == 30),
            "grad_norm": 50.0 if values["step"] == 77 else 1.0,
        }
    events = [
        (0.0, 0, "started", "pp2"),
        (6.0, 30, "skipped", "1 update"),
        (20.0, 100, "checkpoint", "step-00000100"),
        (21.0, 105, "failed", "<i>disk</i>"),
    ]
    events += [(3620.0, 100, "resumed", "from step-00000100"), (3640.0, 200, "finished", "reached the end")]
    return write(folder, rows, summary=summary, config=config, events=events)
