"""Text to token files, and token files to this rank's micro-batches.

    prepare: sources -> readers -> pieces (workers) -> join     once, `hybridtrain prepare` (tokenize): token files, .bin/.idx (indexed)
    conversations besides: chat (which tokens carry loss), packing (whole conversations into rows)
    corpus -> blend -> order -> rows -> loader                  every step; the row order is a function of the sample index

Nothing here keeps a position: step, seed and global batch size determine the rows of a step under every layout.
"""
