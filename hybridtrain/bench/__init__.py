"""`hybridtrain bench`: how long an optimizer step of a config takes, beside a plain PyTorch loop over the same Hugging Face model.

    the launcher's processes (any layout)   |warm-up|  round  |         |  round  |         | ...
    a process of rank 0 (the plain loop)    |warm-up|         |  round  |         |  round  | ...

rounds.py    steps by the clock, on either side; no synchronisation inside a round
plain.py     the plain loop, and the process it lives in: its memory is its own
compare.py   the command: build both, let them take turns, gather
result.py    medians, paired ratios and their interval, the table, the JSON        no torch
"""

from hybridtrain.config import schema

__all__ = ["run"]


def run(config: schema.Config) -> int:
    """`hybridtrain bench`; 1: the two sides computed different losses."""
    from hybridtrain.bench.compare import compare

    assert isinstance(config, schema.BenchRoot)
    return compare(config)
