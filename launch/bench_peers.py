#!/usr/bin/env python3
"""Compare training systems on the same work, step by step in turns, in one table of paired ratios.

    bench_peers.py PEERS.json --mode dp2,zero3 --prec fp32,bf16 --rounds 15 --out table
    bench_peers.py --checkouts new=. old=../old --mode 1p,dp2 --prec fp32 --rounds 60 --until 0.04 --steps 1
        # two checkouts of hybridtrain

All contestants of a cell (mode, precision) are started and warmed up, each alone. Then, in each round, each
makes its steps while the others sleep, and who begins changes every round: what is compared lies seconds
apart. Then all are started once more, in the opposite order, for as many rounds: on some machines whoever is
started first is slower by a few per cent from then on (the same checkout twice: 2 %). A round's time is the
geometric mean of its two sittings, in which that cancels. The ratio to a peer is the median over rounds of
(its time) / (ours), with the sign test's 95 % interval; with --until W there are as many rounds as it takes
to make every interval of the first sitting at most W wide.

PEERS.json: [{"name", "python", "script", "args", "modes", "precs", "env", "ours"}]. A script calls `Meter` of
a module `common` beside it: `start()`, and `lap(loss)` once a step. --checkouts makes such a list of folders
of hybridtrain, each with its own .venv or this Python; the first is "ours". This file is run with each peer's
own Python: it imports nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import resource
import runpy
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OURS = "bench_ours.py"
_PATIENCE_S = 420  # for a start with compilation; a turn takes seconds


def take_turns(folder: str, warmup: int, steps: int, script: str, arguments: list[str]) -> None:
    """Inside a contestant: run `script`, and sleep after the warm-up and after every turn
    until the runner says go.

    Each turn leaves a line in laps.RANK: seconds of its steps, the last loss, the peak of
    resident memory in MB.
    """
    sys.path.insert(0, str(Path(script).resolve().parent))
    common = importlib.import_module(Path(script).stem if Path(script).name == OURS else "common")
    rank, laps, times = os.environ.get("RANK", "0"), 0, [time.perf_counter()]
    go, done = (os.open(f"{folder}/{name}", os.O_RDWR) for name in (f"go.{rank}", "done"))
    lap = common.Meter.lap

    def waiting(meter: Any, loss: Any = None) -> None:
        nonlocal laps
        lap(meter, loss)
        times.append(time.perf_counter())
        laps += 1
        if laps >= warmup and (laps - warmup) % steps == 0:
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            turn = [later - earlier for earlier, later in itertools.pairwise(times)]
            with Path(folder, f"laps.{rank}").open("a") as file:
                file.write(json.dumps([turn, None if loss is None else float(loss), peak_mb]) + "\n")
            os.write(done, b"d")
            os.read(go, 1)
            meter.start()  # the wait is nobody's step
            times[:] = [time.perf_counter()]

    common.Meter.lap = waiting
    sys.argv = [script, *arguments]
    if common.__name__ == "common":
        runpy.run_path(script, run_name="__main__")
    else:
        common.main(arguments)


class Contestant:
    """One system in one cell: its processes, asleep unless it is its turn."""

    def __init__(self, peer: dict[str, Any], *, mode: str, prec: str, options: argparse.Namespace) -> None:
        self.name, self.error = peer["name"], ""
        self.processes = 1 if mode == "1p" else 2
        self.folder = Path(tempfile.mkdtemp(prefix="turns_"))
        for pipe in ["done", *(f"go.{rank}" for rank in range(self.processes))]:
            os.mkfifo(self.folder / pipe)
        self.done = os.open(self.folder / "done", os.O_RDWR)
        self.go = [os.open(self.folder / f"go.{rank}", os.O_RDWR) for rank in range(self.processes)]
        rows = options.pp_mbs if mode == "pp2" else options.mbs
        work = {
            "mode": mode,
            "prec": prec,
            "model": options.model,
            "seq": options.seq,
            "gbs": options.gbs,
            "mbs": rows,
        }
        work |= {"warmup": options.warmup, "steps": options.rounds * options.steps}
        command = [peer["python"]]
        if self.processes > 1:
            command += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(self.processes),
            ]
        command += [
            str(Path(__file__).resolve()),
            "turn",
            str(self.folder),
            str(options.warmup),
            str(options.steps),
            peer["script"],
        ]
        command += [part for key, value in work.items() for part in (f"--{key}", str(value))] + peer.get(
            "args", []
        )
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(max(1, os.cpu_count() // self.processes)),
            "CUDA_VISIBLE_DEVICES": "",
        }  # type: ignore[operator]
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", **peer.get("env", {})}
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=Path(peer["script"]).parent,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()

    def turn(self) -> None:
        if self.error:
            return
        for pipe in self.go:
            os.write(pipe, b"g")
        self._wait()

    def _wait(self) -> None:
        """Until every process sleeps again; a contestant that died or hangs is out."""
        until, heard = time.monotonic() + _PATIENCE_S, 0
        while heard < self.processes and not self.error:
            if select.select([self.done], [], [], 0.5)[0]:
                heard += len(os.read(self.done, self.processes))
            elif self.process.poll() is not None or time.monotonic() > until:
                lines = [
                    line for line in self.log.read_text(errors="replace").splitlines() if "Error" in line
                ]
                self.error = (
                    lines[0].strip()
                    if lines
                    else f"no step within {_PATIENCE_S} s, exit code {self.process.poll()}"
                )[:140]
                self.stop()

    def laps(self) -> list[dict[str, Any]]:
        """What each turn after the warm-up took, by the slowest of its processes: median seconds a
        step, loss, peak memory."""
        ranks = []
        for rank in range(self.processes):
            file = self.folder / f"laps.{rank}"
            ranks.append(
                [json.loads(line) for line in file.read_text().splitlines()][1:] if file.exists() else []
            )
        turns = []
        for turn in zip(*ranks, strict=False):
            slowest = [max(step) for step in zip(*(times for times, _, _ in turn), strict=True)]
            losses = [loss for _, loss, _ in turn if loss is not None]
            turns.append(
                {
                    "s": statistics.median(slowest),
                    "loss": losses[-1] if losses else None,
                    "rss_mb": round(max(peak for _, _, peak in turn)),
                }
            )
        return turns

    def stop(self) -> None:
        """The launcher first, which ends its processes; then what is left of its group."""
        for number, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 5)):
            if self.process.poll() is not None:
                return
            os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)


def race(
    peers: list[dict[str, Any]], *, mode: str, prec: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One cell: everybody's seconds a step in each round, of two sittings."""
    there = _sitting(peers, mode=mode, prec=prec, options=options)
    made = max((len(row.get("rounds_s", ())) for row in there), default=0)
    options = argparse.Namespace(**{**vars(options), "rounds": made or 1, "until": 0.0})
    back = {row["peer"]: row for row in _sitting(peers[::-1], mode=mode, prec=prec, options=options)}
    for row in there:
        again = back[row["peer"]]
        row["error"] = row["error"] or again["error"]
        if not row["error"]:
            row["rounds_s"] = [
                math.sqrt(one * other) for one, other in zip(row["rounds_s"], again["rounds_s"], strict=True)
            ]
            row["rss_mb"] = max(row["rss_mb"], again["rss_mb"])
    _say(f"{prec} {mode}: done")
    return there


def _sitting(
    peers: list[dict[str, Any]], *, mode: str, prec: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All are started, take turns, and are ended; the first peer is the one whose ratios decide how
    many rounds there are."""
    contestants = []
    for peer in peers:
        contestants.append(Contestant(peer, mode=mode, prec=prec, options=options))
        _say(f"{prec} {mode} {peer['name']}: {contestants[-1].error or 'warm'}")
    load = os.getloadavg()[0]
    for round_ in range(options.rounds):
        first = round_ % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant.turn()
        if options.until and round_ >= 14 and round_ % 5 == 4 and _narrow(contestants, width=options.until):
            break
    rows = []
    for contestant in contestants:
        turns = contestant.laps()
        contestant.stop()
        row = {
            "peer": contestant.name,
            "mode": mode,
            "prec": prec,
            "load": load,
            "error": contestant.error or ("" if turns else "it made no turn"),
        }
        if turns:
            row |= {
                "rounds_s": [turn["s"] for turn in turns],
                "rss_mb": turns[-1]["rss_mb"],
                "loss": turns[-1]["loss"],
                "tokens": options.gbs * options.seq,
            }
        rows.append(row)
    return rows


def _narrow(contestants: list[Contestant], *, width: float) -> bool:
    """Whether every ratio to the first contestant is known closely enough."""
    own, *others = [
        [turn["s"] for turn in contestant.laps()] for contestant in contestants if not contestant.error
    ]
    intervals = [median_interval([a / b for a, b in zip(theirs, own, strict=True)]) for theirs in others]
    return all(high - low <= width for _, low, high in intervals)


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the order statistics between which the true median lies with at least 95 % (the whole
    range below 6 values)."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2 and outside + math.comb(n, k) / 2**n <= 0.025:
        outside += math.comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def table(rows: list[dict[str, Any]], ours: set[str]) -> str:
    """Markdown; for every peer the ratio of its time to that of each of ours in the same race."""
    names = sorted(ours)
    lines = [
        "| mode | precision | system | tokens/s | "
        + " | ".join(f"{name} is faster by" for name in names)
        + " | peak MB a process | last loss |",
        "|---|---|---|---|" + "---|" * len(names) + "---|---|",
    ]
    for row in rows:
        head = f"| {row['mode']} | {row['prec']} | {row['peer']} |"
        if row["error"]:
            lines.append(f"{head} {row['error']} |" + " |" * (len(names) + 2))
            continue
        ratios = []
        for name in names:
            mine = next(
                (r for r in rows if r["race"] == row["race"] and r["peer"] == name and not r["error"]), None
            )
            if mine is None or mine is row:
                ratios.append("-")
                continue
            middle, low, high = median_interval(
                [theirs / own for theirs, own in zip(row["rounds_s"], mine["rounds_s"], strict=True)]
            )
            ratios.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        speed = row["tokens"] / statistics.median(row["rounds_s"])
        lines.append(
            f"{head} {speed:.0f} | " + " | ".join(ratios) + f" | {row['rss_mb']} | {row['loss']:.6f} |"
        )
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    print(time.strftime("[%H:%M:%S] ") + text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", type=Path, nargs="?")
    parser.add_argument(
        "--checkouts",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="folders of hybridtrain instead of peers; the first is ours",
    )
    parser.add_argument("--compile", action="store_true", help="with --checkouts: engine.compile=true")
    parser.add_argument(
        "--until",
        type=float,
        default=0.0,
        help="end when every interval is at most this wide (after 15 rounds or more)",
    )
    parser.add_argument("--mode", default="1p,dp2,zero3,tp2,pp2")
    parser.add_argument("--prec", default="fp32,bf16")
    parser.add_argument("--only", default="", help="names, comma-separated; ours always takes part")
    parser.add_argument("--model", default="tiny", help="tiny or micro; with --checkouts also tiny-qwen3")
    for name, value in {
        "seq": 256,
        "gbs": 8,
        "mbs": 4,
        "pp-mbs": 1,
        "warmup": 2,
        "steps": 2,
        "rounds": 15,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--at-once",
        type=int,
        default=5,
        help="peers in memory together; ours runs again beside each such group",
    )
    parser.add_argument("--out", type=Path, default=Path("table"))
    return parser.parse_args()


def _checkouts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Contestants that are folders of hybridtrain."""
    peers = []
    for number, entry in enumerate(options.checkouts):
        name, _, folder = entry.partition("=")
        root = Path(folder).resolve()
        python = root / ".venv" / "bin" / "python"
        peers.append(
            {
                "name": name,
                "python": str(python) if python.exists() else sys.executable,
                "script": str(Path(__file__).resolve().with_name(OURS)),
                "args": ["--compile"] if options.compile else [],
                "modes": "1p dp2 zero1 zero2 zero3 tp2 pp2",
                "env": {"PYTHONPATH": str(root)},
                "ours": number == 0,
            }
        )
    return peers


def main() -> None:
    options = _options()
    if bool(options.peers) == bool(options.checkouts):
        sys.exit("bench_peers.py: give PEERS.json or --checkouts NAME=FOLDER NAME=FOLDER")
    peers = _checkouts(options) or json.loads(options.peers.read_text())
    only = set(filter(None, options.only.split(",")))
    rows: list[dict[str, Any]] = []
    for prec in options.prec.split(","):
        for mode in options.mode.split(","):
            here = [
                peer
                for peer in peers
                if mode in peer["modes"].split() and prec in peer.get("precs", "fp32 bf16").split()
            ]
            ours = [peer for peer in here if peer.get("ours")]
            others = [peer for peer in here if not peer.get("ours") and (not only or peer["name"] in only)]
            for start in range(0, len(others), options.at_once):
                found = race(
                    ours + others[start : start + options.at_once], mode=mode, prec=prec, options=options
                )
                rows += [{**row, "race": f"{prec} {mode} {start}"} for row in found]
                options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
                options.out.with_suffix(".md").write_text(
                    table(rows, {peer["name"] for peer in peers if peer.get("ours")})
                )
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["turn"]:
        take_turns(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6:])
    else:
        main()
