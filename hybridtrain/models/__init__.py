"""Models: what planning knows of them (facts), how a family is built (family), initial
weights, loading, stages."""
