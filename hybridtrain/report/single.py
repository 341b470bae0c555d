"""The page and the console output of one run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hybridtrain.config import compose, schema
from hybridtrain.report import benchmarks, compared, page, samples
from hybridtrain.report.history import History
from hybridtrain.report.plots import Plot
from hybridtrain.training.metrics import duration, quantity

EVENTS_OPEN, MOST_EVENTS = 20, 1000
FINDINGS = ("nonfinite", "spike", "rollback")
ALARMING = ("skipped", "empty", *FINDINGS, "failed")


def document(history: History, plots: Sequence[Plot]) -> str:
    """The whole HTML page."""
    body = [
        page.header(history.name, status=history.status, about=about(history)),
        page.tiles(tiles(history)),
        f'<p class="note">{page.escape(unread(history))}</p>' if history.unread else "",
        page.plots(plots) if plots else '<p class="note">No step was logged yet.</p>',
        page.section("Benchmarks", benchmarks.section(history.scores)),
        page.section("Compared with the export", compared.section(history.compared)),
        page.section("Samples", samples.section(history.samples)),
        page.section("Failure", f"<pre>{page.escape(history.failure)}</pre>" if history.failure else ""),
        page.section("Non-finite steps and loss spikes", findings(history)),
        page.section("Events", events(history)),
        page.section("Machine", machine(history)),
        page.section("Config", config(history)),
    ]
    return page.document(f"{history.name} · {history.status}", body)


def about(history: History) -> str:
    """The line below the name: exit reason or progress, and the folder."""
    parts = [str(history.summary["exit_reason"])] if history.summary.get("exit_reason") else []
    if history.silent_s is not None:
        parts.append(f"nothing logged for {duration(history.silent_s)}: the run may have been killed")
    elif history.eta_s is not None:
        parts.append(
            f"step {history.step:,} of {history.total_steps:,}, about {duration(history.eta_s)} to go"
        )
    return " · ".join([*parts, str(history.folder)])


def unread(history: History) -> str:
    """A note on lines that could not be read."""
    return "Left out, because it cannot be read: " + ", ".join(
        f"{name}" if name.endswith(".json") else f"{count:,} line{'s' if count > 1 else ''} of {name}"
        for name, count in history.unread.items()
    )


def tiles(history: History) -> dict[str, tuple[str, str]]:
    """The most important numbers: name -> (value, text below it)."""
    summary, evaluations = history.summary, history.known("eval_loss")
    loss, memory, mfu = history.last("loss"), history.known("max_memory_gib"), history.known("mfu")
    first = history.known("loss")[:1]
    size, tokens = summary.get("parameters"), history.last("tokens_seen")
    return {
        "Step": (f"{history.step:,}", f"of {history.total_steps:,}" if history.total_steps else ""),
        "Loss": (f"{loss:.4f}" if loss is not None else "", f"from {first[0]:.4f}" if len(first) else ""),
        "Held-out loss": (f"{evaluations[-1]:.4f}", f"lowest {evaluations.min():.4f}")
        if len(evaluations)
        else ("", ""),
        "Tokens": (
            quantity(tokens) if tokens is not None else "",
            f"{quantity(size)} parameters" if size else "",
        ),
        "Tokens/s": (quantity(history.tokens_per_s), "median")
        if history.tokens_per_s is not None
        else ("", ""),
        "MFU": (f"{sorted(mfu)[len(mfu) // 2]:.1%}", "median") if len(mfu) else ("", ""),
        "Peak memory": (f"{memory.max():.2f} GiB", "per process") if len(memory) else ("", ""),
        "Layout": (str(summary.get("layout") or ""), _processes(summary.get("world_size"))),
        "Training time": (duration(history.wall_s), _starts(history))
        if history.wall_s is not None
        else ("", ""),
    }


def _processes(count: int | None) -> str:
    return f"{count:,} process{'es' if count != 1 else ''}" if count else ""


def _starts(history: History) -> str:
    resumes = sum(event["kind"] == "resumed" for event in history.events)
    return f"{resumes} resume{'s' if resumes > 1 else ''}" if resumes else ""


def events(history: History) -> str:
    """A table of events, newest first; older ones collapsed."""
    head, rows = ("time", "step", "event", ""), [_event(event) for event in reversed(history.events)]
    older = page.table(head, rows[EVENTS_OPEN:MOST_EVENTS], numbers=(1,))
    count = len(rows) - EVENTS_OPEN
    beyond = (
        f'<p class="note">{len(rows) - MOST_EVENTS:,} more are in events.jsonl.</p>'
        if len(rows) > MOST_EVENTS
        else ""
    )
    return page.table(head, rows[:EVENTS_OPEN], numbers=(1,)) + (
        f"<details><summary>{count:,} older</summary>{older}{beyond}</details>" if older else ""
    )


def findings(history: History) -> str:
    """A table of the newest findings, and of what was done about them; empty without any."""
    rows = [_event(event) for event in reversed(history.events) if event["kind"] in FINDINGS]
    return page.table(("time", "step", "event", ""), rows[:EVENTS_OPEN], numbers=(1,)) if rows else ""


def _event(event: dict[str, Any]) -> tuple[str, ...]:
    kind = page.escape(event["kind"])
    return (
        _moment(event["time"]),
        f"{event['step']:,}",
        page.Markup(f'<span class="alarm">{kind}</span>' if event["kind"] in ALARMING else kind),
        event["detail"],
    )


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def machine(history: History) -> str:
    """A table of hosts, with identical ones in one line; versions and revision below."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for host in history.hosts:
        gpu = (
            f"{host.get('gpus')} x {host['gpu']}, {host.get('gpu_memory_gib')} GiB each"
            if host.get("gpu")
            else "none"
        )
        alike.setdefault(
            (
                str(host.get("cpu")),
                str(host.get("cores")),
                f"{host.get('memory_gib')} GiB",
                gpu,
                str(host.get("os")),
            ),
            [],
        ).append(host)
    rows = [
        (_hosts(group), sum(len(host.get("ranks", ())) for host in group), *facts)
        for facts, group in alike.items()
    ]
    hosts = page.table(("host", "ranks", "CPU", "cores", "memory", "GPUs", "system"), rows, numbers=(1, 3, 4))
    versions = dict(history.summary.get("versions") or {})
    if history.summary.get("git_revision"):
        versions["git revision"] = history.summary["git_revision"]
    return hosts + page.table((), list(versions.items()), numbers=())


def _hosts(group: Sequence[dict[str, Any]]) -> str:
    names = [str(host.get("host")) for host in group]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} hosts, {names[0]} to {names[-1]}"


def config(history: History) -> str:
    """The options; for a config that this version cannot read, its text."""
    if history.config is not None:
        return page.options(compose.public(history.config), defaults=compose.public(schema.Config()))
    path = history.folder / "config.yaml"
    return (
        f'<div class="card"><pre class="code">{page.escape(path.read_text(errors="replace"))}</pre></div>'
        if path.is_file()
        else ""
    )


def lines(history: History) -> str:
    """The run's numbers for the console, one per line, without unknown ones."""
    known = {
        name.lower(): f"{value} {below}".strip() for name, (value, below) in tiles(history).items() if value
    }
    shown = {"run": history.folder, "status": f"{history.status} ({about(history)})", **known}
    return "\n".join(
        [
            *(f"{name:<14}{value}" for name, value in shown.items()),
            *([unread(history)] if history.unread else []),
        ]
    )
