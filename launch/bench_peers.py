#!/usr/bin/env python3
"""Compare training systems on the same work, step by step in turns, in one table of paired ratios.

    bench_peers.py PEERS.json --mode dp2,zero3 --prec fp32,bf16 --rounds 15 --out table

All contestants of a cell (mode, precision) are started once and warmed up, each alone. Then, in each round, each makes its
steps while the others sleep, and who begins changes every round. Start-up is paid once, and what is compared lies
seconds apart. The ratio to a peer is the median over rounds of (its time) / (ours), with the sign test's 95 % interval.

PEERS.json: {"command": {...}, "peers": [{"name", "python", "script", "args", "modes", "precs", "ours"}]}. A script times its steps
with `Meter` of a module `common` beside it (`start()`, and `lap(loss)` once a step), and prints one line `RESULT {json}`
with step_s (a list), rss_mb_max and loss_last. This file is run with each peer's own Python: it imports nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
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

_PATIENCE_S = 420  # for a start with compilation; a turn takes seconds


def take_turns(folder: str, warmup: int, steps: int, script: str, arguments: list[str]) -> None:
    """Inside a contestant: run `script`, and sleep after the warm-up and after every turn until the runner says go."""
    sys.path.insert(0, str(Path(script).resolve().parent))
    import common  # type: ignore[import-not-found]

    rank, laps = os.environ.get("RANK", "0"), 0
    go, done = (os.open(f"{folder}/{name}", os.O_RDWR) for name in (f"go.{rank}", "done"))
    lap = common.Meter.lap

    def waiting(meter: Any, loss: Any = None) -> None:
        nonlocal laps
        lap(meter, loss)
        laps += 1
        if laps >= warmup and (laps - warmup) % steps == 0:
            os.write(done, b"d")
            os.read(go, 1)
            meter.start()  # the wait is nobody's step

    common.Meter.lap = waiting
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


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
        work = {"mode": mode, "prec": prec, "model": options.model, "seq": options.seq, "gbs": options.gbs, "mbs": rows}
        work |= {"warmup": options.warmup, "steps": options.rounds * options.steps}
        command = [peer["python"]]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        command += [str(Path(__file__).resolve()), "turn", str(self.folder), str(options.warmup), str(options.steps), peer["script"]]
        command += [part for key, value in work.items() for part in (f"--{key}", str(value))] + peer.get("args", [])
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // self.processes)), "CUDA_VISIBLE_DEVICES": ""}  # type: ignore[operator]
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", **peer.get("env", {})}
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=Path(peer["script"]).parent, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
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
                lines = [line for line in self.log.read_text(errors="replace").splitlines() if "Error" in line]
                self.error = (lines[0].strip() if lines else f"no step within {_PATIENCE_S} s, exit code {self.process.poll()}")[:140]
                self.stop()

    def result(self) -> dict[str, Any] | None:
        """Let it end, and take its line."""
        if not self.error:
            for pipe in self.go:
                os.write(pipe, b"g")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.stop()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("RESULT ")]
        return json.loads(lines[-1][7:]) if lines and not self.error else None

    def stop(self) -> None:
        """The launcher first, which ends its processes; then what is left of its group."""
        for number, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 5)):
            if self.process.poll() is not None:
                return
            os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)


def race(peers: list[dict[str, Any]], *, mode: str, prec: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One cell: everybody's median seconds a step in each round."""
    contestants = []
    for peer in peers:
        contestants.append(Contestant(peer, mode=mode, prec=prec, options=options))
        _say(f"{prec} {mode} {peer['name']}: {contestants[-1].error or 'warm'}")
    load = os.getloadavg()[0]
    for round_ in range(options.rounds):
        first = round_ % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant.turn()
    rows = []
    for contestant in contestants:
        result, n = contestant.result(), options.steps
        row = {"peer": contestant.name, "mode": mode, "prec": prec, "load": load, "error": contestant.error or ("" if result else "no RESULT line")}
        if result:
            times = result["step_s"]
            row |= {"rounds_s": [statistics.median(times[i : i + n]) for i in range(0, len(times), n)], "rss_mb": result["rss_mb_max"]}
            row |= {"loss": result["loss_last"], "tokens": options.gbs * options.seq}
        rows.append(row)
    _say(f"{prec} {mode}: done")
    return rows


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the order statistics between which the true median lies with at least 95 % (the whole range below 6 values)."""
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
        "| mode | precision | system | tokens/s | " + " | ".join(f"{name} is faster by" for name in names) + " | peak MB a process | last loss |",
        "|---|---|---|---|" + "---|" * len(names) + "---|---|",
    ]
    for row in rows:
        head = f"| {row['mode']} | {row['prec']} | {row['peer']} |"
        if row["error"]:
            lines.append(f"{head} {row['error']} |" + " |" * (len(names) + 2))
            continue
        ratios = []
        for name in names:
            mine = next((r for r in rows if r["race"] == row["race"] and r["peer"] == name and not r["error"]), None)
            if mine is None or mine is row:
                ratios.append("-")
                continue
            middle, low, high = median_interval([theirs / own for theirs, own in zip(row["rounds_s"], mine["rounds_s"], strict=True)])
            ratios.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        speed = row["tokens"] / statistics.median(row["rounds_s"])
        lines.append(f"{head} {speed:.0f} | " + " | ".join(ratios) + f" | {row['rss_mb']} | {row['loss']:.4f} |")
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    print(time.strftime("[%H:%M:%S] ") + text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--mode", default="1p,dp2,zero3,tp2,pp2")
    parser.add_argument("--prec", default="fp32,bf16")
    parser.add_argument("--only", default="", help="names, comma-separated; ours always takes part")
    parser.add_argument("--model", default="tiny")
    for name, value in {"seq": 256, "gbs": 8, "mbs": 4, "pp-mbs": 1, "warmup": 2, "steps": 2, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--at-once", type=int, default=5, help="peers in memory together; ours runs again beside each such group")
    parser.add_argument("--out", type=Path, default=Path("table"))
    return parser.parse_args()


def main() -> None:
    options = _options()
    peers = json.loads(options.peers.read_text())
    only = set(filter(None, options.only.split(",")))
    rows: list[dict[str, Any]] = []
    for prec in options.prec.split(","):
        for mode in options.mode.split(","):
            here = [peer for peer in peers if mode in peer["modes"].split() and prec in peer.get("precs", "fp32 bf16").split()]
            ours = [peer for peer in here if peer.get("ours")]
            others = [peer for peer in here if not peer.get("ours") and (not only or peer["name"] in only)]
            for start in range(0, len(others), options.at_once):
                found = race(ours + others[start : start + options.at_once], mode=mode, prec=prec, options=options)
                rows += [{**row, "race": f"{prec} {mode} {start}"} for row in found]
                options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
                options.out.with_suffix(".md").write_text(table(rows, {peer["name"] for peer in peers if peer.get("ours")}))
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["turn"]:
        take_turns(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6:])
    else:
        main()
