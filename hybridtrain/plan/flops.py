"""FLOPs of training a model, by arithmetic. No torch."""

from __future__ import annotations

from hybridtrain.types import ModelFacts


def flops_per_token(facts: ModelFacts, *, seq_len: int) -> float:
    """FLOPs that one token of training takes, forward and backward (PaLM, arXiv:2204.02311, appendix B, made causal).

        6 (P - E)  +  12 L H d c        P parameters, E = vocab x hidden if the embedding is not tied, else 0

    The first term: two FLOPs per weight and token forward, four backward. The head counts, the embedding's look-up does
    not (a tied weight counts once, as the head); norms are in P and below 0.1 %. The second term: the two products of
    attention in L layers of H heads of size d, over the c positions that a token sees on average: (seq_len + 1) / 2, or
    less with a sliding window, taken for all layers. Recomputed activations are not counted (model FLOPs, not hardware FLOPs).
    """
    embedding = 0 if facts.tied else facts.vocab * facts.hidden
    window = min(facts.window or seq_len, seq_len)
    seen = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return 6 * (facts.parameters - embedding) + 12 * facts.layers * facts.heads * facts.head_dim * seen
