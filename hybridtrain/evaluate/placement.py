"""Where the weights of a model go that is larger than memory: on GPUs, in main memory, and what is left stays
on disk, from which accelerate reads it each time that it is needed."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hybridtrain.config.schema import InferenceConfig
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime import log

FIELD = "inference.max_memory_gb"
_ENOUGH = "a whole folder in bfloat16 or float16, or enough memory"
_SHARE = 0.9
"""Of free memory, for weights."""
_log = log.get("model")


def options(
    kind: Any,
    config: Any,
    *,
    source: str,
    field: str,
    adapted: bool,
    inference: InferenceConfig,
    trusts: bool,
) -> dict[str, Any]:
    """Those of from_pretrained of the class `kind`. Raises UserError for a model that no disk can hold a part
    of: a quantised one, or one with adapters.
    """
    from accelerate.utils import get_max_memory

    memory = {place: int(_SHARE * free) for place, free in get_max_memory().items()}
    places: dict[str, Any] = {"device_map": "auto"}
    if inference.max_memory_gb:
        memory["cpu"] = min(memory["cpu"], int(inference.max_memory_gb * 1e9))
        places["max_memory"] = memory
    size, room = _size(kind, config, trusts=trusts), sum(memory.values())
    if size <= room:
        return places if torch.cuda.is_available() else {}
    sizes = f"its weights take {size / 1e9:.3g} GB of memory, there are {room / 1e9:.3g} GB for them"
    if getattr(config, "quantization_config", None):
        problem = f"{sizes}, and neither torchao nor compressed-tensors reads quantised weights from disk"
        raise refusal(
            field, source, problem, allowed=_ENOUGH, instead=f"the folder it was made from, or {FIELD}"
        )
    if adapted:
        merge = "hybridtrain export RUN export.merge=true"
        raise refusal(
            field, source, f"{sizes}, and adapters belong to whole weights", allowed=_ENOUGH, instead=merge
        )
    _log.info("%s: the rest is read from disk each time that it is needed", sizes)
    return {**places, "offload_folder": inference.offload_folder or None}


def folder_needed(error: Exception, *, inference: InferenceConfig) -> UserError | None:
    """The refusal of a model whose weights are not used as they are stored, if that is the error."""
    if inference.offload_folder or "offload_folder" not in str(error):
        return None
    problem = (
        "its weights on disk are not used as they are stored (experts that are joined, or another dtype)"
    )
    return refusal(
        "inference.offload_folder", "''", problem, allowed="a folder", instead="a folder on a fast disk"
    )


def device_of(model: Any) -> torch.device:
    """Where its inputs go: where the first of its weights are that are not on disk."""
    places = (parameter.device for parameter in model.parameters())
    return next((place for place in places if place.type != "meta"), torch.device("cpu"))


def _size(kind: Any, config: Any, *, trusts: bool) -> int:
    """Bytes of the parameters in memory; those of a quantised folder are computed from their codes."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(), no_init_weights():
        model = kind.from_config(copy.deepcopy(config), trust_remote_code=trusts)
    width = (config.dtype or torch.float32).itemsize
    return sum(parameter.numel() for parameter in model.parameters()) * width
