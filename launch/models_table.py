"""Write docs/models.md: what each causal language model of transformers can be trained with.

    python launch/models_table.py docs/models.md

Each model type is examined as `hybridtrain inspect` does, in the config that transformers has as its default:
on a reduced copy, in this process. About a second each.
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hybridtrain.analysis import analyse, of_any, slices
from hybridtrain.analysis.of_layout import LEAST
from hybridtrain.errors import UserError
from hybridtrain.models import reduced
from hybridtrain.models.build import hf_config
from hybridtrain.plan.cuts import as_text

COLUMNS = ("pp", "documents", "tp", "sequence")
LIMIT_S = 900
ROWS = Path(__file__).resolve().parents[1] / "docs" / "models.jsonl"
TEXT = """# Model types

What `hybridtrain inspect` finds for each causal language model of transformers {transformers} (torch
{torch}), in the config that transformers has as its default, without dropout, or, where that is no causal
model or none that can be built, with the fields listed below. `python launch/models_table.py docs/models.md`
writes this page.

*exact*: loss and every gradient of a reduced copy of the model are those of transformers' own model, in fp32.
*pp*: cut into pipeline stages, before each layer; *from 1-6*: before these layers. *documents*: documents
that are packed into rows do not attend to each other. *tp*: attention and MLP (or experts) cut over two
tensor-parallel ranks, or this part of the layers' matrix products, the rest whole on every rank; refused
below a half. *sequence*: sequence parallelism. Data parallelism and ZeRO work with every model that has a
row. Of {types} model types {whole} can be trained: {counts}.

{ranks}

| model type | {header} |
|---|{rule}|
{rows}

## Fields

| model types | fields (`model.config.`) other than the default's |
|---|---|
{fields}

## Refused

| model type | why |
|---|---|
{refused}
"""


_DECODER = {"is_decoder": True}
_INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048},
    "indexer_compress_ratio": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
_HEAD_DIM = {"head_dim": 128}
FIELDS: dict[str, dict[str, Any]] = {
    # Encoders, which are causal as decoders.
    **dict.fromkeys(("bert", "bert-generation", "camembert", "data2vec-text", "ernie"), _DECODER),
    **dict.fromkeys(
        ("electra", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"), _DECODER
    ),
    **dict.fromkeys(("megatron-bert", "xlm-roberta", "xlm-roberta-xl"), _DECODER),
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "xlm": {"causal": True},
    # Models of which transformers' default cannot be built, or is another than its config says.
    "bigbird_pegasus": {"tie_word_embeddings": False},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0}},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEAD_DIM),
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
}
"""Model type -> fields other than transformers' defaults."""


def types() -> list[str]:
    """All model types."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examined(model_type: str) -> Mapping[str, str] | str:
    """Capability -> why not, or why the model cannot be trained at all."""
    from transformers import CONFIG_MAPPING

    try:
        config: Any = CONFIG_MAPPING[model_type](**copy.deepcopy(FIELDS.get(model_type, {})))
        fields = without_dropout(json.loads(config.to_json_string(use_diff=False)))
        facts = of_any.examined({**fields, "model_type": model_type}, attention="sdpa")
        found = dict(facts.refused)
        if facts.cuts is not None:
            found["pp"] = f"from {as_text(facts.cuts)}"
        return found | _tensor(model_type, fields)
    except UserError as error:
        return str(error).splitlines()[0].partition(": ")[2]
    except Exception as error:
        return analyse.words(error)


def _tensor(model_type: str, fields: Mapping[str, Any]) -> dict[str, str]:
    """What two tensor-parallel ranks do not cut."""
    config = hf_config({**fields, "model_type": model_type}, chosen={}, attention="sdpa")
    found = slices.slicing_of(config, size=2, kind=slices.WITH_SEQUENCE)
    kinds = {name.partition(" ")[0] for name in found.cut}
    result = {} if found.slicing.sequence else {"sequence": found.whole["sequence"]}
    if kinds != {"attention", "mlp"}:
        result["tp"] = f"{found.share:.0%}" if found.share >= LEAST else "too little is cut"
    return result


def without_dropout(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json fields with which forward passes are not random."""
    return {
        key: without_dropout(value)
        if isinstance(value, dict)
        else type(value)(0)
        if reduced.is_random(key, value)
        else value
        for key, value in fields.items()
    }


def _on_ranks() -> str:
    """What tests/families/test_table.py has measured."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    if not rows:
        return ""
    parts = []
    for layout in dict.fromkeys(row["layout"] for row in rows):
        found = [row for row in rows if row["layout"] == layout]
        exact = sum(row["result"] == "exact" for row in found)
        wrong = sum(row["result"] == "wrong" for row in found)
        near = sum(row["result"] == "rounding" for row in found)
        refused = len(found) - exact - wrong - near
        parts.append(
            f"{layout}: {exact} exact, {near} as far as rounding allows, {refused} refused, {wrong} wrong"
        )
    text = "Trained on two processes over gloo (`pytest -m table tests/families/test_table.py`, rows in"
    return f"{text}\n[models.jsonl](models.jsonl)): {'; '.join(parts)}."


def _fields() -> str:
    """Rows of model types with the same fields."""
    types: dict[str, list[str]] = {}
    for model_type, fields in FIELDS.items():
        types.setdefault(json.dumps(fields), []).append(model_type)
    return "\n".join(f"| {', '.join(sorted(same))} | `{fields}` |" for fields, same in types.items())


def _cell(why: str | None) -> str:
    """What the table says of a capability."""
    return "exact" if why is None else why if why.startswith("from ") or why.endswith("%") else "refused"


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no end within {LIMIT_S} s")


def main() -> None:
    logging.disable(logging.WARNING)
    signal.signal(
        signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"no end within {LIMIT_S} s"))
    )
    rows, refused = [], []
    exact = dict.fromkeys((*COLUMNS, "tp in part"), 0)
    names = types()
    for name in names:
        signal.alarm(LIMIT_S)
        found = examined(name)
        signal.alarm(0)
        if isinstance(found, str):
            refused.append(f"| {name} | {found[:200].replace('|', ' ')} |")
            continue
        cells = [_cell(found.get(column)) for column in COLUMNS]
        for column in COLUMNS:
            cell = _cell(found.get(column))
            exact[f"{column} in part" if cell.endswith("%") else column] += cell != "refused"
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    text = TEXT.format(
        transformers=version("transformers"),
        torch=version("torch").partition("+")[0],
        types=len(names),
        whole=len(rows),
        counts=", ".join(f"{column} {number}" for column, number in exact.items()),
        header=" | ".join(COLUMNS),
        rule="|".join("---" for _ in COLUMNS),
        rows="\n".join(rows),
        fields=_fields(),
        ranks=_on_ranks(),
        refused="\n".join(refused),
    )
    Path(sys.argv[1]).write_text(text)


if __name__ == "__main__":
    main()
