"""Where a run goes on: rank 0's decision before the ranks train.

    enter the directory alone -> its newest checkpoint, or the one that it branches from -> nothing left to do? -> clear what a crash left
    -> config.yaml, summary.json, the event of the start

What is refused leaves the directory as it was, and makes none. No torch, except to check pretrained weights.
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
"""In a run that branched: the checkpoint that it began from, which stays the same when that run goes on."""


def open_run(job: Job) -> RunDir | None:
    """Rank 0: the run directory, entered alone, with the checkpoint to go on from; None: nothing is left to do, and that is logged. Raises UserError."""
    config, locked = job.config, start.lock_run(job.config)
    try:
        manager = Manager(locked.path / "checkpoints", settings=config.checkpoint)
        checkpoint = manager.latest() if locked.before is not None else None
        if config.run.resume == "required" and checkpoint is None:
            raise identity.not_resumable(locked.path, words="")
        progress = _progress_of(checkpoint, job=job) if checkpoint else Progress(0, 0, {})
        if checkpoint and (progress.step >= job.total_steps or _ended_by_program(job, locked=locked, step=progress.step)):
            _nothing_left(job, locked=locked, progress=progress)
            manager.sweep()
            remove_stale_temporaries(locked.path)
            locked.leave()
            return None
        origin = None
        if config.run.branch_from and checkpoint is None:
            checkpoint = origin = _origin(config, run=locked.path)
            progress = _branched(origin, job=job)
        if checkpoint is None:
            _check_weights(config)
        else:
            _check_described(source_at_hand(config), checkpoint=checkpoint)
        manager.sweep()
        remove_stale_temporaries(locked.path)
        run_dir = start.begin(locked, config, yaml_text=to_yaml(config), versions=host.versions(), checkpoint=checkpoint, step=progress.step)
        if origin:
            _pin(origin, run=locked.path, progress=progress)
        run_dir.truncate(progress.step)
        _record_start(job, run_dir=run_dir, origin=origin)
    except BaseException:
        locked.leave()
        raise
    return run_dir


def finished_steps(run: Path) -> int:
    """Steps in the newest complete checkpoint of a run; 0 without one. Raises UserError for a checkpoint that is not what its name says."""
    newest = Manager(run / "checkpoints", settings=CheckpointConfig()).latest()
    return marker.read_progress(newest).step if newest else 0


def _record_start(job: Job, *, run_dir: RunDir, origin: Path | None) -> None:
    """What begins here, for whoever looks at the run: in the summary, and as an event. Names of changed options, not values: these may be secrets."""
    layout, world, parameters = notation.write(job.config.parallel, job.layout), job.layout.world_size, job.facts.parameters
    run_dir.update_summary(layout=layout, world_size=world, parameters=parameters, total_steps=job.total_steps, steps=run_dir.step)
    if run_dir.lost:
        failure.of_lost_attempt(run_dir.failures.with_name(f"life-{run_dir.attempt - 1}"))
        record_lost(run_dir.path, lost=run_dir.lost, step=run_dir.step)
        _log.warning("%s", run_dir.lost)
    words = [f"{layout} on {world} process{'es' if world > 1 else ''}"]
    if origin:
        words += [f"branched from {origin} at step {run_dir.step}"]
    else:
        words += [f"from {run_dir.checkpoint.name}"] if run_dir.checkpoint else ["again, there was no complete checkpoint"] if run_dir.continued else []
    words += ["changed: " + ", ".join(run_dir.changed)] if run_dir.changed else []
    run_dir.append_event("resumed" if run_dir.checkpoint and not origin else "started", step=run_dir.step, detail="; ".join(words))


def _progress_of(checkpoint: Path, *, job: Job) -> Progress:
    """Where a checkpoint stands, if it is whole as far as sizes tell (contents are checked by all ranks together) and of this model and data."""
    marker.check_sizes(checkpoint, files=sorted(marker.read(checkpoint).items()))
    progress = marker.read_progress(checkpoint)
    changed = _check_fingerprints(progress, checkpoint=checkpoint, job=job, allow_data_change=job.config.run.allow_data_change)
    if changed:
        _log.warning("resuming with other data: %s", ", ".join(changed))
    return progress


def _check_fingerprints(progress: Progress, *, checkpoint: Path, job: Job, allow_data_change: bool) -> tuple[str, ...]:
    """`identity.check_fingerprints`; of another model the fields that differ are named, where the checkpoint has them."""
    if progress.fingerprints.get("model") != job.fingerprints["model"] and (checkpoint / marker.CONFIG).is_file():
        _check_described(source_at_hand(job.config), checkpoint=checkpoint)
    data, run = job.config.data, checkpoint.parent.parent
    named = ("data.blend", ", ".join(data.blend)) if data.blend else ("data.path", data.path) if data.path else ("data", job.data.name)
    return identity.check_fingerprints(progress, fingerprints=job.fingerprints, data=named, run=run, allow_data_change=allow_data_change)


def _check_weights(config: Config) -> None:
    """Refuse weights that do not go with the model; a run that has a checkpoint does not read them (raises UserError)."""
    if not config.model.from_pretrained:
        return
    from hybridtrain.models import load
    from hybridtrain.models.build import hf_config
    from hybridtrain.models.facts import read_config
    from hybridtrain.models.family import family_for

    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    export_record.check(Path(config.model.from_pretrained), field="model.from_pretrained")
    load.check(config.model, built, family=family_for(built))


def source_at_hand(config: Config) -> Config:
    """`config`; where a run goes on whose pretrained model is not in a folder here (any more), with the config.json of its newest checkpoint instead.

    Weights come from the checkpoint, so neither the folder nor the hub is needed. Checkpoints of earlier releases have no config.json: then
    the run's own copy is taken.
    """
    source = config.model.from_pretrained
    if not source or Path(source).is_dir():
        return config
    try:
        run = identity.choose(config).path  # which may be another than run.dir, of the next number
    except UserError:  # refused by name when the directory is opened
        return config
    manager = Manager(run / "checkpoints", settings=config.checkpoint)
    steps = manager.steps()
    places = [manager.path(steps[-1]), run / "model"] if steps else []
    here = next((place for place in places if (place / marker.CONFIG).is_file()), None)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, from_pretrained=str(here))) if here else config


def _check_described(config: Config, *, checkpoint: Path) -> None:
    """Refuse a model that is built otherwise than the one that the checkpoint is of, down to its rotary positions; a copy that was edited is warned of.

    The model's fingerprint holds sizes only, and the config.json that a run starts from may be edited while the run stands still.
    """
    sealed, beside = checkpoint / marker.CONFIG, checkpoint.parent.parent / "model" / marker.CONFIG
    records = {name: record for name, record in marker.read(checkpoint).items() if name == marker.CONFIG}
    marker.verify(checkpoint, files=records.items())
    file = sealed if records else beside
    try:
        before = read_object(file, field="checkpoint")
    except UserError as error:
        if records:
            raise
        _log.warning("it is not known whether the model is built as it was: %s", str(error).splitlines()[0])
        return
    from hybridtrain.models.build import hf_config, saved_fields
    from hybridtrain.models.facts import read_config

    built = hf_config(read_config(config.model), chosen=config.model.config, attention=config.model.attention)
    if found := config_diff.model_changes(before, saved_fields(built)):
        problem = f"{file} is of another model: {config_diff.describe(found)}"
        instead = "the config.json that the run began with, or a new run with model.from_pretrained=<export of this run>"
        raise refusal("model", config.model.from_pretrained or built.model_type, problem, allowed="the model that the run began with", instead=instead)
    with contextlib.suppress(UserError):
        if records and (edited := config_diff.changes(before, read_object(beside, field="run.dir"))):
            _log.warning("%s has changed since %s was written (%s); the checkpoint's holds", beside, checkpoint.name, config_diff.describe(edited))


def _ended_by_program(job: Job, *, locked: LockedRun, step: int) -> bool:
    """Whether a callback has ended the run at this step, and the command is the same as then."""
    summary = read_summary(locked.path)
    same = locked.before is not None and not identity.changes(locked.before, job.config)
    return same and summary.get("status") == "finished" and summary.get("steps") == step


def _nothing_left(job: Job, *, locked: LockedRun, progress: Progress) -> None:
    """Say that the run is at its end; if its last attempt could not write that down, do."""
    steps, asked = progress.step, job.total_steps
    on = "a larger train.steps (or tokens, epochs) goes on, another run.dir or run.name starts anew"
    if steps > asked:
        _log.warning("%s has done %d steps, and is asked to end after %d: nothing is left to do (%s)", locked.path, steps, asked, on)
        return
    summary = read_summary(locked.path)
    if summary.get("status") != "finished":
        record_finished(locked.path, step=steps, tokens=progress.tokens_seen)
    why = f" ({summary.get('exit_reason')})" if steps < asked else ""
    _log.info("%s is finished%s, %d of %d steps are done: nothing is left to do (%s)", locked.path, why, steps, asked, on)


def _origin(config: Config, *, run: Path) -> Path:
    """The checkpoint that a branch begins from: the one noted when it began first, else the newest of run.branch_from. Raises UserError."""
    if (run / BRANCH).exists():
        return Path(str(read_object(run / BRANCH, field="run.dir").get("checkpoint", "")))
    source = Path(config.run.branch_from)
    if marker.is_complete(source):
        return source.resolve()
    newest = Manager(source / "checkpoints", settings=CheckpointConfig()).latest() if source.is_dir() else None
    if newest is None:
        problem = "there is no complete checkpoint in it" if source.is_dir() else "there is no such folder"
        raise refusal("run.branch_from", source, problem, allowed="a run with a complete checkpoint, or such a checkpoint", instead="run.branch_from=RUN")
    return newest.resolve()


def _branched(origin: Path, *, job: Job) -> Progress:
    """Where the branch begins, once the source is known to be whole, of the same model, and before the end. Raises UserError."""
    marker.check_sizes(origin, files=sorted(marker.read(origin).items()))
    progress = marker.read_progress(origin)
    theirs = origin.parent.parent / "config.yaml"
    differing = identity.model_differences(read_run(theirs), job.config) if theirs.is_file() else {}
    if differing:
        problem = f"it is of another model: {identity.describe(differing)}"
        raise refusal("run.branch_from", origin, problem, allowed="the same model section", instead="the model of that run")
    if theirs.is_file() and (kind := read_run(theirs).optim.kind) != job.config.optim.kind:
        problem, instead = f"the checkpoint's optimizer state is that of {kind}", f"optim.kind={kind}, or model.from_pretrained=<export of that run>"
        raise refusal("optim.kind", job.config.optim.kind, problem, allowed="the optimizer of the run that it branches from", instead=instead)
    _check_fingerprints(progress, checkpoint=origin, job=job, allow_data_change=True)
    if progress.step >= job.total_steps:
        problem = f"run.branch_from has done {progress.step} steps already"
        raise refusal("train", f"{job.total_steps} steps", problem, allowed=f"an end after step {progress.step}", instead=f"train.steps={2 * progress.step}")
    return progress


def _pin(origin: Path, *, run: Path, progress: Progress) -> None:
    content = {"checkpoint": str(origin), "step": progress.step, "tokens_seen": progress.tokens_seen, "fingerprints": dict(progress.fingerprints)}
    try:
        if not (run / BRANCH).exists():
            write_json(run / BRANCH, content)
    except OSError as error:
        raise unwritable("run.dir", run, error) from error
