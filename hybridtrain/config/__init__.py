"""Typed configuration: schema.py (what exists), checks.py (what fits together), compose.py (Hydra)."""
