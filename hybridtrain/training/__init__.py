"""The training of a run: what it continues (resume), what ranks agree on (agreement), the loop, and what happens around a step (callbacks, and those of every run: builtin)."""
