"""Typed configuration: schema.py (the options), checks.py (which values work together),
compose.py (Hydra)."""
