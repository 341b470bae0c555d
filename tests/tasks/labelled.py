"""Texts with labels, and their folder of rows."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from hybridtrain.cli.main import main

SEQ = 64
LABELS = ["prose", "code"]


def texts() -> list[dict[str, object]]:
    """Functions of Python's standard library and descriptions of such, cut to 300
    characters: as many of each."""
    found: dict[str, list[str]] = {name: [] for name in LABELS}
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-h]*.py")):
        source = file.read_text(errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                words = ast.get_docstring(node)
                found["prose" if words else "code"].append(
                    words or ast.get_source_segment(source, node) or ""
                )
    enough = {name: [text[:300] for text in parts if len(text) > 80][:500] for name, parts in found.items()}
    return [
        {"text": text, "label": name}
        for pair in zip(*enough.values(), strict=False)
        for text, name in zip(pair, enough, strict=True)
    ]


def prepare(source: Path, out: Path, *more: str) -> int:
    words = [
        "data.format=labelled",
        f"data.labels=[{','.join(LABELS)}]",
        "data.vocab_size=512",
        f"data.seq_len={SEQ}",
        "data.eval_fraction=0.2",
    ]
    return main(["prepare", f"data.source=[{source}]", f"data.path={out}", *words, *more])
