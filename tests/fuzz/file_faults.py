"""One file operation of a command fails, or kills it: nothing crashes, nothing is lost, and the same
command then does its work.

    LD_PRELOAD=faults.so python -m tests.fuzz.file_faults --work DIR --out ROWS.jsonl --count 20 --seed 0

For every scenario the operations of an undisturbed run are counted; then, of a seeded sample, each run fails
at one of them with one of the errors, and is given again undisturbed. The oracle: exit code 0 (the error was
none of the command's business) or 2 (refused), no traceback; then exit code 0 and the result of a run that
was never disturbed, bit for bit; no temporary file left
but hidden ones of a writer that was killed, which the next minutes' commands remove.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import harness
from tests.fuzz.harness import PREPARE, TRAIN

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, "EROFS": errno.EROFS, "kill": -1}
LEFT = (".partial", ".removed", ".aside")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command, the folder it starts in, and what it must come to."""

    argv: list[str]
    before: list[list[str]]
    result: Callable[[Path], Any]


def _trained(folder: Path) -> Any:
    """Every step's line, and the newest checkpoint; an older one stays where its removal failed."""
    return [
        harness.metrics(folder / "runs" / "x"),
        max(path.name for path in (folder / "runs" / "x" / "checkpoints").iterdir()),
    ]


def _exported(folder: Path) -> Any:
    return harness.digests(
        folder / "runs" / "x" / "export", lambda name: name.endswith((".safetensors", ".json"))
    )


def _prepared(folder: Path) -> Any:
    return harness.digests(
        folder / "corpus", lambda name: name.endswith((".bin", ".idx")) or name == "tokenizer.json"
    )


def _branched(folder: Path) -> Any:
    return [
        harness.metrics(folder / "runs" / "b"),
        max(path.name for path in (folder / "runs" / "b" / "checkpoints").iterdir()),
    ]


def _reported(folder: Path) -> Any:
    return (folder / "runs" / "x" / "report" / "index.html").stat().st_size > 1000


BRANCH = [word for word in TRAIN if not word.startswith("run.dir")] + [
    "run.dir=runs/b",
    "run.branch_from=runs/x",
    "optim.lr=0.02",
    "train.steps=4",
]
SCENARIOS = {
    "train": Scenario([*TRAIN, "train.steps=3"], [], _trained),
    "resume": Scenario([*TRAIN, "train.steps=4"], [[*TRAIN, "train.steps=2"]], _trained),
    "branch": Scenario(BRANCH, [[*TRAIN, "train.steps=2"]], _branched),
    "export": Scenario(["export", "runs/x"], [[*TRAIN, "train.steps=1"]], _exported),
    "export_again": Scenario(
        ["export", "runs/x", "export.dtype=bfloat16"],
        [[*TRAIN, "train.steps=1"], ["export", "runs/x"]],
        _exported,
    ),
    "prepare": Scenario([*PREPARE, "data.path=corpus"], [], _prepared),
    "report": Scenario(["report", "runs/x"], [[*TRAIN, "train.steps=2"]], _reported),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True, help="faults of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    harness.preload()
    names = options.only.split(",") if options.only else list(SCENARIOS)
    with options.out.open("w") as out:
        for name in names:
            for row in fuzz(
                name,
                SCENARIOS[name],
                work=options.work / name,
                count=options.count,
                chance=random.Random(f"{options.seed}{name}"),
            ):
                out.write(json.dumps({"scenario": name, **row}) + "\n")
                out.flush()
            shutil.rmtree(options.work / name, ignore_errors=True)


def fuzz(name: str, scenario: Scenario, *, work: Path, count: int, chance: random.Random) -> Any:
    """Rows of one scenario."""
    base = work / "base"
    harness.write_texts(base)
    for argv in [PREPARE, *scenario.before] if name != "prepare" else scenario.before:
        harness.must(argv, base)
    fresh = harness.copies(base, work)
    folder = next(fresh)
    ended, operations = harness.run(scenario.argv, folder=folder, arm=None, timeout_s=300)
    assert ended.code == 0, ended.said
    assert operations > 3, f"{name}: {operations} file operations were seen"
    expected = scenario.result(folder)
    places = sorted(chance.sample(range(1, operations + 1), min(count, operations)))
    for n in places:
        error = chance.choice(list(ERRORS))
        folder = next(fresh)
        ended, _ = harness.run(scenario.argv, folder=folder, arm=(n, ERRORS[error]), timeout_s=120)
        again, _ = harness.run(scenario.argv, folder=folder, arm=None, timeout_s=120)
        yield {
            "n": n,
            "of": operations,
            "error": error,
            "where": ended.where,
            "code": ended.code,
            **_verdict(ended, again, folder, scenario, expected),
        }


def _verdict(
    ended: harness.Ended, again: harness.Ended, folder: Path, scenario: Scenario, expected: Any
) -> dict[str, str]:
    allowed = (0, 2, -9)
    wrong = ""
    if ended.crashed or ended.code not in allowed:
        wrong = f"it ended with {ended.code}: {ended.said[-1500:]}"
    elif again.crashed or again.code != 0:
        wrong = (
            f"the same command then ended with {again.code}: {again.said[-1500:]}\nafter: {ended.said[-800:]}"
        )
    elif (found := scenario.result(folder)) != expected:
        wrong = f"another result: {found} instead of {expected}"
    elif left := [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.endswith(LEFT) and not path.name.startswith(".")
    ]:
        wrong = f"left behind: {left}"
    return {"wrong": wrong}


if __name__ == "__main__":
    main()
