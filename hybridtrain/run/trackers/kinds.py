"""The trackers there are, one row each: how accelerate's class for it is made, and how its files are kept in the run directory.

A tracker that can work without a server does so unless its own login, environment variables or configuration file say otherwise.
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

INIT_S = 30.0  # wandb.init gives up after so long
UPLOAD_S = 20.0  # and run.finish() stops uploading after so long; the data stays on disk for `wandb sync`


@dataclass(frozen=True)
class Place:
    """Where a run is tracked."""

    project: str
    name: str
    folder: Path
    """The tracker's own, in the run directory."""
    first_step: int
    """Steps that were done before this start; 0 for a new run."""


class Tracker:
    """A tracker of a user's own: override what is needed. Made and called on a thread of its own, on rank 0; what it raises costs a warning."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def start(self) -> None:
        """Before anything else."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The run's configuration, flat, without secrets."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """The numbers of a line of metrics.jsonl."""

    def finish(self) -> None:
        """The run has ended, well or not."""


@dataclass(frozen=True)
class Kind:
    """A tracker: `open` makes accelerate's object on the tracker's own thread, in a folder of its own."""

    modules: tuple[str, ...]
    """What to import before that thread starts."""
    environment: Callable[[Path], dict[str, str]]
    """Variables to set before the import, where the user has not set them."""
    open: Callable[[Place], Any]
    fail: Callable[[Any], None]
    """Ends a run that failed; as `finish` where the tracker has no word for it."""


def _no_variables(folder: Path) -> dict[str, str]:  # noqa: ARG001 - most trackers are told by arguments
    return {}


def _finish(tracker: Any) -> None:
    tracker.finish()


def _tensorboard(place: Place) -> Any:
    from accelerate.tracking import TensorBoardTracker

    class OneRun(TensorBoardTracker):
        """Every start makes a session of hyperparameters, which TensorBoard lists as a run: the first start's is enough."""

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            if not list(Path(self.logging_dir).glob("*/hparams.yml")):
                super().store_init_configuration(values)

    name = "/".join(part for part in f"{place.project}/{place.name}".split("/") if part not in ("", ".", ".."))
    # What an earlier start logged after the checkpoint is logged again: TensorBoard leaves it out from this step on.
    return OneRun(name, place.folder, purge_step=place.first_step + 1)


def _wandb(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    import wandb
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in_to_wandb() else "offline")
    online = mode == "online"  # then wandb prints the address of the run
    settings = wandb.Settings(init_timeout=INIT_S, finish_timeout=UPLOAD_S, finish_timeout_raises=True, silent=not online, console="off")
    # The id stays with the run directory, so that a resumed run goes on in the same wandb run.
    id_file = folder / "run-id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8")
    # wandb adds a folder `wandb` of its own below `dir`.
    return WandBTracker(project, name=name, dir=str(folder.parent), id=run_id, resume="allow" if online else None, mode=mode, settings=settings)


def logged_in_to_wandb() -> bool:
    """Whether wandb would find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _mlflow(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    from accelerate.tracking import MLflowTracker

    # Every start is an MLflow run of its own: MLflow refuses to change a parameter, and a resume may change the layout.
    remote = not os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite")
    return MLflowTracker(project, logging_dir=None if remote else str(folder / "artifacts"), run_name=name)


def _wandb_failed(tracker: Any) -> None:
    tracker.run.finish(exit_code=1)


def _mlflow_failed(tracker: Any) -> None:  # noqa: ARG001 - MLflow knows its run
    import mlflow

    mlflow.end_run(status="FAILED")


def _clearml_failed(tracker: Any) -> None:
    tracker.task.mark_failed()
    tracker.finish()


def _mlflow_environment(folder: Path) -> dict[str, str]:
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # of seven and 120 s
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true", **patience}


def _trackio(place: Place) -> Any:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(place.project, name=place.name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)


def _dvclive(place: Place) -> Any:
    from accelerate.tracking import DVCLiveTracker

    # Without `resume` it would empty the folder; dvc.yaml would otherwise lie in the working directory.
    folder, name = place.folder, place.name  # a folder instead of a project
    return DVCLiveTracker(dir=str(folder), resume=(folder / "metrics.json").exists(), save_dvc_exp=False, dvcyaml=str(folder / "dvc.yaml"), exp_name=name)


def _swanlab(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    import swanlab
    from accelerate.tracking import SwanLabTracker

    # Numbers and options only: neither what is printed nor the machine, the packages and the command line leave with them. It never asks for a login.
    probe = swanlab.Settings.Probe(hardware=False, runtime=False, requirements=False, git=False, monitor=False)
    settings = swanlab.Settings(probe=probe, terminal=swanlab.Settings.Terminal(proxy_type="none"), interactive=False)
    mode = os.environ.get("SWANLAB_MODE") or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")
    return SwanLabTracker(project, name=name, log_dir=str(folder), mode=mode, settings=settings)


def _comet_ml(place: Place) -> Any:
    project, name, folder = place.project, place.name, place.folder
    import comet_ml
    from accelerate.tracking import CometMLTracker

    online = bool(os.environ.get("COMET_API_KEY")) or Path("~/.comet.config").expanduser().exists()
    # Numbers and options only: neither the source code nor what is printed leaves with them.
    config = comet_ml.ExperimentConfig(name=name, offline_directory=str(folder), log_code=False, log_git_patch=False, auto_output_logging="", parse_args=False)
    return CometMLTracker(project, online=online, experiment_config=config)


def _clearml(place: Place) -> Any:
    from accelerate.tracking import ClearMLTracker
    from clearml import Task

    if not (os.environ.get("CLEARML_API_ACCESS_KEY") or Path(os.environ.get("CLEARML_CONFIG_FILE", "~/clearml.conf")).expanduser().exists()):
        Task.set_offline(True)
    # Numbers and options only: no patched frameworks, no console, and not the uncommitted changes of the checkout.
    patched = ("matplotlib", "tensorflow", "tensorboard", "pytorch", "scikit", "joblib", "hydra", "detect_repository")
    quiet = {"auto_connect_frameworks": dict.fromkeys(patched, False), "auto_connect_arg_parser": False, "auto_connect_streams": False}
    return ClearMLTracker(place.name, project_name=place.project, task_name=place.name, reuse_last_task_id=False, auto_resource_monitoring=False, **quiet)


_ACCELERATE = ("accelerate.tracking",)
KINDS: dict[str, Kind] = {
    "tensorboard": Kind((*_ACCELERATE, "torch.utils.tensorboard"), _no_variables, _tensorboard, _finish),
    "wandb": Kind((*_ACCELERATE, "wandb"), _no_variables, _wandb, _wandb_failed),
    "mlflow": Kind((*_ACCELERATE, "mlflow"), _mlflow_environment, _mlflow, _mlflow_failed),
    "trackio": Kind((*_ACCELERATE, "trackio"), lambda folder: {"TRACKIO_DIR": str(folder)}, _trackio, _finish),
    "dvclive": Kind((*_ACCELERATE, "dvclive", "dvclive.plots"), _no_variables, _dvclive, _finish),
    "swanlab": Kind((*_ACCELERATE, "swanlab"), _no_variables, _swanlab, _finish),
    "comet_ml": Kind((*_ACCELERATE, "comet_ml"), _no_variables, _comet_ml, _finish),
    "clearml": Kind((*_ACCELERATE, "clearml"), lambda folder: {"CLEARML_CACHE_DIR": str(folder)}, _clearml, _clearml_failed),
}


def kind_of(name: str) -> Kind:
    """The row of a tracker, ours or a user's: then a factory (Place) -> Tracker. Raises UserError for a name that there is not."""
    factory = registry.lookup("tracker", name)
    return KINDS[name] if factory is None else Kind((), _no_variables, factory, _finish)
