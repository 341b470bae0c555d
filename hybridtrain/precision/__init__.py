"""Mixed precision: which dtype plays which role (policy), and the dynamic loss scale (loss_scale)."""
