"""`hybridtrain bench`: time per optimizer step of a config, compared with a plain PyTorch loop
over the same model.

    the launcher's processes (any layout)   |warm-up|  round  |         |  round  |         | ...
    a child process of rank 0 (plain loop)  |warm-up|         |  round  |         |  round  | ...

rounds.py    timed steps of one side; no synchronization inside a round
plain.py     the plain loop, and its process, so that its memory is measured separately
compare.py   the command: build both sides, run them in turn, gather
result.py    medians, paired ratios and their interval, the table, the JSON        no torch
"""

from hybridtrain.config import schema

__all__ = ["run"]


def run(config: schema.Config) -> int:
    """`hybridtrain bench`. Exit code 0; 1: the two sides computed different losses."""
    from hybridtrain.bench.compare import compare

    assert isinstance(config, schema.BenchRoot)
    return compare(config)
