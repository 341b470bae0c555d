"""Typed configuration: schema.py (what exists), check.py (what fits together), compose.py (the Hydra door)."""
