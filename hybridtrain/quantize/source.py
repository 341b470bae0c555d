"""A model that is quantised, opened: its config, its linear layers, and the weights in its files."""

from __future__ import annotations

from functools import cached_property

from hybridtrain.config.schema import ModelConfig
from hybridtrain.models import build
from hybridtrain.models.init import WeightSource, draw
from hybridtrain.models.load import pretrained
from hybridtrain.models.source import read_config
from hybridtrain.quantize import stored, walk
from hybridtrain.quantize.experts import linears_of


class Source:
    """Of a folder or hub id. Raises UserError with `field` for one that is quantised already, or has no
    linear layers.
    """

    def __init__(self, folder: str, *, trust_remote_code: bool, field: str):
        self.folder = folder
        self.model = ModelConfig(from_pretrained=folder, trust_remote_code=trust_remote_code)
        self.fields = read_config(self.model)
        if self.fields.get("quantization_config"):
            raise stored.already(folder, field=field)
        self.built = build.hf_config(self.fields, chosen={}, attention="sdpa")
        self.meta = build.meta_model(self.built)
        self.linears = linears_of(self.built)
        walk.check_any(self.linears, folder, field=field)

    @cached_property
    def weights(self) -> WeightSource:
        """Checked when they are first asked for."""
        return pretrained(self.model, self.built, fresh=draw(self.built, seed=0))
