"""Models: facts against the real modules, attention windows, weights from Hugging Face folders,
and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybridtrain.analysis.facts import BY_FIELDS, facts, facts_of
from hybridtrain.config.schema import ModelConfig
from hybridtrain.errors import UserError
from hybridtrain.models.build import hf_config, meta_model, plain_model
from hybridtrain.models.init import draw
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from tests.cases import Case, at_the_head, model, start, whole
from tests.ranks import run_ranks

CONF = sorted((Path(__file__).resolve().parents[2] / "conf" / "model").glob("*.yaml"))

# -- facts ---------------------------------------------------------------------------------------------------


def count(fields: dict[str, Any]) -> int:
    return sum(
        parameter.numel()
        for parameter in meta_model(hf_config(fields, chosen=fields, attention="sdpa")).parameters()
    )


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_the_published_models_have_the_counted_parameters(path):
    fields = yaml.safe_load(path.read_text())["config"]
    assert facts(fields).parameters == count(fields)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [{}, {"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("family", BY_FIELDS)
def test_parameters_are_counted_as_transformers_makes_them(family, biases, tied):
    biases = (
        biases
        if family == "llama"
        else {key: value for key, value in biases.items() if family == "qwen3" and key == "attention_bias"}
    )
    fields = model(family, tie_word_embeddings=tied, vocab_size=257, **biases)
    assert facts(fields).parameters == count(fields)


@pytest.mark.parametrize("family", BY_FIELDS)
def test_defaults_are_those_of_transformers(family):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 32, "intermediate_size": 96}
    ours, theirs = (
        facts({"model_type": family, **sizes}),
        hf_config({"model_type": family, **sizes}, chosen={}, attention="sdpa"),
    )
    assert ours.vocab == theirs.vocab_size
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or ours.hidden // ours.heads
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.window == getattr(theirs, "sliding_window", None)
    assert ours.parameters == count({"model_type": family, **sizes})


# -- attention -----------------------------------------------------------------------------------------------


def logits_of_stage(fields: dict[str, Any], ids: torch.Tensor, attention: str) -> torch.Tensor:
    places = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    return torch.nn.functional.linear(*at_the_head(fields, ids, places, attention=attention, packed=False))


def logits_of_transformers(fields: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    config = hf_config(fields, chosen={}, attention="sdpa")
    source = draw(config, seed=0)
    plain = plain_model(config).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(
                source(name, tuple(parameter.shape), tuple(slice(0, size) for size in parameter.shape))
            )
        return plain(input_ids=ids).logits


WINDOWS = [
    (model("mistral", sliding_window=5, num_hidden_layers=1), 5),
    (model("mistral", sliding_window=5, num_hidden_layers=2), 9),
    (model("mistral", sliding_window=None, num_hidden_layers=1), 16),
    (model("mistral", sliding_window=64, num_hidden_layers=1), 16),
    (model("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=0, num_hidden_layers=1), 5),
    (model("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1, num_hidden_layers=2), 16),
    (model("qwen2", sliding_window=5, use_sliding_window=False, num_hidden_layers=1), 16),
    (model("qwen3", sliding_window=3, use_sliding_window=True, max_window_layers=0, num_hidden_layers=3), 7),
    (model("llama", num_hidden_layers=1), 16),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("fields", "reach"), WINDOWS)
def test_a_token_reaches_as_far_as_the_windows_say(fields, reach, attention):
    """One token is changed; the logits that change are those at its position and up to
    the end of its reach."""
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 256
    before, after = (logits_of_stage(fields, tokens, attention) for tokens in (ids, other))
    changed = (before != after).any(-1)[0]
    assert changed.tolist() == [position < reach for position in range(16)]
    torch.testing.assert_close(before, logits_of_transformers(fields, ids), rtol=1e-4, atol=1e-5)


def test_nothing_reaches_back():
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 9] = (ids[0, 9] + 1) % 256
    for attention in ("sdpa", "eager"):
        before, after = (
            logits_of_stage(model("mistral", sliding_window=5), tokens, attention) for tokens in (ids, other)
        )
        assert torch.equal(before[0, :9], after[0, :9])
        assert not torch.equal(before[0, 9], after[0, 9])


# -- from_pretrained -----------------------------------------------------------------------------------------


def saved_model(
    folder: Path, fields: dict[str, Any], *, dtype: torch.dtype, shards: str
) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    module = plain_model(hf_config(fields, chosen={}, attention="sdpa")).to(dtype)
    module.save_pretrained(folder, max_shard_size=shards)
    return {name: parameter.detach().float() for name, parameter in module.named_parameters()}


def loaded_weights(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    engine = start(case)
    result = engine.train_step(case.batches(0, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=0.0)
    return float(result.loss), {name: whole(parameter) for name, parameter in engine.weights()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, "100KB"), (torch.bfloat16, "5GB")])
def test_weights_of_a_hugging_face_folder(tied, dtype, shards, tmp_path):
    weights = saved_model(
        tmp_path, model("qwen3", vocab_size=257, tie_word_embeddings=tied), dtype=dtype, shards=shards
    )
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shards == "100KB")
    losses = []
    for layout in ("single", "tp2", "pp2", "dp_shard2-zero3"):
        case = Case(
            layout,
            {"vocab_size": 257},
            overrides=(("model.from_pretrained", str(tmp_path)), ("optim.weight_decay", 0.0)),
        )
        ranks = run_ranks(case.world_size, loaded_weights, case)
        merged = {name: value for _, rank in ranks for name, value in rank.items()}
        assert merged.keys() == weights.keys()
        assert [name for name in weights if not torch.equal(merged[name], weights[name])] == []
        losses.append(ranks[0][0])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def source_of(folder: Path, fields: dict[str, Any] | None = None, **changes: Any) -> Any:
    chosen = ModelConfig(from_pretrained=str(folder), config=changes)
    config = hf_config({**(fields or model()), **changes}, chosen=changes, attention="sdpa")
    return initial(chosen, config, seed=0)


def whole_box(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def test_weights_that_are_not_there_or_of_another_shape(tmp_path):
    saved_model(tmp_path, model(), dtype=torch.float32, shards="5GB")
    with pytest.raises(
        UserError,
        match=r"model\.from_pretrained=.*holds no 'model\.layers\.4\.self_attn\.q_proj\.weight' and 8 others",
    ):
        source_of(tmp_path, num_hidden_layers=5)
    with pytest.raises(
        UserError,
        match=r"'model\.layers\.0\.mlp\.gate_proj\.weight' has shape \(96, 64\), the config needs \(32, 64\)",
    ):
        source_of(tmp_path, intermediate_size=32)


def test_damaged_weights_are_refused(tmp_path):
    saved_model(tmp_path, model(), dtype=torch.float32, shards="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, file in index.items() if file == shard.name)
    source = source_of(tmp_path)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"model\.from_pretrained=.*{shard.name}: it cannot be read"):
        source(name, (256, 64), whole_box((256, 64)))
    with pytest.raises(UserError, match=rf"{shard.name}: it cannot be read"):
        source_of(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: it cannot be read"):
        source_of(tmp_path)


def test_folders_without_weights_or_config(tmp_path):
    with pytest.raises(UserError, match=r"model\.from_pretrained=.*no config\.json"):
        read_config(ModelConfig(from_pretrained=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(model()))
    assert facts(read_config(ModelConfig(from_pretrained=str(tmp_path)))).layers == 4
    with pytest.raises(UserError, match="no safetensors weights"):
        source_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="it is not JSON"):
        read_config(ModelConfig(from_pretrained=str(tmp_path)))
    with pytest.raises(UserError, match="no such folder"):
        read_config(ModelConfig(from_pretrained=str(tmp_path / "nowhere")))


def test_fields_of_a_folder_can_be_changed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model()))
    assert (
        facts(read_config(ModelConfig(from_pretrained=str(tmp_path), config={"num_hidden_layers": 2}))).layers
        == 2
    )


def test_a_value_that_cannot_be_names_the_file_it_stands_in_or_the_option(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**model(), "hidden_size": "wide"}))
    with pytest.raises(
        UserError,
        match=(
            rf"model\.config\.hidden_size=wide: not a whole number \(config\.json of {tmp_path}\)\n  allowed"
        ),
    ):
        facts_of(ModelConfig(from_pretrained=str(tmp_path)))
    with pytest.raises(UserError, match=r"model\.config\.hidden_size=none: not a whole number\n  allowed"):
        facts_of(ModelConfig(from_pretrained=str(tmp_path), config={"hidden_size": "none"}))
    assert facts_of(ModelConfig(from_pretrained=str(tmp_path), config={"hidden_size": 64})).hidden == 64


def test_an_adapter_is_refused_by_name(tmp_path):
    """A LoRA folder holds an adapter and no model."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="LoRA"):
        read_config(ModelConfig(from_pretrained=str(tmp_path)))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.layers.0.self_attn.q_proj.lora_A.weight": "one.safetensors"}})
    )
    with pytest.raises(UserError, match="LoRA"):
        source_of(tmp_path)


@pytest.mark.parametrize("kind", ["dit", "nosuch", None])
def test_architectures_that_are_not_supported(kind):
    with pytest.raises(
        UserError, match=r"(?s)model\.config\.model_type.*not supported yet.*llama, mistral, qwen2, qwen3"
    ):
        facts({"model_type": kind, "hidden_size": 8})


def test_an_unknown_field_names_the_nearest():
    fields = model(num_hiden_layers=3)
    with pytest.raises(UserError, match=r"(?s)model\.config\.num_hiden_layers=3.*num_hidden_layers"):
        hf_config(fields, chosen={"num_hiden_layers": 3}, attention="sdpa")


def test_a_config_that_transformers_refuses_is_a_user_error():
    with pytest.raises(UserError, match=r"model\.config"):
        hf_config(model(hidden_size="wide"), chosen={}, attention="sdpa")
