"""How many entries the tokenizer of prepared data has, without opening the data: a new model takes it for its own."""

from __future__ import annotations

from pathlib import Path

from hybridtrain.config.schema import DataConfig
from hybridtrain.files import read_object


def of_corpora(data: DataConfig) -> int | None:
    """Entries that an embedding needs for data.path or data.blend; None where no corpus.json says so, as for token files of another maker.

    Reads corpus.json alone, neither torch nor numpy. Raises UserError for one that cannot be read.
    """
    sizes = []
    for path in data.blend or [data.path]:
        file = Path(path).expanduser() / "corpus.json"
        if path and file.is_file():
            facts = read_object(file, field="data.path")
            sizes += [value + more for name, more in (("vocab_size", 0), ("largest_id", 1)) if type(value := facts.get(name)) is int]
    return max(sizes, default=None)
