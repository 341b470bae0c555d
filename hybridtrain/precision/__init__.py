"""Mixed precision: the dtypes of a recipe (policy.py) and the dynamic loss scale (loss_scale.py)."""
