"""FLOPs of training a model, computed from its sizes. No torch."""

from __future__ import annotations

from hybridtrain.types import ModelFacts


def flops_per_token(facts: ModelFacts, *, seq_len: int) -> float:
    """FLOPs per token of training, forward and backward (PaLM, arXiv:2204.02311, appendix
    B, with causal attention; that of an encoder is full).

        6 (P - E)  +  12 H d c        P parameters, E = vocab x hidden if the embedding is not tied, else 0

    First term: two FLOPs per weight and token in the forward pass, four in the backward pass; of experts,
    those that a token uses. The head counts, the embedding look-up does not (a tied weight counts once, as
    the head); norms, in P, are below 0.1 %. Second term: the two matrix products of attention with H heads of
    size d, over the c positions that a token attends to on average, summed over the layers: (seq_len + 1) / 2
    each, or less with a sliding window; of an encoder seq_len. Recomputed activations are not counted (model
    FLOPs, not hardware FLOPs). With adapters of A parameters the model's own have no gradients:
    4 (P - E) + 6 A + 12 H d c.
    """
    embedding = 0 if facts.tied else facts.vocab * facts.hidden
    used = facts.parameters - facts.inactive - embedding
    return _of_own(facts) * used + 6 * sum(facts.adapters) + sum(_of_attention(facts, seq_len=seq_len))


def _of_own(facts: ModelFacts) -> int:
    """FLOPs per parameter of the model and token."""
    return 4 if facts.adapters else 6


def of_layers(facts: ModelFacts, *, seq_len: int) -> list[float]:
    """Those of each layer."""
    inactive = facts.layer_inactive or (0,) * facts.layers
    attention = _of_attention(facts, seq_len=seq_len)
    own, added = _of_own(facts), facts.adapters or (0,) * facts.layers
    sizes = zip(facts.parameters_of_layers, inactive, added, attention, strict=True)
    return [own * (parameters - unused) + 6 * more + products for parameters, unused, more, products in sizes]


def of_head(facts: ModelFacts) -> float:
    """Those of the matrix product with the head."""
    return _of_own(facts) * facts.outputs * facts.hidden


def _of_attention(facts: ModelFacts, *, seq_len: int) -> list[float]:
    """FLOPs per token of the two matrix products of attention in each layer."""
    window = min(facts.window or seq_len, seq_len)
    full, windowed = ((n * (n + 1) / 2 + (seq_len - n) * n) / seq_len for n in (seq_len, window))
    if facts.encoder:  # a window has as many positions on either side, and its own
        full, windowed = seq_len, window
    contexts = [full if layer in facts.full_layers else windowed for layer in range(facts.layers)]
    return [12 * facts.heads * facts.head_dim * context for context in contexts]
