"""Modules of a user's own for tests: those of docs/extending.md, and one that tells when it is imported."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridtrain import registry
from hybridtrain.cli import commands
from tests.runs import Ended, on_this_rank

ROOT = Path(__file__).resolve().parent.parent
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
PLANTED = """
import pathlib, hybridtrain as ht
pathlib.Path("imported").write_text("")
ht.register("schedule", "planted")(lambda step, config, total_steps: 1.0)
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory of its own; what a test registers and imports is its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", {})
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def in_folder(folder: Path, command: str, argv: list[str]) -> Ended:
    """A command of this process, from `folder`."""
    os.chdir(folder)
    if command == "train":
        return on_this_rank(argv)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = commands.run_command(command, argv)
    return Ended(code, out.getvalue(), err.getvalue())


def files_of_the_documentation(folder: Path) -> list[str]:
    """Write the blocks of docs/extending.md to the files that they name; its commands."""
    for text in re.findall(r"```(?:python|yaml)\n(.*?)```", EXTENDING, flags=re.DOTALL):
        path = folder / re.search(r"^# (\S+\.\w+)$", text, flags=re.MULTILINE)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return re.findall(r"```bash\n(.*?)\n```", EXTENDING, flags=re.DOTALL)
