"""Text to token files: what `hybridtrain prepare` does, from sources and records to pieces, and their join into one corpus."""
