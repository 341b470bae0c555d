"""The training of a run: resumption (resume), the check that all ranks agree (agreement), one attempt, its
loop, and callbacks (builtin: those of every run)."""
