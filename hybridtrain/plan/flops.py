"""FLOPs of training a model, computed from its sizes. No torch."""

from __future__ import annotations

from hybridtrain.types import ModelFacts


def flops_per_token(facts: ModelFacts, *, seq_len: int) -> float:
    """FLOPs per token of training, forward and backward (PaLM, arXiv:2204.02311, appendix
    B, with causal attention).

        6 (P - E)  +  12 L H d c        P parameters, E = vocab x hidden if the embedding is not tied, else 0

    First term: two FLOPs per weight and token in the forward pass, four in the backward pass. The head
    counts, the embedding look-up does not (a tied weight counts once, as the head); norms, in P, are below
    0.1 %. Second term: the two matrix products of attention in L layers of H heads of size d, over the c
    positions that a token attends to on average: (seq_len + 1) / 2, or less with a sliding window, which is
    assumed for all layers. Recomputed activations are not counted (model FLOPs, not hardware FLOPs).
    """
    embedding = 0 if facts.tied else facts.vocab * facts.hidden
    window = min(facts.window or seq_len, seq_len)
    context = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return 6 * (facts.parameters - embedding) + 12 * facts.layers * facts.heads * facts.head_dim * context
