"""What goes wrong on clusters, planted in real runs: Python imports this at its start where this
folder is on PYTHONPATH.

SABOTAGE is JSON: {"kind": raise | kill | hang | slow | slow_save, "rank": r, "step": s, "seconds": t, "once":
file}. With `once` it happens in the first life only. `slow` delays every step of every rank, `slow_save`
every checkpoint. With `witness`, a folder, every rank leaves the rows of each step there, and what it has
loaded, saved again at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def due(plan: dict[str, Any], step: int) -> bool:
    if int(os.environ.get("RANK", "0")) != plan.get("rank", 0) or step != plan.get("step", 0):
        return False
    marker = plan.get("once")
    if marker and Path(marker).exists():
        return False
    if marker:
        Path(marker).write_text("done")
    return True


def act(plan: dict[str, Any], step: int) -> None:
    match plan["kind"]:
        case "slow":
            time.sleep(plan["seconds"])
        case "raise" if due(plan, step):
            raise ArithmeticError("planted failure")
        case "kill" if due(plan, step):
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang" if due(plan, step):
            time.sleep(3600)


def plant(plan: dict[str, Any]) -> None:
    """From here on, in this process."""
    import hybridtrain.checkpoint.sharded as sharded
    import hybridtrain.training.loop as loop

    rate, write = loop.lr_at, sharded._write

    def lr_at(step: int, **rest: Any) -> float:
        act(plan, step)
        return rate(step, **rest)

    def slow_write(*args: Any, **rest: Any) -> None:
        time.sleep(plan["seconds"])
        write(*args, **rest)

    loop.lr_at = lr_at
    if "witness" in plan:
        bear_witness(Path(plan["witness"]))
    if plan["kind"] == "slow_save":
        sharded._write = slow_write


def bear_witness(folder: Path) -> None:
    """rows-STEP-RANK.json: where in the global batch its rows begin, and which they are. step-STEP-of-RANKS:
    a checkpoint of what was loaded."""
    import hybridtrain.engine as engines
    from hybridtrain.data.loader import Loader

    batches, build = Loader.micro_batches, engines.build_for

    def micro_batches(loader: Any, step: int) -> Any:
        ids = loader.row_ids(step).tolist()
        (folder / f"rows-{step}-{os.environ['RANK']}.json").write_text(
            json.dumps([loader._dp_rank * len(ids), ids])
        )
        return batches(loader, step)

    def built(*args: Any, **rest: Any) -> Any:
        engine = build(*args, **rest)
        load = engine.load

        def loaded(path: Path) -> Any:
            progress = load(path)
            engine.save(folder / f"step-{progress.step:08d}-of-{os.environ['WORLD_SIZE']}", progress).result()
            return progress

        engine.load = loaded
        return engine

    Loader.micro_batches, engines.build_for = micro_batches, built


def spoil_health() -> None:
    """This node cannot write the run's directory."""
    touch = Path.write_text

    def write_text(path: Path, *args: Any, **rest: Any) -> int:
        if path.name.startswith("probe-"):
            raise OSError(30, "Read-only file system")
        return touch(path, *args, **rest)

    Path.write_text = write_text  # type: ignore[method-assign, assignment]


if os.environ.get("SABOTAGE_NODE") and os.environ.get("SABOTAGE_NODE") == os.environ.get("SLURMD_NODENAME"):
    spoil_health()
if "RANK" in os.environ and os.environ.get("SABOTAGE") and "torch.distributed.run" not in " ".join(sys.argv):
    plant(json.loads(os.environ["SABOTAGE"]))
