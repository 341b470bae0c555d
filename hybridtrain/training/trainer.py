"""Training: checked config -> layout -> run directory -> engine -> loop.

    hybridtrain train --nproc N experiment=... key=value ...                                    `run`
    torchrun --standalone --nproc-per-node N -m hybridtrain.train experiment=... key=value ...  `run`
    hybridtrain.Trainer(config, data=..., callbacks=[...]).fit()                                in a program

`resolve` raises all errors that can be found without torch and the other processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridtrain import engine as engines
from hybridtrain import tasks
from hybridtrain.config import checks, migrate
from hybridtrain.config.schema import Config
from hybridtrain.data.blend import Blend, of_rows
from hybridtrain.errors import LocalError, ReportedElsewhere, UserError, refusal
from hybridtrain.run import identity
from hybridtrain.run.record import read_summary
from hybridtrain.runtime import launch, log
from hybridtrain.training import outcome, resume
from hybridtrain.training.callbacks import Callback, check_callbacks
from hybridtrain.training.job import Job, resolve

if TYPE_CHECKING:
    import torch

    from hybridtrain.run.directory import RunDir
    from hybridtrain.runtime.watchdog import Watchdog
    from hybridtrain.tasks.task import Task
    from hybridtrain.training.loop import StepCounter


@dataclasses.dataclass(frozen=True)
class Result:
    """How a training ended; the same on every rank."""

    run_dir: Path
    status: str
    """finished; interrupted (by a person); preempted (by a scheduler, or at the end of
    the job's time limit)."""
    step: int
    """Optimizer steps done."""
    tokens_seen: int


class Trainer:
    """Trains with a config, and optionally with a program's own data, callbacks and task.

    Under a launcher of several processes (torchrun, srun), each process creates the same Trainer. The run is
    the same as that of `hybridtrain train` with this config: directory, resumption, exports and reports.
    """

    def __init__(
        self,
        config: Config,
        *,
        data: Any = None,
        eval_data: Any = None,
        callbacks: Sequence[Callback] = (),
        task: Task | None = None,
    ):
        """`config`: from `hybridtrain.compose`.

        `data`, `eval_data`: rows instead of the config's data (data/user_rows.py). `task`: the loss
        (tasks/task.py); None: that of task.kind.
        """
        self.config, self.data, self.eval_data, self.callbacks, self.task = (
            config,
            data,
            eval_data,
            tuple(callbacks),
            task,
        )

    def fit(self) -> Result:
        """Train to the end, from the run's newest checkpoint if it has one.

        Raises UserError for errors of the caller; on rank 0 at once and on the others later, so that a
        launcher shows it once.
        """
        try:
            launch.begin()
            log.setup(None)
            config, data = self._check()
            return fit(config, data=data, callbacks=self.callbacks, task=self.task)
        except UserError as error:
            if log.rank() and not isinstance(error, LocalError):
                time.sleep(launch.RANK_0_FIRST_S)
            raise
        except ReportedElsewhere as reported:
            time.sleep(launch.AFTER_RANK_0_S)
            raise SystemExit(reported.code) from None

    def _check(self) -> tuple[Config, Blend | None]:
        """The checked config, and the rows to use instead of its data. Raises UserError."""
        if self.task is not None:
            tasks.check_given(self.task, self.config)
        check_callbacks(self.callbacks)
        if self.data is None:
            if self.eval_data is not None:
                raise refusal(
                    "eval_data",
                    type(self.eval_data).__name__,
                    "there is no `data`",
                    allowed="both, or data alone",
                    instead="data.eval_path=PREFIX",
                )
            checks.check(self.config)
            return self.config, None
        if self.config.train.eval_every and self.eval_data is None:
            problem, instead = (
                "there is no `eval_data`",
                "train.eval_every=0, or Trainer(config, data=..., eval_data=...)",
            )
            raise refusal(
                "train.eval_every",
                self.config.train.eval_every,
                problem,
                allowed="0 without it",
                instead=instead,
            )
        if (kind := self.config.data.kind) != "prepared":
            raise refusal(
                "data.kind",
                kind,
                "rows are given as `data` too",
                allowed="one of the two",
                instead="data.kind=prepared, or no `data`",
            )
        rows = of_rows(
            self.data, self.eval_data, fields=("data", "eval_data"), documents=self.config.data.document_mask
        )
        checks.check(
            dataclasses.replace(
                self.config, data=dataclasses.replace(self.config.data, path=rows.name, blend={})
            )
        )
        unused = dataclasses.replace(self.config.data, path="", blend={}, eval_path="", source=[])
        return dataclasses.replace(self.config, data=unused), rows


def run(config: Config) -> int:
    """`hybridtrain train`."""
    fit(config, data=None, callbacks=(), task=None)
    return 0


def fit(config: Config, *, data: Blend | None, callbacks: Sequence[Callback], task: Task | None) -> Result:
    """Train with a checked config (collective over the launcher's processes).

    `data`: instead of the config's.
    """
    start_s = time.monotonic()
    launch.use_expandable_segments()
    if config.run.callbacks:
        from hybridtrain.training.callbacks import from_config

        callbacks = (*callbacks, *from_config(config))
    config = identity.with_earlier_values(config)
    job = resolve(config, world_size=launch.world_size(), here=True, data=data, task=task)
    run_dir = None
    if not launch.is_launched():  # opens the directory before it imports torch
        run_dir = _open(job)
        if run_dir is None:
            return _finished_result(job.config)
    return _on_all_ranks(job, run_dir=run_dir, start_s=start_s, callbacks=callbacks)


def _finished_result(config: Config) -> Result:
    """The result for a run in which no step is left to train."""
    path = identity.choose(config).path  # may differ from run.dir by a number
    summary = read_summary(path)
    return Result(path, "finished", summary.get("steps") or 0, summary.get("tokens") or 0)


def _open(job: Job) -> RunDir | None:
    """On rank 0: check the model of a new run, and open the run directory; None if no
    step is left to train."""
    config = job.config
    if config.run.resume != "required" and not (Path(config.run.dir) / "config.yaml").is_file():
        from hybridtrain.models.parameters import check as check_model

        check_model(config)  # before the folder of a new run is created
    return resume.open_run(job)


def _on_all_ranks(
    job: Job, *, run_dir: RunDir | None, start_s: float, callbacks: Sequence[Callback]
) -> Result:
    """Connect, compare the ranks, train, and record the end.

    `run_dir`: of a single process; else rank 0 opens it here.
    """
    import torch

    from hybridtrain.parallel import mesh
    from hybridtrain.run.trackers import Trackers
    from hybridtrain.runtime.stop import Stop
    from hybridtrain.training import agreement, attempt
    from hybridtrain.training.loop import StepCounter

    config, device, counter, trackers, watchdog = job.config, mesh.device(), StepCounter(0), Trackers(), None
    try:
        mesh.connect(device, timeout_s=config.engine.timeout_s)
        agreement.agree(config, fingerprints=job.fingerprints | job.evaluated)
        if run_dir is None:
            run_dir = mesh.on_rank0(lambda: _open(job))  # after the checks that may fail without a directory
        if run_dir is None:
            result = mesh.on_rank0(lambda: _finished_result(config))
            mesh.disconnect()
            return result
        counter.step = run_dir.step
        watchdog = _watchdog(job, run_dir=run_dir, counter=counter)
        log.setup(run_dir.logs)
        torch.manual_seed(config.run.seed)
        with Stop([config.run.stop_signal, "TERM", "INT"], before_s=config.run.stop_before_s) as stop:
            engine = _engine(job, device=device, run_dir=run_dir)
            end, status = attempt.train(
                job,
                engine=engine,
                run_dir=run_dir,
                device=device,
                start_s=start_s,
                stop=stop,
                watchdog=watchdog,
                counter=counter,
                trackers=trackers,
                of_user=callbacks,
            )
    except BaseException as error:
        if run_dir is not None:
            if isinstance(error, UserError):
                trackers.finish(failed=True)  # before record_failure removes the directory of a new run
            outcome.record_failure(
                error, run_dir=run_dir, world_size=job.layout.world_size, start_s=start_s, step=counter.step
            )
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


def _watchdog(job: Job, *, run_dir: RunDir, counter: StepCounter) -> Watchdog:
    """The watchdog that ends this rank when a step hangs, and records that in the run directory."""
    from hybridtrain.runtime.watchdog import Watchdog

    def on_hang() -> None:
        outcome.record_hang(run_dir, world_size=job.layout.world_size, step=counter.step)

    return Watchdog(
        run_dir.failures / f"rank-{log.rank()}.stacks", limit_s=job.config.train.max_step_s, hung=on_hang
    )


def _engine(job: Job, *, device: torch.device, run_dir: RunDir) -> Any:
    """The engine of the job, with initial weights unless there is a checkpoint. Sets the options that the run
    keeps, which rank 0 alone has read.
    """
    migrate.keep(job.config, run_dir.kept)
    source = resume.with_available_source(job.config)
    return engines.build_for(
        job.task, source, layout=job.layout, plan=job.plan, device=device, initial=not run_dir.checkpoint
    )
