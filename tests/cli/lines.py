"""Command lines, run in this process or in one of their own."""

import os
import subprocess
import sys

import pytest

from hybridtrain.cli.main import main

TRAIN = ["train", "model=tiny", "data.path=x", "train.steps=100"]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run `argv`, expect exit code 2 and one message on stderr, and return it."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
