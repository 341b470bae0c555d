"""run.callbacks=[lm_eval]: after the last step, the harness measures the last checkpoint.

A process of its own does that (`hybridtrain evaluate`), on rank 0's machine: the harness seeds all random
numbers, and would take the launcher's variables for its own.
"""

# ruff: noqa: ARG002 - a callback has the arguments of its interface

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from hybridtrain.config.schema import Config
from hybridtrain.config.words import literal
from hybridtrain.runtime import log
from hybridtrain.training.callbacks import Callback, Run

_log = log.get("train")
_LAUNCHERS = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "HYBRIDTRAIN_DEADLINE",
)


class LmEval(Callback):
    """Runs on rank 0, once all steps are done; the others do not wait."""

    checkpoint: Path | None = None

    def on_checkpoint(self, run: Run, path: Path) -> None:
        self.checkpoint = path

    def on_end(self, run: Run, error: BaseException | None) -> None:
        if error is None and run.step >= run.total_steps and self.checkpoint is not None and log.rank() == 0:
            _measure(run, checkpoint=self.checkpoint)


def command(config: Config, *, run_dir: Path, checkpoint: Path) -> list[str]:
    """The command line that measures a checkpoint of the run."""
    options = config.lm_eval
    words = {
        "evaluate.source": literal(str(checkpoint)),
        "lm_eval.tasks": f"[{','.join(map(literal, options.tasks))}]",
        "lm_eval.task_folder": literal(options.task_folder),
        "lm_eval.limit": str(options.limit),
        "lm_eval.batch_size": str(options.batch_size),
        "model.trust_remote_code": str(config.model.trust_remote_code).lower(),
    }
    given = [f"{key}={value}" for key, value in words.items()]
    return [sys.executable, "-m", "hybridtrain.cli", "evaluate", str(run_dir), *given]


def _measure(run: Run, *, checkpoint: Path) -> None:
    """Run the command; a failure is a warning: the run itself has ended well."""
    argv = command(run.config, run_dir=run.dir, checkpoint=checkpoint)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS)}
    file = run.dir / "logs" / "lm_eval.log"
    _log.info("lm_eval   %s of %s, log in %s", ", ".join(run.config.lm_eval.tasks), checkpoint.name, file)
    with (
        file.open("w") as stream,
        subprocess.Popen(argv, env=environment, stdout=stream, stderr=stream) as child,
    ):
        while child.poll() is None:
            run.beat()
            time.sleep(0.2)
    if child.returncode:
        last = (file.read_text(errors="replace").strip().splitlines() or [""])[-1]
        _log.warning("lm_eval failed with exit code %d, see %s: %s", child.returncode, file, last)
