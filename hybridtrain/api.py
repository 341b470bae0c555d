"""What the commands do, as functions for programs. `hybridtrain/__init__.py` lists the public names."""

from __future__ import annotations

from pathlib import Path

from hybridtrain.config import checks
from hybridtrain.config import compose as composing
from hybridtrain.config.schema import Config, ExportConfig, ExportRoot, RunFolder


def compose(*words: str) -> Config:
    """The configuration of `hybridtrain train WORD ...`: groups, experiments and `section.option=value`. Raises UserError."""
    return composing.training(list(words))


def export(run: str | Path, *, out: str | Path = "", dtype: str = "float32") -> Path:
    """Write the newest complete checkpoint of a run as a Hugging Face folder, and return that folder. In one process.

    `out`: empty: <run>/export. `dtype` of the weights: float32, bfloat16 or float16. Raises UserError.
    """
    from hybridtrain.export import hf

    config = ExportRoot(run=RunFolder(dir=str(run)), export=ExportConfig(out=str(out), dtype=dtype))
    checks.check(config)
    return hf.export_newest(config)
