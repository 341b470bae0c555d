"""The training of a run: what it continues (resume), what ranks agree on (agreement), one attempt, its loop,
and what happens around a step (callbacks; builtin: those of every run)."""
