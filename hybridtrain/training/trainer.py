"""Training: checked config -> layout -> run directory -> engine -> loop.

    hybridtrain train --nproc N experiment=... key=value ...                                    `run`
    torchrun --standalone --nproc-per-node N -m hybridtrain.train experiment=... key=value ...  `run`
    hybridtrain.Trainer(config, data=..., callbacks=[...]).fit()                                from a program of yours

Everything that can be refused without torch and without the other processes is refused in `resolve`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import engine as engines
from hybridtrain import tasks
from hybridtrain.config import checks
from hybridtrain.config.schema import Config
from hybridtrain.data.blend import Blend, of_rows
from hybridtrain.errors import LocalError, ReportedElsewhere, UserError, refusal
from hybridtrain.run import identity
from hybridtrain.run.record import read_summary
from hybridtrain.runtime import launch, log
from hybridtrain.training import outcome, resume
from hybridtrain.training.job import Job, resolve

if TYPE_CHECKING:
    import torch

    from hybridtrain.run.directory import RunDir
    from hybridtrain.runtime.watchdog import Watchdog
    from hybridtrain.tasks.task import Task
    from hybridtrain.training.callbacks import Callback
    from hybridtrain.training.loop import Done


@dataclasses.dataclass(frozen=True)
class Result:
    """How a training ended, the same on every rank."""

    run_dir: Path
    status: str
    """finished; interrupted (by a person); preempted (by a scheduler, or the end of the job's time)."""
    step: int
    """Optimizer steps of the run."""
    tokens_seen: int


class Trainer:
    """Trains as a config says, with data and callbacks of a program's own.

    Under a launcher of several processes (torchrun, srun) each of them makes the same Trainer. A run is the one that `hybridtrain train`
    makes of the same config: its directory, resumption, exports and reports are the same.
    """

    def __init__(self, config: Config, *, data: Any = None, eval_data: Any = None, callbacks: Sequence[Callback] = (), task: Task | None = None):
        """`config`: of `hybridtrain.compose`. `data`, `eval_data`: rows in place of the config's data (data/own.py tells what a row is).

        `task`: what is learnt (tasks/task.py); None: what task.kind names.
        """
        self.config, self.data, self.eval_data, self.callbacks, self.task = config, data, eval_data, tuple(callbacks), task

    def fit(self) -> Result:
        """Train to the end, from the run's newest checkpoint if it has one.

        Raises UserError for what the caller can put right; rank 0 at once and the others later, so that a launcher shows it once.
        """
        try:
            launch.begin()
            log.setup(None)
            config, data = self._checked()
            return fit(config, data=data, callbacks=self.callbacks, task=self.task)
        except UserError as error:
            if log.rank() and not isinstance(error, LocalError):
                time.sleep(launch.RANK_0_FIRST_S)
            raise
        except ReportedElsewhere as answered:
            time.sleep(launch.AFTER_RANK_0_S)
            raise SystemExit(answered.code) from None

    def _checked(self) -> tuple[Config, Blend | None]:
        """The config, and the rows that take the place of its data."""
        if self.task is not None:
            tasks.check_given(self.task, self.config)
        if self.data is None:
            if self.eval_data is not None:
                raise refusal("eval_data", type(self.eval_data).__name__, "there is no `data`", allowed="both, or data alone", instead="data.eval_path=PREFIX")
            checks.check(self.config)
            return self.config, None
        if self.config.train.eval_every and self.eval_data is None:
            problem, instead = "there is no `eval_data`", "train.eval_every=0, or Trainer(config, data=..., eval_data=...)"
            raise refusal("train.eval_every", self.config.train.eval_every, problem, allowed="0 without it", instead=instead)
        if (kind := self.config.data.kind) != "prepared":
            raise refusal("data.kind", kind, "rows are given as `data`, too", allowed="one of the two", instead="data.kind=prepared, or no `data`")
        rows = of_rows(self.data, self.eval_data, fields=("data", "eval_data"), documents=self.config.data.document_mask)
        checks.check(dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, path=rows.name, blend={})))
        own = dataclasses.replace(self.config.data, path="", blend={}, eval_path="", source=[])
        return dataclasses.replace(self.config, data=own), rows


def run(config: Config) -> int:
    """`hybridtrain train`."""
    fit(config, data=None, callbacks=(), task=None)
    return 0


def fit(config: Config, *, data: Blend | None, callbacks: Sequence[Callback], task: Task | None) -> Result:
    """Train as a checked config says (collective over the launcher's processes). `data`: in place of what the config names."""
    began = time.monotonic()
    launch.use_expandable_segments()
    if config.run.callbacks:
        from hybridtrain.training.callbacks import registered

        callbacks = (*callbacks, *registered(config))
    job = resolve(config, world_size=launch.world_size(), here=True, data=data, task=task)
    run_dir = None
    if not launch.is_launched():  # a process alone: refused before torch is imported
        run_dir = _opened(job)
        if run_dir is None:
            return _finished(job.config)
    return _on_all_ranks(job, run_dir=run_dir, began=began, callbacks=callbacks)


def _finished(config: Config) -> Result:
    """Of a run that was at its end already."""
    path = identity.choose(config).path  # which may be another than run.dir, of the next number
    summary = read_summary(path)
    return Result(path, "finished", summary.get("steps") or 0, summary.get("tokens") or 0)


def _opened(job: Job) -> RunDir | None:
    """Rank 0: what only it looks at, and then the run directory; None: nothing is left to do."""
    config = job.config
    if config.run.resume != "required" and not (Path(config.run.dir) / "config.yaml").is_file():
        from hybridtrain.models.build import check as check_model

        check_model(config)  # a new run: what transformers refuses leaves no folder behind
    return resume.open_run(job)


def _on_all_ranks(job: Job, *, run_dir: RunDir | None, began: float, callbacks: Sequence[Callback]) -> Result:
    """Meet, agree, train, and note how it ended. `run_dir`: of a process alone; else rank 0 opens it once all are there."""
    import torch

    from hybridtrain.parallel import mesh
    from hybridtrain.run.trackers import Trackers
    from hybridtrain.runtime.stop import Stop
    from hybridtrain.training import agreement, attempt
    from hybridtrain.training.loop import Done

    config, device, done, trackers, watchdog = job.config, mesh.device(), Done(0), Trackers(), None
    try:
        mesh.connect(device, timeout_s=config.engine.timeout_s)
        agreement.agree(config, fingerprints=job.fingerprints | job.evaluated)
        if run_dir is None:
            run_dir = mesh.on_rank0(lambda: _opened(job))  # a start that does not come about leaves no trace
        if run_dir is None:
            result = mesh.on_rank0(lambda: _finished(config))
            mesh.disconnect()
            return result
        done.step = run_dir.step
        watchdog = _watchdog(job, run_dir=run_dir, done=done)
        log.setup(run_dir.logs)
        torch.manual_seed(config.run.seed)
        with Stop([config.run.stop_signal, "TERM", "INT"], before_s=config.run.stop_before_s) as stop:
            engine = _engine(job, device=device, initial=not run_dir.checkpoint)
            end, status = attempt.train(
                job,
                engine=engine,
                run_dir=run_dir,
                device=device,
                began=began,
                stop=stop,
                watchdog=watchdog,
                done=done,
                trackers=trackers,
                of_user=callbacks,
            )
    except BaseException as error:
        if run_dir is not None:
            if isinstance(error, UserError):
                trackers.finish(failed=True)  # a new run that is refused takes its files back
            outcome.record_failure(error, run_dir=run_dir, world_size=job.layout.world_size, began=began, step=done.step)
            trackers.finish(failed=True)
        raise
    finally:
        if watchdog:
            watchdog.close()
        if run_dir is not None:
            run_dir.close()
    engine.close()
    mesh.disconnect()
    return Result(run_dir.path, status, end.step, end.tokens_seen)


def _watchdog(job: Job, *, run_dir: RunDir, done: Done) -> Watchdog:
    """What ends this rank when a step hangs, and notes that in the run's directory."""
    from hybridtrain.runtime.watchdog import Watchdog

    def hung() -> None:
        outcome.record_hang(run_dir, world_size=job.layout.world_size, step=done.step)

    return Watchdog(run_dir.failures / f"rank-{log.rank()}.stacks", limit_s=job.config.train.max_step_s, hung=hung)


def _engine(job: Job, *, device: torch.device, initial: bool) -> Any:
    """The engine of the job; `initial`: with the weights that a run begins from."""
    source = resume.source_at_hand(job.config)
    return engines.build_for(job.task, source, layout=job.layout, plan=job.plan, device=device, initial=initial)
