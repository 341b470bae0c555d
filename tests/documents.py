"""The documents of the project, and the blocks of commands and programs in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)
RUN_IN_ORDER = ("README.md", "docs/data.md", "docs/support.md", "docs/run-directory.md", "docs/inference.md")
"""Whose blocks tests/test_readme.py runs, in one folder: a later one uses what an earlier one wrote."""
RUN_ELSEWHERE = {
    "docs/python.md": "tests/test_api.py",
    "docs/extending.md": "tests/test_plugins.py",
    "README.zh.md": "as in README.md",
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    """The commands of a document, in blocks of bash and in indented text, each in one line."""
    lines = (
        "\n".join(
            [*blocks(name, "bash"), *re.findall(r"^    (.*(?:\\\n.*)*)$", read(name), flags=re.MULTILINE)]
        )
        .replace("\\\n", " ")
        .splitlines()
    )
    return [
        line.partition("  #")[0].strip()
        for line in lines
        if re.match(r"\s*(hybridtrain \w|torchrun .* -m hybridtrain\.train )", line)
    ]
