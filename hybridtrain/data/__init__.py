"""From text to token files, and from token files to this rank's micro-batches.

Once, `hybridtrain prepare` (tokenize), to token files .bin/.idx (indexed):
    sources -> readers -> documents -> pieces (workers) -> join
    conversations besides: chat (which tokens carry loss), packing (whole conversations into rows)
Every step; the row order is a function of the sample index:
    corpus -> blend -> order -> rows -> loader

Nothing here keeps a position: step, seed and global batch size determine the rows of a
step under every layout.
"""
