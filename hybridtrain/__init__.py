"""hybridtrain: hybrid-parallel training of Hugging Face language models, proven against one plain process."""

__version__ = "0.1.0"
