"""Options of adapters (models/adapters.py)."""

from __future__ import annotations

from dataclasses import field

from hybridtrain.config.options import Options, options


@options
class AdaptersConfig(Options):
    kind: str = "none"
    """none: train the model's own parameters; lora: freeze them, and train two matrices of low rank beside
    each linear layer (arXiv 2106.09685)."""
    rank: int = 16
    """Rank of the matrices."""
    alpha: float = 32.0
    """Their product is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly (arXiv
    2312.03732)."""
    dora: bool = False
    """Train also the length of each output's weights, apart from their direction (arXiv 2402.09353)."""
    dropout: float = 0.0
    """Probability with which elements of the input of the first of the two matrices are set to 0 in training;
    that of the layer itself stays whole."""
    base_format: str = "none"
    """Format in which the frozen weights of the layers that get adapters are stored: nf4 (4 bits, and a scale
    per 64 of a row; QLoRA, arXiv 2305.14314), int8 (a scale per row), or none: that which computes."""
    match: list[str] = field(default_factory=list)
    """Shell-style patterns of the linear layers that get adapters, e.g. ['*.q_proj','*.v_proj']; empty: all
    inside the model's layers, but routers of experts."""
    modules_to_save: list[str] = field(default_factory=list)
    """Shell-style patterns of other modules that are trained whole beside adapters, and saved with them, e.g.
    ['*.pooler.*']; the head of a classifier always is."""
