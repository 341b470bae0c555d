"""What a model type cannot do, or a field would not change, is said before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridtrain.analysis import slices
from hybridtrain.analysis.facts import facts
from hybridtrain.config.schema import ParallelConfig
from hybridtrain.engine.common import agreed_slicing
from hybridtrain.errors import UserError
from hybridtrain.models.build import hf_config
from hybridtrain.models.slicing import NOTHING, Slicing
from tests import cases
from tests.cases import Case, model
from tests.families.copies import config_of, fields_of, own_fields_of
from tests.ranks import run_ranks

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_a_classifier_is_cut_as_its_language_model() -> None:
    fields = {**model(), "num_labels": 3, "architectures": ["LlamaForSequenceClassification"]}
    config = hf_config(fields, chosen={}, attention="sdpa")
    found = slices.slicing_of(config, size=2, kind=slices.WITH_SEQUENCE)
    assert found.share == 1.0
    assert found.slicing.cuts["self_attn.q_proj.weight"]


def agreed(rank_cuts: list[dict[str, str]]) -> dict[str, str]:
    cuts = rank_cuts[torch.distributed.get_rank()]
    slicing = Slicing(**{**vars(NOTHING), "cuts": cuts})
    return dict(agreed_slicing(slicing, parallel=ParallelConfig(), tp=2).cuts)


def test_ranks_cut_as_rank_0_has_found() -> None:
    cuts = [{"mlp.up_proj.weight": "columns"}, {}]
    assert run_ranks(2, agreed, cuts) == [cuts[0]] * 2
    with pytest.raises(UserError, match="no layer of this model could be cut"):
        agreed_slicing(NOTHING, parallel=ParallelConfig(), tp=2)
    assert agreed_slicing(NOTHING, parallel=ParallelConfig(allow_replicated=True), tp=2) == NOTHING


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (own_fields_of("mixtral") | {"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        (own_fields_of("mixtral") | {"num_labels": 3}, "no such classifier of this architecture"),
    ],
)
def test_what_is_not_trained_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        facts(fields)


def test_dropout_of_a_config_inside_is_found() -> None:
    fields = config_of("emu3").to_dict()
    fields["text_config"] |= {"num_hidden_layers": 2, "attention_dropout": 0.2}
    with pytest.raises(
        UserError, match=r"model\.config\.text_config\.attention_dropout=0\.2: random"
    ) as told:
        facts({**fields, "model_type": "emu3"})
    assert "model.config.text_config.attention_dropout=0" in str(told.value)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_documents_are_not_packed_where_positions_depend_on_the_longest(model_type: str) -> None:
    given = {"rope_parameters": {**LONG, "rope_theta": 1e4, "original_max_position_embeddings": 32}}
    fields = model() if model_type == "llama" else own_fields_of("phi3") | {"max_position_embeddings": 64}
    assert "documents" in facts({**fields, **given}).refused


@pytest.mark.parametrize(
    ("model_type", "chosen", "words"),
    [
        ("gpt2", {"rope_theta": 1e6}, r"model\.config\.rope_theta=1000000\.0: a gpt2 config has no such"),
        ("gpt2", {"head_dim": 32}, r"model\.config\.head_dim=32: a gpt2 config has no such field"),
        ("gemma3", {"text_config": {"slidng_window": 9}}, r"text_config\.sliding_window=9"),
        ("gemma3_text", {"rope_theta": 5e5}, "has no such field"),
    ],
)
def test_a_field_that_would_do_nothing_is_refused(
    model_type: str, chosen: dict[str, Any], words: str
) -> None:
    fields = {**config_of(model_type).to_dict(), "model_type": model_type, **chosen}
    with pytest.raises(UserError, match=words):
        hf_config(fields, chosen=chosen, attention="sdpa")


def test_a_field_that_a_config_inside_reads_undeclared_is_taken() -> None:
    fields = own_fields_of("dbrx", attn_config={"rope_theta": 5e5})
    config = hf_config(fields, chosen=fields, attention="sdpa")
    assert config.attn_config.rope_theta == fields["attn_config"]["rope_theta"]


@pytest.mark.parametrize(
    ("model_type", "fields", "longest"),
    [
        ("roberta", {"is_decoder": True, **NO_BERT_DROPOUT}, 510),
        ("whisper", {}, 448),
        ("mpt", {}, 2048),
        ("gpt2", {}, 1024),
    ],
)
def test_a_row_is_no_longer_than_the_table_of_positions(
    model_type: str, fields: dict[str, Any], longest: int
) -> None:
    config = config_of(model_type, **fields).to_dict()
    layers = {"num_hidden_layers": 2, "n_layers": 2, "n_layer": 2, "decoder_layers": 2}
    config |= {key: value for key, value in layers.items() if key in config}
    assert facts({**config, "model_type": model_type}).max_positions == longest


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "pp2", "dp_shard2-zero3"])
def test_hidden_states_that_a_model_carries_in_fp32_stay_so(layout: str) -> None:
    """Mamba's, in a bf16 run: as in the plain process, whose layers get them as they are."""
    case = Case(layout, fields_of("mamba"), precision="bf16_mixed")
    found = cases.differences(cases.on_ranks(case), cases.reference(case))
    assert found["loss_rel"] < 1e-3, found
    assert found["grad_rel"] < 5e-2, found
