"""What every test needs: an environment without network, chatter or competing threads, and a run directory of its own."""

import os
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_MODE="offline")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # tests started inside somebody's job are still not part of it
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus, for reading only."""
    from tests.runs import corpus  # imports torch, which must find the environment above

    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a run of this test may live; not created yet."""
    return tmp_path / "run"
