"""`hybridtrain parity`: train the user's config on the same tokens under many layouts and in
one plain process; compare.

plan.py      which layouts, which model (shrunk or not), which batch          no torch
verdict.py   tolerances, pass or fail, the table, parity.json                 no torch
measure.py   what the ranks run: train, gather, compare
compare.py   the command: first the reference, then each layout
"""

from hybridtrain.config import schema
from hybridtrain.parity.compare import Parity, UserInputs, compare, compare_layouts

__all__ = ["Parity", "UserInputs", "compare", "compare_layouts", "run"]


def run(config: schema.Config) -> int:
    """`hybridtrain parity`. Exit code 0: every layout passes, 1: some do not."""
    from hybridtrain.parity.measure import train_layout

    assert isinstance(config, schema.ParityRoot)
    return compare(config, train=train_layout)
