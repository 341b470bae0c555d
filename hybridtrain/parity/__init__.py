"""`hybridtrain parity`: the same tokens under many layouts, compared with one plain process on the user's own config.

plan.py      which layouts, which model (shrunk or not), which batch          no torch
verdict.py   tolerances, pass or fail, the table, parity.json                 no torch
measure.py   what runs in the ranks: train, gather, compare
compare.py   the command: reference first, then layout after layout
"""

from hybridtrain.parity.compare import compare, run

__all__ = ["compare", "run"]
