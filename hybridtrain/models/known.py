"""What the search of a model's structure (structure.py) cannot see, for each model type. Everything else is
found; what is said here is proven like the rest before it is used.
"""

from __future__ import annotations

LAYERS: dict[str, str] = {}
"""Model type -> path of its list of layers, such as "model.layers". The search takes the list of as many
modules as the config has layers."""
