"""Fuzzers with an oracle: what they plant may be refused by name or leave the result as it
was, and nothing else."""
