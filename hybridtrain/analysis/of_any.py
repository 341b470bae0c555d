"""ModelFacts of a model type whose config.json alone does not tell them.

The model is built without memory for its weights, and a reduced copy of it is examined (analyse.py). The
result is kept in the user's cache folder, by every field of the config, the attention implementation and the
versions of what computed it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hybridtrain.analysis import analyse, cuts
from hybridtrain.errors import UserError, refusal
from hybridtrain.models import build, reduced
from hybridtrain.models.structure import cannot_train, structure_of
from hybridtrain.runtime import log
from hybridtrain.runtime.files import read_object, write_json
from hybridtrain.types import ModelFacts

_log = log.get("model")
SEARCH = 2
"""Version of what is examined, and how."""
_UNBOUNDED = 1 << 40


def facts_of_any(fields: Mapping[str, Any], *, attention: str) -> ModelFacts:
    """The facts of a causal LM with config.json `fields` and an attention implementation.

    Raises UserError for one that cannot be trained.
    """
    file = _cache(fields, attention=attention)
    with _alone(file):  # the ranks of a host ask at the same time
        if (known := _read(file)) is not None:
            return known
        began = time.monotonic()
        try:
            facts = _examined(fields, attention=attention)
        except UserError:
            raise
        except Exception as error:  # a model's own code, with whatever it raises
            first = str(error).strip().splitlines() or [""]
            raise cannot_train(
                fields["model_type"], f"a reduced copy of it fails ({type(error).__name__}: {first[0][:200]})"
            ) from error
        _log.info("analysis  of a reduced copy of the model, in %.1f s", time.monotonic() - began)
        try:
            write_json(file, dataclasses.asdict(facts))
        except OSError as error:
            _log.warning("the analysis of the model is not kept in %s: %s", file, error)
    return facts


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time; without a folder that can be written, each for itself."""
    with ExitStack() as stack:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(file: Path) -> ModelFacts | None:
    """What is kept; None for nothing, and for what another version wrote."""
    try:
        known = read_object(file, field="XDG_CACHE_HOME")
        begins = known["cuts"] if known["cuts"] is None else tuple(known["cuts"])
        return ModelFacts(**{**known, "labels": (), "cuts": begins})
    except (UserError, TypeError, KeyError):
        return None


def _cache(fields: Mapping[str, Any], *, attention: str) -> Path:
    versions = [version(name) for name in ("torch", "transformers")]
    content = json.dumps([SEARCH, versions, attention, fields], sort_keys=True, default=str)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "hybridtrain" / "analysis" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"


def _examined(fields: Mapping[str, Any], *, attention: str) -> ModelFacts:
    config = build.hf_config(fields, chosen={}, attention=attention)
    refused = analyse.refused(config)
    _check_random(config)
    begins = cuts.allowed(config, holds="pp" not in refused)
    if begins == ():
        refused.setdefault("pp", "its layers use more of each other than hidden states")
    else:
        refused.pop("pp", None)
    text = config.get_text_config(decoder=True)
    model: Any = build.meta_model(config)
    shared = structure_of(config).shared if "pp" not in refused else ()
    heads, window = text.num_attention_heads, getattr(text, "sliding_window", None)
    full_layers = (getattr(text, "layer_types", None) or []).count("full_attention") if window else 0
    return ModelFacts(
        model_type=config.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        ffn=_ffn(text),
        vocab=model.get_input_embeddings().weight.shape[0],
        labels=(),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        window=window,
        max_positions=getattr(text, "max_position_embeddings", None) or _UNBOUNDED,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        full_layers=full_layers,
        inactive=_inactive(model, text),
        refused=refused,
        shared={
            path: sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
            for path in shared
        },
        cuts=begins or None,
    )


def _ffn(text: Any) -> int:
    """The MLP's width, or of layers that differ the largest."""
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return max(width) if isinstance(width, list | tuple) else width


def _inactive(model: Any, text: Any) -> int:
    """Parameters of experts that a token does not use."""
    experts, chosen = (
        next((value for name in names if isinstance(value := getattr(text, name, None), int)), 0)
        for names in (reduced.EXPERT_COUNTS, reduced.EXPERTS_USED)
    )
    if not experts or not chosen:
        return 0
    stacked = sum(p.numel() for p in model.parameters() if p.dim() == 3 and p.shape[0] == experts)
    return stacked * (experts - chosen) // experts


def _check_random(config: Any) -> None:
    """Refuse dropout and jitter that act: a step must not depend on random numbers of the layout."""
    fields = config.get_text_config(decoder=True).to_dict()
    nonzero = {name: value for name, value in fields.items() if reduced.is_random(name, value) and value > 0}
    if nonzero and analyse.is_random(config):
        name = next(iter(nonzero))
        problem = "random forward passes are not supported yet"
        instead = " ".join(f"model.config.{each}=0" for each in nonzero)
        raise refusal(f"model.config.{name}", nonzero[name], problem, allowed="0", instead=instead)
