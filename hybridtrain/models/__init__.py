"""Models of transformers: their structure, stages of their layers, initial weights, loading, and a reduced
copy of them."""
