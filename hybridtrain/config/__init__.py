"""Typed configuration: sections.py, commands.py and schema.py (what exists), check.py (what fits together), compose.py (the Hydra door)."""
