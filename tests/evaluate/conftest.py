"""One trained run for evaluation and generation, and copies of its export."""

import shutil
from pathlib import Path

import pytest

from hybridtrain.cli.main import main
from hybridtrain.config import compose, schema
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.models.build import hf_config
from hybridtrain.models.saved_config import save_config
from tests.evaluate.trained import Trained, settings, train_and_save
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    (root / "text").mkdir()
    for number in range(12):
        (root / "text" / f"{number}.txt").write_text(
            " ".join(f"number {number * n} follows {n}," for n in range(60))
        )
    config = settings(root)
    prepare(config.data, options=schema.PrepareConfig())
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(compose.to_yaml(config))
    fields = hf_config(config.model.config, chosen={}, attention="sdpa")
    save_config(fields, root / "run" / "model", model=config.model)
    loss_sum, tokens = run_ranks(4, train_and_save, root)[0]
    assert main(["export", str(root / "run")]) == 0
    return Trained(root, loss_sum / tokens, tokens)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the export, to be changed."""
    return Path(shutil.copytree(trained.run / "export", tmp_path / "folder"))
