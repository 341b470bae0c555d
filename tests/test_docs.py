"""The documentation: its commands compose, its links lead somewhere, its tables and figures are
what the program gives."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import shlex

import pytest
import yaml

from hybridtrain import __version__
from hybridtrain.cli.commands import run_command
from hybridtrain.config import schema
from tests.documents import DOCUMENTS, ROOT, RUN_ELSEWHERE, RUN_IN_ORDER, blocks, commands, read


@pytest.mark.parametrize(
    "line", sorted({line for name in DOCUMENTS if name not in RUN_ELSEWHERE for line in commands(name)})
)
def test_each_command_composes(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    words = (
        words[1:] if words[0] == "hybridtrain" else ["train", *words[words.index("hybridtrain.train") + 1 :]]
    )
    if "--multirun" in words:
        words = [re.sub(r",.*", "", word) for word in words if word != "--multirun"]
    assert run_command(words[0], [*words[1:], "--cfg", "job"]) == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert composed.keys() == {section.name for section in dataclasses.fields(schema.ROOTS[words[0]])}


def test_every_block_of_bash_and_python_is_run() -> None:
    """By tests/test_readme.py, or where it is said."""
    having = {name for name in DOCUMENTS if blocks(name, "bash") + blocks(name, "python")}
    assert having == {*RUN_IN_ORDER, *RUN_ELSEWHERE}


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_leads_to_every_document() -> None:
    linked = set(re.findall(r"\]\(((?:docs/)?[\w.-]+\.md)\)", read("README.md")))
    assert {name for name in DOCUMENTS if name != "README.md"} - linked == set()


def test_the_table_of_layouts_is_what_memory_planning_gives() -> None:
    table = runpy.run_path(str(ROOT / "launch" / "which_layout.py"))["table"]()
    assert table in read("README.md")
    assert all(float(row.split("|")[4]) + float(row.split("|")[5]) < 80 for row in table.splitlines()[2:])


def test_the_files_to_read_first_are_as_long_as_said() -> None:
    rows = re.findall(
        r"^\| `(hybridtrain/[\w/.]+)` \| (\d+) \|", read("docs/architecture.md"), flags=re.MULTILINE
    )
    assert len(rows) > 10
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file, _ in rows}
    assert {file: lengths[file] for file, lines in rows if abs(lengths[file] / int(lines) - 1) > 0.15} == {}
    [total] = re.findall(r"^Some ([\d,]+) lines", read("docs/architecture.md"), flags=re.MULTILINE)
    assert sum(lengths.values()) == pytest.approx(int(total.replace(",", "")), rel=0.1)


def test_every_file_that_the_documents_name_is_there() -> None:
    named = {
        file
        for name in DOCUMENTS
        for file in re.findall(r"`((?:hybridtrain|tests|launch|conf|slurm)/[\w/.-]+\.\w+)`", read(name))
    }
    assert len(named) > 20
    assert {file for file in named if not (ROOT / file).is_file()} == set()


def test_the_changelog_has_this_version() -> None:
    assert f"\n## [{__version__}]" in read("CHANGELOG.md")


def test_the_chinese_readme_shows_the_commands_of_the_readme() -> None:
    assert set(commands("README.zh.md")) <= set(commands("README.md"))
    assert blocks("README.zh.md", "bash")[0] == blocks("README.md", "bash")[0]


def said() -> str:
    """Every text of the source but docstrings; literals that stand side by side are one."""
    texts = []
    for path in (ROOT / "hybridtrain").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts += [
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        ]
    return "\n".join(texts)


def test_every_quoted_message_occurs() -> None:
    rows = [
        line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| `")
    ]
    quoted = [
        piece.strip()
        for row in rows
        for text in re.findall(r"`([^`]*)`", row.split("|")[1])
        for piece in text.split("…")
        if piece.strip()
    ]
    assert len(quoted) > 40
    texts = said()
    assert [text for text in quoted if text not in texts] == []
