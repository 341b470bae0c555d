"""The built-in trackers, one row each: how accelerate's object is created, with its files
in the run directory.

A tracker that can work without a server does so, unless its login, environment variables or
config file tell otherwise.
"""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hybridtrain import registry

INIT_S = 30.0  # timeout of wandb.init
UPLOAD_S = 20.0  # timeout of the upload in run.finish(); the data stays on disk for `wandb sync`


@dataclass(frozen=True)
class Place:
    """Names and folder of a tracked run."""

    project: str
    name: str
    folder: Path
    """The tracker's own folder in the run directory."""
    first_step: int
    """Step that this attempt starts from; 0 for a new run."""


class Tracker:
    """Base class of users' trackers: override what is needed.

    Created and called on rank 0, in a thread of its own. An exception is logged as a warning
    and ends the tracker.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def start(self) -> None:
        """Called first."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Receives the run's config, flat, without secrets."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Receives the numbers of a line of metrics.jsonl."""

    def finish(self) -> None:
        """Called when the run has ended, also after a failure."""


@dataclass(frozen=True)
class Kind:
    """A kind of tracker."""

    modules: tuple[str, ...]
    """Modules to import before the tracker's thread starts."""
    environment: Callable[[Path], dict[str, str]]
    """(folder) -> environment variables to set before the import, unless the user has set them."""
    open: Callable[[Place], Any]
    """Creates accelerate's object, in the tracker's thread."""
    fail: Callable[[Any], None]
    """Ends a failed run; the same as `finish` if the tracker does not distinguish."""


def _no_variables(folder: Path) -> dict[str, str]:  # noqa: ARG001 - most trackers are configured by arguments
    return {}


def _finish(tracker: Any) -> None:
    tracker.finish()


def _tensorboard(place: Place) -> Any:
    from accelerate.tracking import TensorBoardTracker

    class OneRun(TensorBoardTracker):
        """Writes hyperparameters only once: TensorBoard lists each set as a run."""

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            if not list(Path(self.logging_dir).glob("*/hparams.yml")):
                super().store_init_configuration(values)

    name = "/".join(
        part for part in f"{place.project}/{place.name}".split("/") if part not in ("", ".", "..")
    )
    # From this step on TensorBoard drops what an earlier attempt has logged.
    return OneRun(name, place.folder, purge_step=place.first_step + 1)


def _wandb(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    import wandb
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in_to_wandb() else "offline")
    online = mode == "online"  # then wandb prints the address of the run
    settings = wandb.Settings(
        init_timeout=INIT_S,
        finish_timeout=UPLOAD_S,
        finish_timeout_raises=True,
        silent=not online,
        console="off",
    )
    # The id is kept in the run directory, so that a resumed run continues the same wandb run.
    id_file = folder / "run-id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8")
    # wandb creates a folder `wandb` in `dir`.
    return WandBTracker(
        project,
        name=name,
        dir=str(folder.parent),
        id=run_id,
        resume="allow" if online else None,
        mode=mode,
        settings=settings,
    )


def logged_in_to_wandb() -> bool:
    """Whether wandb has an API key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return (
            netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(str(host))
            is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False


def _mlflow(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    from accelerate.tracking import MLflowTracker

    # Every attempt is an MLflow run of its own: MLflow parameters cannot change, and a resumed run may have
    # another layout.
    remote = not os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite")
    return MLflowTracker(project, logging_dir=None if remote else str(folder / "artifacts"), run_name=name)


def _wandb_failed(tracker: Any) -> None:
    tracker.run.finish(exit_code=1)


def _mlflow_failed(tracker: Any) -> None:  # noqa: ARG001 - MLflow has a current run
    import mlflow

    mlflow.end_run(status="FAILED")


def _clearml_failed(tracker: Any) -> None:
    tracker.task.mark_failed()
    tracker.finish()


def _mlflow_environment(folder: Path) -> dict[str, str]:
    # The defaults are 7 retries and 120 s.
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    return {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **patience,
    }


def _trackio(place: Place) -> Any:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(
        place.project, name=place.name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
    )


def _dvclive(place: Place) -> Any:
    from accelerate.tracking import DVCLiveTracker

    # Without `resume` DVCLive empties the folder; by default dvc.yaml is in the working directory.
    folder, name = place.folder, place.name  # a folder instead of a project
    return DVCLiveTracker(
        dir=str(folder),
        resume=(folder / "metrics.json").exists(),
        save_dvc_exp=False,
        dvcyaml=str(folder / "dvc.yaml"),
        exp_name=name,
    )


def _swanlab(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    import swanlab
    from accelerate.tracking import SwanLabTracker

    # Upload only numbers and options: no console output, and nothing about the machine, packages or command
    # line. Never ask for a login.
    probe = swanlab.Settings.Probe(
        hardware=False, runtime=False, requirements=False, git=False, monitor=False
    )
    settings = swanlab.Settings(
        probe=probe, terminal=swanlab.Settings.Terminal(proxy_type="none"), interactive=False
    )
    mode = os.environ.get("SWANLAB_MODE") or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")
    return SwanLabTracker(project, name=name, log_dir=str(folder), mode=mode, settings=settings)


def _comet_ml(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    import comet_ml
    from accelerate.tracking import CometMLTracker

    online = bool(os.environ.get("COMET_API_KEY")) or Path("~/.comet.config").expanduser().exists()
    # Upload only numbers and options: neither source code nor console output.
    config = comet_ml.ExperimentConfig(
        name=name,
        offline_directory=str(folder),
        log_code=False,
        log_git_patch=False,
        auto_output_logging="",
        parse_args=False,
    )
    return CometMLTracker(project, online=online, experiment_config=config)


def _clearml(place: Place) -> Any:
    from accelerate.tracking import ClearMLTracker
    from clearml import Task

    if not (
        os.environ.get("CLEARML_API_ACCESS_KEY")
        or Path(os.environ.get("CLEARML_CONFIG_FILE", "~/clearml.conf")).expanduser().exists()
    ):
        Task.set_offline(True)
    # Upload only numbers and options: no patched frameworks, no console output, no uncommitted changes.
    patched = (
        "matplotlib",
        "tensorflow",
        "tensorboard",
        "pytorch",
        "scikit",
        "joblib",
        "hydra",
        "detect_repository",
    )
    quiet = {
        "auto_connect_frameworks": dict.fromkeys(patched, False),
        "auto_connect_arg_parser": False,
        "auto_connect_streams": False,
    }
    return ClearMLTracker(
        place.name,
        project_name=place.project,
        task_name=place.name,
        reuse_last_task_id=False,
        auto_resource_monitoring=False,
        **quiet,
    )


_ACCELERATE = ("accelerate.tracking",)
KINDS: dict[str, Kind] = {
    "tensorboard": Kind((*_ACCELERATE, "torch.utils.tensorboard"), _no_variables, _tensorboard, _finish),
    "wandb": Kind((*_ACCELERATE, "wandb"), _no_variables, _wandb, _wandb_failed),
    "mlflow": Kind((*_ACCELERATE, "mlflow"), _mlflow_environment, _mlflow, _mlflow_failed),
    "trackio": Kind(
        (*_ACCELERATE, "trackio"), lambda folder: {"TRACKIO_DIR": str(folder)}, _trackio, _finish
    ),
    "dvclive": Kind((*_ACCELERATE, "dvclive", "dvclive.plots"), _no_variables, _dvclive, _finish),
    "swanlab": Kind((*_ACCELERATE, "swanlab"), _no_variables, _swanlab, _finish),
    "comet_ml": Kind((*_ACCELERATE, "comet_ml"), _no_variables, _comet_ml, _finish),
    "clearml": Kind(
        (*_ACCELERATE, "clearml"),
        lambda folder: {"CLEARML_CACHE_DIR": str(folder)},
        _clearml,
        _clearml_failed,
    ),
}


def kind_of(name: str) -> Kind:
    """The row of a tracker, built in or registered by a user. Raises UserError for an unknown name."""
    factory = registry.lookup("tracker", name)
    return KINDS[name] if factory is None else Kind((), _no_variables, factory, _finish)
