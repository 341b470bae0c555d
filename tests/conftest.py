"""What every test needs: an environment without network, chatter or competing threads, and a run
directory of its own."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_MODE="offline"
)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in LAUNCHER[:3]:  # tests started inside somebody's job are still not part of it
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _no_launcher_is_left_behind() -> Iterator[None]:
    """A command that runs in this process may take over a launcher's variables: they are its own,
    not the next test's."""
    before = dict(os.environ)
    yield
    for name in LAUNCHER:
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _no_process_group_is_left_behind() -> Iterator[None]:
    """Engines of a single rank, and commands that end with an error, leave one in this process."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def _analyses_are_kept_for_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus, for reading only."""
    from tests.runs import corpus  # imports torch, which must find the environment above

    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a run of this test may live; not created yet."""
    return tmp_path / "run"
