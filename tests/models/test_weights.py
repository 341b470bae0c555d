"""Weights of a Hugging Face folder: the files transformers reads, every tensor used, tied heads that are
none, rows of added tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hybridtrain.analysis.facts import facts
from hybridtrain.cli.main import main
from hybridtrain.config import compose
from hybridtrain.config.schema import Config, ModelConfig
from hybridtrain.errors import UserError
from hybridtrain.models import weights
from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.models.init import draw
from hybridtrain.models.load import initial
from hybridtrain.models.source import read_config
from hybridtrain.training import job
from tests.cases import Case, model
from tests.models.test_models import loaded_weights, whole_box
from tests.ranks import run_ranks

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def folder_of(path: Path, *, shards: str = "5GB", **fields: Any) -> dict[str, torch.Tensor]:
    """A small model as transformers saves it, and its weights."""
    torch.manual_seed(5)
    module = plain_model(
        hf_config(model("qwen3", vocab_size=257, num_hidden_layers=2, **fields), chosen={}, attention="sdpa")
    )
    module.save_pretrained(path, max_shard_size=shards)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def changed(path: Path, **tensors: torch.Tensor | None) -> None:
    """Write model.safetensors again with these tensors added or replaced; `__` stands for a dot,
    None takes one away."""
    held = load_file(path / "model.safetensors")
    for name, value in tensors.items():
        held.pop(name.replace("__", "."), None)
        if value is not None:
            held[name.replace("__", ".")] = value
    save_file(held, path / "model.safetensors", {"format": "pt"})


def source_of(path: Path, **config: Any) -> Any:
    chosen = ModelConfig(from_pretrained=str(path), config=config)
    fields = read_config(chosen)
    weights.check(chosen, facts=facts(fields))
    built = hf_config(fields, chosen=config, attention="sdpa")
    return initial(chosen, built, seed=0)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    folder_of(tmp_path, shards="100KB")
    merged = {
        name: value * 2 for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()
    }
    save_file(merged, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    source = source_of(tmp_path)
    for name in (EMBED, "model.norm.weight"):
        assert torch.equal(
            source(name, tuple(theirs[name].shape), whole_box(theirs[name].shape)), theirs[name]
        )
        assert torch.equal(theirs[name], merged[name])


def tied_with_another_head(path: Path) -> dict[str, torch.Tensor]:
    held = folder_of(path, tie_word_embeddings=True)
    head = torch.randn(257, 64, generator=torch.Generator().manual_seed(1))
    changed(path, lm_head__weight=head)
    return {**held, HEAD: head}


def test_a_head_that_differs_from_the_embedding_is_not_tied(tmp_path):
    held = tied_with_another_head(tmp_path)
    fields = read_config(ModelConfig(from_pretrained=str(tmp_path)))
    assert fields["tie_word_embeddings"] is False
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, held[HEAD])
    assert torch.equal(source_of(tmp_path)(HEAD, (257, 64), whole_box((257, 64))), held[HEAD])
    with pytest.raises(
        UserError,
        match=r"(?s)model\.config\.tie_word_embeddings=True.*would lose it.*tie_word_embeddings=false",
    ):
        read_config(ModelConfig(from_pretrained=str(tmp_path), config={"tie_word_embeddings": True}))
    changed(tmp_path, lm_head__weight=held[EMBED].clone())
    assert read_config(ModelConfig(from_pretrained=str(tmp_path)))["tie_word_embeddings"] is True
    source_of(tmp_path)


def test_a_head_of_its_own_on_the_hub_is_refused_by_name(tmp_path, monkeypatch):
    """A hub id is read when the model is built: by then it is too late to untie, but not to refuse."""
    repository = tmp_path / "models--me--tied"
    tied_with_another_head(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for chosen in ({}, {"tie_word_embeddings": False}):
        it = ModelConfig(from_pretrained="me/tied", config=chosen)
        built = hf_config(read_config(it), chosen=chosen, attention="sdpa")
        if chosen:
            assert not torch.equal(
                *(initial(it, built, seed=0)(name, (257, 64), whole_box((257, 64))) for name in (EMBED, HEAD))
            )
        else:
            with pytest.raises(
                UserError,
                match=r"me/tied stores a head that differs.*\n.*\n.*model\.config\.tie_word_embeddings=false",
            ):
                initial(it, built, seed=0)


def test_a_tied_model_of_which_only_the_head_is_stored(tmp_path):
    held = folder_of(tmp_path, tie_word_embeddings=True)
    changed(tmp_path, model__embed_tokens__weight=None, lm_head__weight=held[EMBED])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight, held[EMBED])
    assert torch.equal(source_of(tmp_path)(EMBED, (257, 64), whole_box((257, 64))), held[EMBED])


@pytest.mark.parametrize("layout", ["tp2", "pp2", pytest.param("dp_shard2-zero3", marks=pytest.mark.slow)])
def test_a_head_of_its_own_under_a_layout(layout, tmp_path):
    held = tied_with_another_head(tmp_path)
    assert_loaded(tmp_path, layout, held, vocab=257)


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        ("tp2", False),
        ("pp2", True),
        ("dp_shard2-zero3", False),
        pytest.param("tp2-pp2", True, marks=pytest.mark.slow),
    ],
)
def test_rows_of_added_tokens_are_those_of_a_new_model_under_any_layout(layout, tied, tmp_path):
    held = folder_of(tmp_path, tie_word_embeddings=tied)
    built = hf_config(
        read_config(ModelConfig(from_pretrained=str(tmp_path), config={"vocab_size": 263})),
        chosen={},
        attention="sdpa",
    )
    new = draw(built, seed=7)
    for name in {EMBED, HEAD} & set(held):
        drawn = new(name, (263, 64), whole_box((263, 64)))
        held[name] = torch.cat([held[name], drawn[257:]])
        assert drawn[257:].std() == pytest.approx(0.1, rel=0.2)  # initializer_range
    assert_loaded(tmp_path, layout, held, vocab=263)


def assert_loaded(folder: Path, layout: str, held: dict[str, torch.Tensor], *, vocab: int) -> None:
    """A layout holds exactly `held`, and its loss is that of one process."""
    losses = {}
    for name in ("single", layout):
        case = Case(
            name,
            {"vocab_size": vocab},
            overrides=(("model.from_pretrained", str(folder)), ("optim.weight_decay", 0.0)),
        )
        ranks = run_ranks(case.world_size, loaded_weights, case)
        merged = {key: value for _, rank in ranks for key, value in rank.items()}
        assert merged.keys() == held.keys()
        assert [key for key in held if not torch.equal(merged[key], held[key])] == []
        losses[name] = ranks[0][0]
    assert losses[layout] == pytest.approx(losses["single"], rel=1e-6)


def test_a_vocabulary_is_not_cut_and_grows_only_when_asked_for(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(
        UserError,
        match=(
            r"(?s)model\.config\.vocab_size=200: its embedding has 257 rows, "
            "and tokens cannot be removed.*vocab_size=257"
        ),
    ):
        source_of(tmp_path, vocab_size=200)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "vocab_size": 300}))
    with pytest.raises(
        UserError,
        match=(
            r"(?s)model\.from_pretrained=.*its embedding has 257 rows, "
            r"its config\.json says vocab_size 300.*vocab_size=300"
        ),
    ):
        source_of(tmp_path)


INDEXES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git-lfs pointer"),
    "no JSON": (b"{", "it is not JSON"),
    "no weight_map": (b'{"metadata": {}}', "no weight_map"),
    "a list": (b"[1]", "it holds no object but list"),
    "null": (b"null", "it holds no object but NoneType"),
    "a number as file": (b'{"weight_map": {"model.norm.weight": 3}}', "lies in 3, which is no file name"),
    "a file above": (
        b'{"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}',
        "which is no file name in this folder",
    ),
    "an absolute path": (
        b'{"weight_map": {"model.norm.weight": "/etc/passwd"}}',
        "which is no file name in this folder",
    ),
    "another file": (b'{"weight_map": {"nothing": "one.safetensors"}}', "nothing is not in one.safetensors"),
    "brackets": (b"[" * 200_000, "nested too deeply"),
    "no UTF-8": (b"\xff\xfe", "not UTF-8"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_indexes_that_are_none(kind, tmp_path):
    folder_of(tmp_path / "model", tie_word_embeddings=False)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "one.safetensors")
    shutil.copy(tmp_path / "model" / "one.safetensors", tmp_path / "elsewhere.safetensors")
    content, words = INDEXES[kind]
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.from_pretrained=.*index\.json") as refused:
        source_of(tmp_path / "model")
    assert words in str(refused.value)


def test_a_pointer_in_place_of_weights(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"
    )
    with pytest.raises(UserError, match=r"(?s)model\.safetensors: it is a git-lfs pointer.*git lfs pull"):
        source_of(tmp_path)


def test_weights_that_no_parameter_takes_are_refused_or_counted(tmp_path, caplog):
    folder_of(tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    changed(
        tmp_path,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        model__layers__0__self_attn__q_proj__bias=torch.ones(64),
    )
    with pytest.raises(
        UserError,
        match=(
            f"(?s)its files hold '{bias}', which the model of "
            r"its config\.json does not have.*attention_bias=true"
        ),
    ):
        source_of(tmp_path)
    changed(tmp_path, model__layers__0__self_attn__q_proj__bias=None)
    with caplog.at_level("INFO", "hybridtrain.model"):
        source_of(tmp_path)
        source_of(tmp_path, num_hidden_layers=1, layer_types=["full_attention"])
    assert "1 rotary tables in the files are computed instead" in caplog.text
    assert "1 layers of the files are left out: model.config.num_hidden_layers=1" in caplog.text
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**written, "num_hidden_layers": 1, "layer_types": ["full_attention"]})
    )
    with pytest.raises(UserError, match=r"its files hold 'model\.layers\.1\.\S+' and 10 others"):
        source_of(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_by_their_dtype(dtype, tmp_path):
    held = folder_of(tmp_path)
    changed(
        tmp_path, model__layers__1__mlp__up_proj__weight=held["model.layers.1.mlp.up_proj.weight"].to(dtype)
    )
    with pytest.raises(
        UserError,
        match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is stored as (I8|F8_E4M3): quantized weights",
    ):
        source_of(tmp_path)


# -- at the command line -------------------------------------------------------------------------------------


def arguments(data: Path, run: Path, *options: str) -> list[str]:
    return [
        f"data.path={data}",
        f"run.dir={run}",
        "data.seq_len=32",
        "batch.global_batch_size=1",
        "train.steps=1",
        *options,
    ]


@pytest.mark.parametrize("fault", ["bias", "int8", "rows"])
def test_a_refusal_of_weights_leaves_no_run_behind(fault, data, run_dir, tmp_path, capsys):
    held = folder_of(tmp_path / "hf", tie_word_embeddings=True)
    options = ["model.config.vocab_size=300"]
    if fault == "bias":
        changed(tmp_path / "hf", model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    elif fault == "int8":
        changed(tmp_path / "hf", model__norm__weight=held["model.norm.weight"].to(torch.int8))
    else:
        options = []
    assert (
        main(["train", *arguments(data, run_dir, f"model.from_pretrained={tmp_path / 'hf'}", *options)]) == 2
    )
    refused = capsys.readouterr().err
    assert {"bias": "q_proj.bias", "int8": "stored as I8", "rows": "try:     model.config.vocab_size=300"}[
        fault
    ] in refused
    assert not run_dir.exists()


def resolved(data: Path, run: Path, *options: str) -> Config:
    return job.resolve(
        compose.compose("train", arguments(data, run, "model=tiny", *options)),
        world_size=1,
        here=True,
        data=None,
        task=None,
    ).config


def test_a_new_model_has_every_token_of_its_corpus(data, run_dir, tmp_path):
    """A vocabulary in a configuration file is enlarged to the corpus's, one on the command line is
    in force or refused."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    fields = model(vocab_size=100, max_position_embeddings=64)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(json.dumps({"name": "mine", "config": fields}))
    conf = ("--config-dir", str(tmp_path / "conf"), "model=mine")
    config = resolved(data, run_dir, *conf)
    assert config.model.config["vocab_size"] == 300
    assert "vocab_size: 300" in compose.to_yaml(config)
    assert resolved(data, run_dir).model.config["vocab_size"] == 512  # large enough: as in the file
    assert "vocab_size: 512" in compose.to_yaml(resolved(data, run_dir))
    with pytest.raises(UserError, match=r"(?s)model\.config\.vocab_size=100: .*token id .*vocab_size=300"):
        resolved(data, run_dir, *conf, "model.config.vocab_size=100")
