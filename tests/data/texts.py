"""Texts to prepare."""

import random
from pathlib import Path

from hybridtrain.config.schema import DataConfig
from hybridtrain.data.prepare.recipe import Recipe

RECIPE = Recipe(
    chat=None,
    labels=None,
    sentences=False,
    eval_fraction=0.0,
    deduplicate=False,
    skip_bad=False,
    total_bytes=0,
    held_out_before={},
    eos=[],
    special_ids=[],
    vocab_size=400,
)
"""How plain text is prepared."""

WORDS = [f"word{number}" for number in range(500)] + [
    "naïve",
    "日本",
    "=",
    "(",
    "):",
    "\t",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
]


def write_texts(folder: Path, *, documents: int, words: int) -> Path:
    generator = random.Random(0)
    for number in range(documents):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(generator.choices(WORDS, k=words)), newline="")
    return folder


def settings(path: Path, *source: object, **fields: object) -> DataConfig:
    return DataConfig(
        path=str(path),
        source=[str(entry) for entry in source],
        **{"vocab_size": 400, "eval_fraction": 0.2} | fields,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells how fast it was."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "speed.json"
    }
