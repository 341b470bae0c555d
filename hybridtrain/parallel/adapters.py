"""The transform `adapters`: gives the linear layers of a stage theirs, before they are cut and converted."""

from __future__ import annotations

from hybridtrain.config.schema import AdaptersConfig
from hybridtrain.models import adapters, dropout, quantised
from hybridtrain.models.dropout import Dropout
from hybridtrain.models.patterns import is_adapter, is_frozen
from hybridtrain.models.stage import Stage
from hybridtrain.parallel.convert import linears
from hybridtrain.precision.policy import PrecisionPolicy


def adapt(stage: Stage, settings: AdaptersConfig, *, precision: PrecisionPolicy) -> None:
    """Add the adapters that the config asks for, in place. Those of the stage's own parameters that are then
    not trained are stored in the dtype in which they compute, or in codes.
    """
    if settings.kind == "none":
        return
    layers, config = stage.structure.layers, stage.config
    adapters.add_to(stage.layer_modules(), settings, prefix=layers, config=config)
    if settings.dropout:
        stage.dropouts = dropout.install(stage, config=config, layers=layers, adapted=True)
    for name, parameter in stage.named_parameters():
        if is_frozen(name, freeze=(), adapters=settings):
            parameter.data = parameter.data.to(precision.compute)
    if settings.base_format != "none":
        for linear, module in linears(stage):
            if adapters.is_chosen(linear, settings):
                quantised.convert(module, settings.base_format)


def expected(stage: Stage, settings: AdaptersConfig) -> set[str]:
    """Names of the parameters of adapters, and of scales of frozen weights, that the config asks for; and of
    their dropout, with its rate.
    """
    chosen = [linear for linear, _ in linears(stage) if adapters.is_chosen(linear, settings)]
    codes = quantised.names(chosen) if settings.base_format != "none" else set()
    dropped = {f"{linear.path}.{adapters.DROPOUT}={settings.dropout}" for linear in chosen}
    return codes | set(adapters.shapes(chosen, settings)) | (dropped if settings.dropout else set())


def found(stage: Stage) -> set[str]:
    """Those that the stage has."""
    last, modules = f".{quantised.LARGEST}", stage.named_modules()
    named = {name for name, _ in stage.named_parameters() if is_adapter(name) or name.endswith(last)}
    return named | {f"{name}={m.p}" for name, m in modules if is_adapter(name) and isinstance(m, Dropout)}
