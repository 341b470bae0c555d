"""`hybridtrain parity`: the same tokens under many layouts, compared with one plain process on the user's own config.

plan.py      which layouts, which model (shrunk or not), which batch          no torch
verdict.py   tolerances, pass or fail, the table, parity.json                 no torch
measure.py   what runs in the ranks: train, gather, compare
compare.py   the command: reference first, then layout after layout
"""

from hybridtrain.config import schema
from hybridtrain.parity.compare import Parity, UserInputs, compare, compare_layouts

__all__ = ["Parity", "UserInputs", "compare", "compare_layouts", "run"]


def run(config: schema.Config) -> int:
    """`hybridtrain parity`; 0: every layout passes, 1: some do not."""
    from hybridtrain.parity.measure import train_layout

    assert isinstance(config, schema.ParityRoot)
    return compare(config, train=train_layout)
