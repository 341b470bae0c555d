"""Opens a run on rank 0: finds the checkpoint to resume from, or to branch from, before the ranks train.

    lock the directory -> newest checkpoint, or the one to branch from -> anything left to train? -> remove a
    crash's leftovers -> config.yaml, summary.json, event of the start

After an error, the directory is as before; a new one is not created. No torch, except
to check pretrained weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hybridtrain.checkpoint import export_record, marker
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.compose import read_run, to_yaml
from hybridtrain.config.schema import CheckpointConfig, Config
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import config_diff
from hybridtrain.plan import notation
from hybridtrain.run import identity, start
from hybridtrain.run.directory import RunDir
from hybridtrain.run.record import read_summary, record_finished, record_lost
from hybridtrain.run.start import LockedRun
from hybridtrain.runtime import failure, host, log
from hybridtrain.runtime.files import read_object, remove_stale_temporaries, unwritable, write_json
from hybridtrain.types import Progress

if TYPE_CHECKING:
    from hybridtrain.training.job import Job

_log = log.get("train")
BRANCH = "branch.json"
"""File of a branched run that names the checkpoint it started from, also if the original
run has newer ones."""


def open_run(job: Job) -> RunDir | None:
    """Lock and open the run directory on rank 0. None if no step is left to train, which is logged.

    Raises UserError.
    """
    config, locked = job.config, start.lock_run(job.config)
    try:
        manager = Manager(locked.path / "checkpoints", settings=config.checkpoint)
        checkpoint = manager.latest() if locked.before is not None else None
        if config.run.resume == "required" and checkpoint is None:
            raise identity.not_resumable(locked.path, words="")
        progress = _progress_of(checkpoint, job=job) if checkpoint else Progress(0, 0, {})
        if checkpoint and (
            progress.step >= job.total_steps or _ended_by_program(job, locked=locked, step=progress.step)
        ):
            _log_finished(job, locked=locked, progress=progress)
            manager.sweep()
            remove_stale_temporaries(locked.path)
            locked.leave()
            return None
        origin = None
        if config.run.branch_from and checkpoint is None:
            checkpoint = origin = _origin(config, run=locked.path)
            progress = _branch_progress(origin, job=job)
        if checkpoint is None:
            _check_weights(config)
        else:
            _check_model_config(with_available_source(config), checkpoint=checkpoint)
        manager.sweep()
        remove_stale_temporaries(locked.path)
        run_dir = start.begin(
            locked,
            config,
            yaml_text=to_yaml(config),
            versions=host.versions(),
            checkpoint=checkpoint,
            step=progress.step,
        )
        if origin:
            _record_origin(origin, run=locked.path, progress=progress)
        run_dir.truncate(progress.step)
        _record_start(job, run_dir=run_dir, origin=origin)
    except BaseException:
        locked.leave()
        raise
    return run_dir


def finished_steps(run: Path) -> int:
    """Steps done at the newest complete checkpoint of a run; 0 without one.

    Raises UserError for a damaged one.
    """
    newest = Manager(run / "checkpoints", settings=CheckpointConfig()).latest()
    return marker.read_progress(newest).step if newest else 0


def _record_start(job: Job, *, run_dir: RunDir, origin: Path | None) -> None:
    """Record the start of an attempt in summary and events.

    Changed options are named without values, which may be secrets.
    """
    layout, world, parameters = (
        notation.write(job.config.parallel, job.layout),
        job.layout.world_size,
        job.facts.parameters,
    )
    run_dir.update_summary(
        layout=layout,
        world_size=world,
        parameters=parameters,
        total_steps=job.total_steps,
        steps=run_dir.step,
    )
    if run_dir.lost:
        failure.of_lost_attempt(run_dir.failures.with_name(f"life-{run_dir.attempt - 1}"))
        record_lost(run_dir.path, lost=run_dir.lost, step=run_dir.step)
        _log.warning("%s", run_dir.lost)
    details = [f"{layout} on {world} process{'es' if world > 1 else ''}"]
    if origin:
        details += [f"branched from {origin} at step {run_dir.step}"]
    else:
        details += (
            [f"from {run_dir.checkpoint.name}"]
            if run_dir.checkpoint
            else ["again, there was no complete checkpoint"]
            if run_dir.continued
            else []
        )
    details += ["changed: " + ", ".join(run_dir.changed)] if run_dir.changed else []
    run_dir.append_event(
        "resumed" if run_dir.checkpoint and not origin else "started",
        step=run_dir.step,
        detail="; ".join(details),
    )


def _progress_of(checkpoint: Path, *, job: Job) -> Progress:
    """The progress of a checkpoint, after checks of its files' sizes and of its fingerprints.

    Contents are checked later, by all ranks.
    """
    marker.check_sizes(checkpoint, files=sorted(marker.read(checkpoint).items()))
    progress = marker.read_progress(checkpoint)
    changed = _check_fingerprints(
        progress, checkpoint=checkpoint, job=job, allow_data_change=job.config.run.allow_data_change
    )
    if changed:
        _log.warning("resuming with other data: %s", ", ".join(changed))
    return progress


def _check_fingerprints(
    progress: Progress, *, checkpoint: Path, job: Job, allow_data_change: bool
) -> tuple[str, ...]:
    """`identity.check_fingerprints`; for another model, the error names the fields that differ if the
    checkpoint has a config.json.
    """
    if (
        progress.fingerprints.get("model") != job.fingerprints["model"]
        and (checkpoint / marker.CONFIG).is_file()
    ):
        _check_model_config(with_available_source(job.config), checkpoint=checkpoint)
    data, run = job.config.data, checkpoint.parent.parent
    option = (
        ("data.blend", ", ".join(data.blend))
        if data.blend
        else ("data.path", data.path)
        if data.path
        else ("data", job.data.name)
    )
    return identity.check_fingerprints(
        progress, fingerprints=job.fingerprints, data=option, run=run, allow_data_change=allow_data_change
    )


def _check_weights(config: Config) -> None:
    """Raise UserError for pretrained weights that do not fit the model. For runs without a checkpoint."""
    if not config.model.from_pretrained:
        return
    from hybridtrain.models import load
    from hybridtrain.models.build import hf_config
    from hybridtrain.models.source import read_config

    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    export_record.check(Path(config.model.from_pretrained), field="model.from_pretrained")
    load.check(config.model, built, adapters=config.adapters)


def with_available_source(config: Config) -> Config:
    """`config`, with the newest checkpoint as model.from_pretrained if a run is resumed and that
    is no folder here.

    Only its config.json is read, because the weights come from the checkpoint. Checkpoints of earlier
    releases have none: then the run's folder model/ is used.
    """
    source = config.model.from_pretrained
    if not source or Path(source).is_dir() or config.adapters.kind != "none":
        return config  # with adapters, the weights come from the source
    try:
        run = identity.choose(config).path  # may differ from run.dir by a number
    except UserError:  # raised again when the directory is opened
        return config
    manager = Manager(run / "checkpoints", settings=config.checkpoint)
    steps = manager.steps()
    folders = [manager.path(steps[-1]), run / "model"] if steps else []
    folder = next((folder for folder in folders if (folder / marker.CONFIG).is_file()), None)
    return (
        dataclasses.replace(config, model=dataclasses.replace(config.model, from_pretrained=str(folder)))
        if folder
        else config
    )


def _check_model_config(config: Config, *, checkpoint: Path) -> None:
    """Raise UserError if the model differs from the checkpoint's in any field of config.json; warn if the
    run's copy was edited.

    The model's fingerprint covers sizes only, and the config.json that a run starts from may
    be edited between attempts.
    """
    of_checkpoint, of_run = checkpoint / marker.CONFIG, checkpoint.parent.parent / "model" / marker.CONFIG
    records = {name: record for name, record in marker.read(checkpoint).items() if name == marker.CONFIG}
    marker.verify(checkpoint, files=records.items())
    file = of_checkpoint if records else of_run
    try:
        before = read_object(file, field="checkpoint")
    except UserError as error:
        if records:
            raise
        _log.warning("cannot check whether the model is the same as before: %s", str(error).splitlines()[0])
        return
    from hybridtrain.models.build import hf_config
    from hybridtrain.models.saved_config import saved_fields
    from hybridtrain.models.source import read_config

    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    if changed := config_diff.model_changes(before, saved_fields(built)):
        problem = f"{file} is of another model: {config_diff.describe(changed)}"
        instead = (
            "the config.json that the run began with, "
            "or a new run with model.from_pretrained=<export of this run>"
        )
        raise refusal(
            "model",
            config.model.from_pretrained or built.model_type,
            problem,
            allowed="the model that the run began with",
            instead=instead,
        )
    with contextlib.suppress(UserError):
        if records and (edited := config_diff.changes(before, read_object(of_run, field="run.dir"))):
            _log.warning(
                "%s has changed since %s was written (%s); the checkpoint's is used",
                of_run,
                checkpoint.name,
                config_diff.describe(edited),
            )


def _ended_by_program(job: Job, *, locked: LockedRun, step: int) -> bool:
    """Whether a callback ended the run at this step, and the command is the same as before."""
    summary = read_summary(locked.path)
    same = locked.before is not None and not identity.changes(locked.before, job.config)
    return same and summary.get("status") == "finished" and summary.get("steps") == step


def _log_finished(job: Job, *, locked: LockedRun, progress: Progress) -> None:
    """Log that no step is left to train, and record it in the run directory if the last attempt did not."""
    steps, total = progress.step, job.total_steps
    hint = "a larger train.steps (or tokens, epochs) goes on, another run.dir or run.name starts anew"
    if steps > total:
        _log.warning(
            "%s has done %d steps, and is asked to end after %d: nothing is left to do (%s)",
            locked.path,
            steps,
            total,
            hint,
        )
        return
    summary = read_summary(locked.path)
    if summary.get("status") != "finished":
        record_finished(locked.path, step=steps, tokens=progress.tokens_seen)
    reason = f" ({summary.get('exit_reason')})" if steps < total else ""
    _log.info(
        "%s is finished%s, %d of %d steps are done: nothing is left to do (%s)",
        locked.path,
        reason,
        steps,
        total,
        hint,
    )


def _origin(config: Config, *, run: Path) -> Path:
    """The checkpoint that a branch starts from: the recorded one, else the newest of run.branch_from.

    Raises UserError.
    """
    if (run / BRANCH).exists():
        return Path(str(read_object(run / BRANCH, field="run.dir").get("checkpoint", "")))
    source = Path(config.run.branch_from)
    if marker.is_complete(source):
        return source.resolve()
    newest = (
        Manager(source / "checkpoints", settings=CheckpointConfig()).latest() if source.is_dir() else None
    )
    if newest is None:
        problem = "there is no complete checkpoint in it" if source.is_dir() else "there is no such folder"
        raise refusal(
            "run.branch_from",
            source,
            problem,
            allowed="a run with a complete checkpoint, or such a checkpoint",
            instead="run.branch_from=RUN",
        )
    return newest.resolve()


def _branch_progress(origin: Path, *, job: Job) -> Progress:
    """The progress of the checkpoint to branch from.

    Raises UserError if it is damaged, of another model, or at the end.
    """
    marker.check_sizes(origin, files=sorted(marker.read(origin).items()))
    progress = marker.read_progress(origin)
    config_file = origin.parent.parent / "config.yaml"
    differing = identity.model_differences(read_run(config_file), job.config) if config_file.is_file() else {}
    if differing:
        problem = f"it is of another model: {identity.describe(differing)}"
        raise refusal(
            "run.branch_from",
            origin,
            problem,
            allowed="the same model section",
            instead="the model of that run",
        )
    if config_file.is_file() and (kind := read_run(config_file).optim.kind) != job.config.optim.kind:
        problem, instead = (
            f"the checkpoint's optimizer state is that of {kind}",
            f"optim.kind={kind}, or model.from_pretrained=<export of that run>",
        )
        raise refusal(
            "optim.kind",
            job.config.optim.kind,
            problem,
            allowed="the optimizer of the run that it branches from",
            instead=instead,
        )
    _check_fingerprints(progress, checkpoint=origin, job=job, allow_data_change=True)
    if progress.step >= job.total_steps:
        problem = f"run.branch_from has done {progress.step} steps already"
        raise refusal(
            "train",
            f"{job.total_steps} steps",
            problem,
            allowed=f"an end after step {progress.step}",
            instead=f"train.steps={2 * progress.step}",
        )
    return progress


def _record_origin(origin: Path, *, run: Path, progress: Progress) -> None:
    content = {
        "checkpoint": str(origin),
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "fingerprints": dict(progress.fingerprints),
    }
    try:
        if not (run / BRANCH).exists():
            write_json(run / BRANCH, content)
    except OSError as error:
        raise unwritable("run.dir", run, error) from error
