"""docs/troubleshooting.md quotes what the program says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def said() -> str:
    """Every text of the source but docstrings; literals that stand side by side are one."""
    texts = []
    for path in (ROOT / "hybridtrain").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings]
    return "\n".join(texts)


def test_every_quoted_message_occurs() -> None:
    rows = [line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| `")]
    quoted = [piece.strip() for row in rows for text in re.findall(r"`([^`]*)`", row.split("|")[1]) for piece in text.split("…") if piece.strip()]
    assert len(quoted) > 40
    texts = said()
    assert [text for text in quoted if text not in texts] == []


def test_the_readme_links_it() -> None:
    assert "docs/troubleshooting.md" in (ROOT / "README.md").read_text()
