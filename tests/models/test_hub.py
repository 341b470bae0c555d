"""Models and tokenizers of a hub: the library's own client against a hub on this machine, and what it says
when something cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridtrain.config.schema import ModelConfig
from hybridtrain.errors import UserError
from hybridtrain.models import hub as files
from hybridtrain.models import tokens
from hybridtrain.models.source import read_config
from tests import hub
from tests.runs import arguments, corpus, finished, rows

SECRET = "hf_" + "s" * 34


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def repositories(tmp_path: Path, data: Path) -> Path:
    """someone/tiny: an export, with end tokens and a temperature of its own."""
    from hybridtrain.cli.main import main

    finished(1, arguments(tmp_path / "first", data, train__steps=1))
    assert main(["export", str(tmp_path / "first")]) == 0
    model = tmp_path / "repositories" / "someone" / "tiny"
    shutil.copytree(tmp_path / "first" / "export", model)
    (model / "hybridtrain.json").unlink()
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 5], "temperature": 0.25, "do_sample": True})
    )
    return tmp_path / "repositories"


def command(served: hub.Hub, home: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": served.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_TOKEN": SECRET,
    }
    argv = (sys.executable, "-m", "hybridtrain.cli", *map(str, argv))
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_model_of_the_hub_trains_as_its_folder_does(repositories: Path, data: Path, tmp_path: Path) -> None:
    def argv(run: str, source: object) -> list[str]:
        given = arguments(tmp_path / run, data, train__steps=2, model__from_pretrained=source)
        return [word for word in given if not word.startswith(("model=", "model.config."))]

    with hub.serving(repositories, gated=()) as served:
        trained = command(served, tmp_path / "home", "train", *argv("tuned", "someone/tiny"))
        assert trained.returncode == 0, trained.stderr
        assert served.asked.count("/someone/tiny/resolve/main/config.json") == 2, (
            "once: what it is, and its content"
        )
        evaluated = command(
            served,
            tmp_path / "home",
            "evaluate",
            "evaluate.source=someone/tiny",
            f"data.path={data}",
            "data.seq_len=32",
        )
        assert evaluated.returncode == 0, evaluated.stderr
        texts, out = data.parent / "text", tmp_path / "prepared"
        prepared = command(
            served,
            tmp_path / "home",
            "prepare",
            f"data.source=[{texts}]",
            "data.tokenizer=someone/tiny",
            f"data.path={out}",
            "data.eval_fraction=0",
        )
        assert prepared.returncode == 0, prepared.stderr
    finished(1, argv("local", repositories / "someone/tiny"))
    assert rows(tmp_path / "tuned") == rows(tmp_path / "local")
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (
        repositories / "someone/tiny/tokenizer.json"
    ).read_bytes()
    exported = command(served, tmp_path / "home", "export", tmp_path / "tuned")  # the hub is gone by now
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "tuned/export/generation_config.json").read_text())["temperature"] == 0.25
    said = trained.stdout + trained.stderr + evaluated.stdout + evaluated.stderr + exported.stderr
    kept = [
        path
        for path in (tmp_path / "tuned").rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert (SECRET in said, kept) == (False, [])


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    """A hub with me/bare (config.json alone), me/empty, and me/gated."""
    bare = tmp_path / "repositories" / "me" / "bare"
    bare.mkdir(parents=True)
    (bare / "config.json").write_text("{}")
    (tmp_path / "repositories" / "me" / "empty").mkdir()
    files._downloaded.cache_clear()
    with hub.serving(tmp_path / "repositories", gated=("me/gated",)) as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        changed = {
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        for name, value in changed.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
    files._downloaded.cache_clear()


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("repository", "words"),
    [
        ("me/gated", r"it is gated: accept its terms on its page, then set your token \(HF_TOKEN\)"),
        ("me/none", r"there is no such repository, or it is private and needs a token \(HF_TOKEN\)"),
        ("me/empty", r"it has no config\.json"),
        ("no hub id at all", "not a valid|must use alphanumeric|Repo id"),
    ],
)
def test_what_the_hub_does_not_give_is_refused_with_the_reason(repository: str, words: str) -> None:
    with pytest.raises(
        UserError,
        match=(
            rf"model\.from_pretrained={repository}: "
            f"neither a local folder nor available on the hub: .*({words})"
        ),
    ):
        read_config(ModelConfig(from_pretrained=repository))


@pytest.mark.usefixtures("served")
def test_a_file_that_need_not_be_there_and_one_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare = ModelConfig(from_pretrained="me/bare")
    assert tokens.source_generation(bare) is None
    assert not caplog.text, "a repository need not have one"
    assert read_config(bare) == {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_config(bare) == {}
    other = ModelConfig(from_pretrained="me/other")
    assert tokens.source_generation(other) is None
    assert (
        "me/other goes on without generation_config.json: "
        "generation_config.json is not in the local cache, and the hub cannot be reached"
    ) in caplog.text
    with pytest.raises(
        UserError, match=r"config\.json is not in the local cache, and the hub cannot be reached"
    ):
        read_config(other)


def test_a_hub_that_does_not_resolve_is_not_asked_again_and_again(tmp_path: Path) -> None:
    """Neither for a model nor for a tokenizer; the client's own lines are not the answer."""
    (tmp_path / "a.txt").write_text("some words " * 50)
    argv = {
        "model": ["train", "model.from_pretrained=nothere", "data.path=x", "train.steps=1"],
        "tokenizer": [
            "prepare",
            f"data.path={tmp_path / 'data'}",
            f"data.source=[{tmp_path / 'a.txt'}]",
            "data.tokenizer=nothere",
            "data.eval_fraction=0",
        ],
    }
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": "https://no-such-hub.invalid",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    for what in argv:
        done = subprocess.run(
            [sys.executable, "-m", "hybridtrain.cli", *argv[what]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2
        assert "nothere" in done.stderr
        assert "Retrying" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert (
            what == "tokenizer"
            or "config.json is not in the local cache, and the hub cannot be reached" in done.stderr
        )
