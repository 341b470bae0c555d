"""Exports: the same values as the model's own state, files that safetensors and transformers read, memory of one tensor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridtrain.checkpoint import marker, sealed, sharded
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.cli.main import main
from hybridtrain.config import compose
from hybridtrain.config.schema import CheckpointConfig, Config, ExportConfig, ExportRoot, RunConfig
from hybridtrain.data import digests
from hybridtrain.errors import UserError
from hybridtrain.export import destination, hf, safetensors
from hybridtrain.models import tokens
from hybridtrain.models.build import save_config
from hybridtrain.types import Progress
from tests.runs import four_parts, immutable

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest puts back what the module turns off


def model_of(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 11, "num_attention_heads": 2, "vocab_size": 37}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, eos_token_id=1, bos_token_id=1))


def run_of(folder: Path, model: LlamaForCausalLM, *, tied: bool) -> Path:
    """A run directory as the trainer leaves it: config.yaml, model/, one checkpoint; and its data's tokenizer."""
    run = folder / "run"
    model.config.save_pretrained(run / "model")
    model.generation_config.save_pretrained(run / "model")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")), eos_token="</s>").save_pretrained(
        folder / "data" / "tokenizer"
    )
    config = Config()
    config.data.path = str(folder / "data")
    (run / "config.yaml").write_text(compose.to_yaml(config))
    for step in (10, 20):
        tensors = {f"model.{name}": value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
        tensors |= {f"optim.{name}.exp_avg": torch.zeros_like(p) for name, p in model.named_parameters()}
        sharded.save(tensors, path=run / "checkpoints" / f"step-{step:08d}", progress=Progress(step, step, {}), group=None, asynchronous=False).result()
    return run


def read_back(out: Path) -> dict[str, torch.Tensor]:
    result = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            result |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (safe_open is no mapping)
    return result


def exporting(run: Path, **options: object) -> ExportRoot:
    return ExportRoot(run=RunConfig(dir=str(run)), export=ExportConfig(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_holds_the_models_values_and_loads_in_transformers(tmp_path: Path, tied: bool) -> None:
    model = model_of(tied=tied)
    run = run_of(tmp_path, model, tied=tied)
    assert hf.run(exporting(run)) == 0
    out = run / "export"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "hybridtrain.json"} <= set(os.listdir(out))
    stored, state = read_back(out), model.state_dict()
    assert set(stored) == set(state) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    origin = json.loads((out / "hybridtrain.json").read_text())
    assert sorted(origin.pop("contents")) == sorted(set(os.listdir(out)) - {"hybridtrain.json"})
    assert {**origin, "files": sorted(os.listdir(out))} == {"step": 20, "tokens_seen": 20, "dtype": "float32", "files": sorted(os.listdir(out))}
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.dtype == torch.float32
    ids = torch.arange(30).reshape(2, 15)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    assert not list(run.glob("export.*"))


def test_small_shards_have_an_index_that_adds_up_and_keep_the_order_of_layers(tmp_path: Path) -> None:
    model = model_of(tied=False)
    run = run_of(tmp_path, model, tied=False)
    hf.run(exporting(run, max_shard_gb=6e-6, out=str(tmp_path / "out")))
    out = tmp_path / "out"
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 5
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
        assert names == {name for name, where in index["weight_map"].items() if where == file.name}
        assert sum(state[name].nbytes for name in names) <= 6000
    layers = [int(name.split(".")[2]) for name in index["weight_map"] if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_other_dtypes(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    model = model_of(tied=False)
    run = run_of(tmp_path, model, tied=False)
    hf.run(exporting(run, dtype=dtype))
    state = model.state_dict()
    assert all(torch.equal(value, state[name].to(torch_dtype)) for name, value in read_back(run / "export").items())
    assert AutoModelForCausalLM.from_pretrained(run / "export").dtype == torch_dtype


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = model_of(tied=False)
    with torch.no_grad():
        model.model.norm.weight[3] = 70000.0
    run = run_of(tmp_path, model, tied=False)
    with pytest.raises(UserError, match=r"export\.dtype=float16: model\.norm\.weight has values up to 7e\+04"):
        hf.run(exporting(run, dtype="float16"))
    assert not list(run.glob("export*"))
    hf.run(exporting(run, dtype="bfloat16"))


def test_an_earlier_export_is_replaced_and_any_other_folder_is_not(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    hf.run(exporting(run, max_shard_gb=6e-6))
    hf.run(exporting(run, checkpoint=str(run / "checkpoints" / "step-00000010")))
    assert len(list((run / "export").glob("*.safetensors"))) == 1
    assert json.loads((run / "export" / "hybridtrain.json").read_text())["step"] == 10
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an earlier export"):
        hf.run(exporting(run, out=str(mine)))
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    with pytest.raises(UserError, match="there is no such folder"):
        hf.run(exporting(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"export\.dtype=int4"):
        hf.run(exporting(run, dtype="int4"))
    with pytest.raises(UserError, match=r"export\.max_shard_gb"):
        hf.run(exporting(run, max_shard_gb=0.0))
    as_earlier(run / "checkpoints" / "step-00000020")
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(UserError, match="does not tie the embeddings"):
        hf.run(exporting(run))
    file = next((run / "checkpoints" / "step-00000020").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        hf.run(exporting(run))
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "complete.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        hf.run(exporting(run))
    assert not list(run.glob("export*"))


def test_a_checkpoint_that_is_none_is_refused_by_its_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    monkeypatch.chdir(run)
    assert main(["export", "export.checkpoint=200"]) == 2
    assert "export.checkpoint=200: there is no such folder" in four_parts(capsys.readouterr().err, "export.checkpoint")
    alone = shutil.copytree(run / "checkpoints" / "step-00000020", tmp_path / "a" / "b" / "mine")
    for command, option in (("export", "export.checkpoint"), ("generate", "generate.source")):
        assert main([command, f"{option}={alone}"]) == 2
        said = four_parts(capsys.readouterr().err, option)
        assert f"{option}={alone}: it is no checkpoint where its run left it: {tmp_path / 'a'} has no config.yaml" in said
        assert "run.dir" not in said


def as_earlier(checkpoint: Path) -> None:
    """Make a checkpoint what earlier releases wrote: without the model's config.json and generation_config.json."""
    listed = json.loads((checkpoint / "complete.json").read_text())
    for name in ("config.json", "generation_config.json"):
        (checkpoint / name).unlink()
        del listed["files"][name]
    (checkpoint / "complete.json").write_text(json.dumps(listed))


def test_a_config_that_was_edited_after_training_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    file = run / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_hidden_layers": 1, "rms_norm_eps": 1e-3}))
    hf.run(exporting(run))
    exported = json.loads((run / "export" / "config.json").read_text())
    assert (exported["num_hidden_layers"], exported["rms_norm_eps"]) == (11, 1e-6)
    assert "config.json has changed since the checkpoint was written (num_hidden_layers was 11 and is 1; rms_norm_eps was 1e-06 and is 0.001)" in caplog.text
    as_earlier(run / "checkpoints" / "step-00000020")
    with pytest.raises(UserError, match=r"num_hidden_layers=1, the checkpoint's model has 11; was it edited"):
        hf.run(exporting(run))
    file.write_text(json.dumps(config))
    hf.run(exporting(run))


def test_end_tokens_that_were_edited_after_training_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    file = run / "model" / "generation_config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps({**given, "temperature": 7.0}))
    hf.run(exporting(run))
    assert "generation_config.json has changed since the checkpoint was written; the checkpoint's own is exported" in caplog.text
    assert "temperature" not in json.loads((run / "export" / "generation_config.json").read_text())
    as_earlier(run / "checkpoints" / "step-00000020")  # which took no copy along
    hf.run(exporting(run))
    assert json.loads((run / "export" / "generation_config.json").read_text())["temperature"] == 7.0


# -- beside the weights --------------------------------------------------------------------------------------------

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}


@pytest.mark.parametrize("earlier", [False, True])
def test_the_sources_end_tokens_and_sampling_values_are_exported(tmp_path: Path, earlier: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The file is taken over when training starts; of a run of an earlier release, which did not, from the source."""
    given = {**SAMPLING, "eos_token_id": [5, 0], "pad_token_id": 0, "bos_token_id": 0}
    model = model_of(tied=True)
    run = run_of(tmp_path, model, tied=True)
    as_earlier(run / "checkpoints" / "step-00000020")  # what model/ holds by then counts
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(given))
    config = compose.read_run(run / "config.yaml")
    config.model.from_pretrained = str(tmp_path / "source")
    (run / "config.yaml").write_text(compose.to_yaml(config))
    if not earlier:
        save_config(model.config, run / "model", model=config.model)
        assert json.loads((run / "model" / "generation_config.json").read_text()) == given
        shutil.rmtree(tmp_path / "source")
    hf.run(exporting(run))
    loaded = GenerationConfig.from_pretrained(run / "export").to_dict()
    # the corpus's texts end with token 1, which the source did not know: training taught the model to end with it
    assert {key: loaded[key] for key in given} == {**given, "eos_token_id": [5, 0, 1]}
    assert "generation_config.json: eos_token_id [5, 0] and 1, which ended what was trained on" in caplog.text


def test_new_weights_end_texts_as_their_corpus_does(tmp_path: Path) -> None:
    model = model_of(tied=True)
    model.config.eos_token_id, model.config.bos_token_id = 2, 3
    model.generation_config = GenerationConfig.from_model_config(model.config)
    run = run_of(tmp_path, model, tied=True)
    hf.run(exporting(run))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((run / "export" / name).read_text())["eos_token_id"] == 1, name
    assert "pad_token_id" not in {key for key, value in json.loads((run / "export" / "config.json").read_text()).items() if value is not None}


@pytest.mark.parametrize("new", [False, True])
def test_the_end_of_an_answer_ends_what_an_export_generates(tmp_path: Path, new: bool) -> None:
    """Of conversations, training teaches the token of the chat template that ends an answer, which need not be the tokenizer's end of text."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "data" / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + '<|turn|>' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "data" / "tokenizer")
    (tmp_path / "data" / "corpus.json").write_text(json.dumps({"kind": "chat"}))
    if not new:
        model_of(tied=True).save_pretrained(tmp_path / "source")
        config = compose.read_run(run / "config.yaml")
        config.model.from_pretrained = str(tmp_path / "source")
        (run / "config.yaml").write_text(compose.to_yaml(config))
    hf.run(exporting(run))
    assert GenerationConfig.from_pretrained(run / "export").eos_token_id == [1, tokenizer.convert_tokens_to_ids("<|turn|>")]
    assert json.loads((run / "export" / "config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("facts", ['{"kind": "cha', '{"kind": "chat"}'])
def test_data_that_was_damaged_since_is_no_reason_not_to_export(tmp_path: Path, facts: str, caplog: pytest.LogCaptureFixture) -> None:
    """corpus.json cut short; a tokenizer that has lost its chat template."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    (tmp_path / "data" / "corpus.json").write_text(facts)
    hf.run(exporting(run))
    assert GenerationConfig.from_pretrained(run / "export").eos_token_id == 1
    assert "is not known: data." in caplog.text


def test_end_tokens_that_differ_are_named() -> None:
    ends = tokens.Ends(begin=None, end=7, pad=None, turn=9)
    config, generation, lines = tokens.fitted({"eos_token_id": 2}, {"eos_token_id": [2, 7]}, of_tokenizer=ends, new=False)
    assert (config, generation) == ({"eos_token_id": 2}, {"eos_token_id": [2, 7, 9]})
    assert lines == [
        "config.json ends texts with [2], the tokenizer with 7",
        "the chat template ends answers with 9, the tokenizer ends texts with [7]",
        "generation_config.json: eos_token_id [2, 7] and 9, which ended what was trained on",
    ]
    assert tokens.fitted({"eos_token_id": 7}, {}, of_tokenizer=tokens.Ends(None, 7, None, 7), new=False)[2] == []
    assert len(tokens.fitted({"eos_token_id": 2}, {}, of_tokenizer=ends, new=True)[2]) == 2


@pytest.mark.parametrize(
    "content", [b'{"version": "1.0", "trunc', b'{"version": "1.0", "model": {"type": "Unheard"}}', b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_tokenizer_that_does_not_load_is_not_exported(tmp_path: Path, content: bytes) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tokenizer=.*(cannot load its tokenizer|git-lfs pointer)"):
        hf.run(exporting(run))
    assert not list(run.glob("export*"))


def test_a_folder_that_holds_a_model_too_gives_its_tokenizer_alone(tmp_path: Path) -> None:
    model = model_of(tied=True)
    run = run_of(tmp_path, model, tied=True)
    other = model_of(tied=False)
    other.save_pretrained(tmp_path / "other")
    for file in (tmp_path / "data" / "tokenizer").iterdir():
        file.rename(tmp_path / "other" / file.name)
    (tmp_path / "data" / "tokenizer").rmdir()
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages }}")
    config = compose.read_run(run / "config.yaml")
    config.data.tokenizer = str(tmp_path / "other")
    (run / "config.yaml").write_text(compose.to_yaml(config))
    hf.run(exporting(run))
    assert json.loads((run / "export" / "config.json").read_text())["tie_word_embeddings"] is True
    assert set(read_back(run / "export")) == set(model.state_dict()) - {"lm_head.weight"}
    assert AutoTokenizer.from_pretrained(run / "export").chat_template == "{{ messages }}"


# -- where it goes -------------------------------------------------------------------------------------------------


def test_a_link_is_followed_and_leftovers_block_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    (tmp_path / "disk").mkdir()
    (run / "export").symlink_to(tmp_path / "disk" / "mine")
    for _ in range(2):  # into a place that is not there yet, and over an export
        hf.run(exporting(run))
        assert (run / "export").is_symlink()
        assert AutoModelForCausalLM.from_pretrained(run / "export").config.vocab_size == 37
    assert os.listdir(tmp_path / "disk") == ["mine"]
    shutil.copytree(tmp_path / "disk" / "mine", tmp_path / "disk" / "mine.removed")
    shutil.copytree(tmp_path / "disk" / "mine", tmp_path / "disk" / "mine.partial")
    hf.run(exporting(run))
    assert os.listdir(tmp_path / "disk") == ["mine"]
    (tmp_path / "disk" / "mine").rename(tmp_path / "disk" / "mine.removed")  # ended between the two renames
    (tmp_path / "disk" / "mine.removed" / "README.md").write_text("kept")
    hf.run(exporting(run))
    assert (tmp_path / "disk" / "mine" / "README.md").read_text() == "kept"
    assert os.listdir(tmp_path / "disk") == ["mine"]


def test_an_earlier_export_that_cannot_be_removed_goes_with_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What stays of it still says whose it is: removed with its record first, it would lie there for ever."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    hf.run(exporting(run))
    with immutable(run / "export" / "model.safetensors"):
        hf.run(exporting(run))
        assert "model.safetensors cannot be removed and stays" in caplog.text
        assert sorted(os.listdir(run / "export.removed")) == ["hybridtrain.json", "model.safetensors"]
        assert AutoModelForCausalLM.from_pretrained(run / "export").config.vocab_size == 37
    hf.run(exporting(run))
    assert not list(run.glob("export.*"))
    (run / "export.removed").mkdir()  # everything in it could be removed, and it could not
    hf.run(exporting(run))
    assert not list(run.glob("export.*"))


@pytest.mark.parametrize("earlier", [False, True])
def test_files_of_others_in_an_export_stay(tmp_path: Path, earlier: bool) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    hf.run(exporting(run, max_shard_gb=6e-6))
    out = run / "export"
    if earlier:  # whose record has no list
        (out / "hybridtrain.json").write_text(json.dumps({"step": 20, "tokens_seen": 20, "dtype": "float32"}))
    (out / "README.md").write_text("my notes")
    (out / "runs").mkdir()
    (out / "runs" / "one.txt").write_text("mine")
    for _ in range(2):
        hf.run(exporting(run))
        assert [(out / "README.md").read_text(), (out / "runs" / "one.txt").read_text()] == ["my notes", "mine"]
        assert len(list(out.glob("*.safetensors*"))) == 1
    (out / "chat_template.jinja").write_text("mine")
    hf.run(exporting(run))
    (tmp_path / "data" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"it has chat_template\.jinja, which no export wrote and this one would replace"):
        hf.run(exporting(run))
    assert (out / "chat_template.jinja").read_text() == "mine"
    assert not list(run.glob("export.*"))


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for shard in (6e-6, 5.0):
        hf.run(exporting(run, out=".", max_shard_gb=shard))
        Path("note.txt").write_text("mine")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "here").config.vocab_size == 37
        assert Path.cwd() == tmp_path / "here"
    assert len(list(Path.cwd().glob("*.safetensors*"))) == 1
    assert set(os.listdir(tmp_path)) == {"here", "run", "data"}


def test_two_exports_at_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    with destination.replacing(run / "export") as partial:
        (partial / "hybridtrain.json").write_text('{"step": 1}')
        with pytest.raises(UserError, match="another export is writing there"):
            hf.run(exporting(run))
    hf.run(exporting(run))
    assert json.loads((run / "export" / "hybridtrain.json").read_text())["step"] == 20


def test_exports_of_a_run_that_removes_its_checkpoints_meanwhile(tmp_path: Path) -> None:
    """A thread saves a checkpoint and removes the one before, again and again, as checkpoint.every=1 keep_last=1 does."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    manager = Manager(run / "checkpoints", settings=CheckpointConfig(keep_last=1))
    ended = threading.Event()

    def train() -> None:
        for step in range(21, 10_000):
            if ended.is_set():
                return
            aside = manager.folder / f"step-{step:08d}.partial"
            shutil.copytree(manager.path(step - 1), aside)
            marker.write(aside, progress=Progress(step, step, {}), files={file.name: marker.measure(file) for file in aside.glob("*.distcp")})
            aside.rename(manager.path(step))
            manager.prune()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(12):
            assert hf.run(exporting(run)) == 0
    finally:
        ended.set()
        thread.join()
    assert manager.steps()[-1] > 40


def test_the_safetensors_library_reads_every_dtype_and_shape_that_we_write(tmp_path: Path) -> None:
    values = {
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
        "bits": torch.tensor([True, False, True]),
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
        "view": torch.randn(4, 6).t(),
        "long": torch.tensor([2**40]),
    }
    entries = [safetensors.Entry(name, tuple(value.shape), value.dtype) for name, value in values.items()]
    safetensors.write(tmp_path / "x.safetensors", entries=entries, tensor=lambda entry: values[entry.name])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, value in values.items():
            assert torch.equal(opened.get_tensor(name), value), name
            assert opened.get_tensor(name).dtype == value.dtype


MEASURED = """
import re, sys
from pathlib import Path
from hybridtrain.export import hf
from hybridtrain.config.schema import Config
def export(run):
    its = hf.Run(Path(run), Config())
    hf.export(Path(run) / "step-1", run=its, out=Path(run) / "out", dtype="float32", max_shard_bytes=50_000_000)
def peak():  # MiB of this process since exec; ru_maxrss would count the parent's before it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
export(sys.argv[1])
before = peak()
export(sys.argv[2])
print(peak() - before)
"""


def test_memory_stays_at_a_few_tensors(tmp_path: Path) -> None:
    for name, count, size in (("small", 1, 1000), ("large", 20, 2_000_000)):
        tensors = {f"model.layers.{n}.weight": torch.ones(size) for n in range(count)}
        sharded.save(tensors, path=tmp_path / name / "step-1", progress=Progress(1, 1, {}), group=None, asynchronous=False).result()
        (tmp_path / name / "model").mkdir()
        (tmp_path / name / "model" / "config.json").write_text('{"tie_word_embeddings": true}')
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "large")]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(list((tmp_path / "large" / "out").glob("*.safetensors"))) == 4
    assert 8 < grown < 90, f"{grown:.0f} MiB more for a model of 160 MB whose tensors have 8 MB"


# -- an export is what was written ---------------------------------------------------------------------------------


def test_weights_that_are_not_those_that_were_exported_are_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    hf.run(exporting(run))
    out = run / "export"
    file, name = out / "model.safetensors", "model.safetensors"
    whole = file.read_bytes()
    sealed.check(out, field="evaluate.source")
    assert sealed.verify(out, field="run.dir") == []
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace("1e-06", "1e-05"))
    sealed.check(out, field="evaluate.source")  # may be meant
    assert "config.json holds other bytes than the export wrote" in caplog.text
    (out / "config.json").write_text(config)
    for damaged, words in ((whole[:-1] + bytes([whole[-1] ^ 1]), "holds other bytes than the export wrote"), (whole + b"0", "bytes, and")):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: {'holds' if 'holds' in words else 'has'}"):
            sealed.check(out, field="evaluate.source")
        assert words in sealed.verify(out, field="run.dir")[0]
        assert main(["verify", str(out)]) == 1
        assert main(["evaluate", f"evaluate.source={out}", f"data.path={tmp_path / 'none'}"]) == 2
    file.write_bytes(whole)
    assert main(["verify", str(out)]) == 0
    (out / "hybridtrain.json").write_text('{"step": 20}')  # an earlier release's
    sealed.check(out, field="evaluate.source")
    assert "earlier release" in sealed.verify(out, field="run.dir")[0]


def test_a_tokenizer_that_changed_after_prepare_is_named_when_it_is_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    file = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    record = {"tokenizer_files": {"tokenizer/tokenizer.json": digests.of(file)}}
    (tmp_path / "data" / "corpus.json").write_text(json.dumps(record))
    hf.run(exporting(run))
    assert "prepare wrote" not in caplog.text
    file.write_text(file.read_text() + " ")
    hf.run(exporting(run))
    assert "tokenizer/tokenizer.json has" in caplog.text
    assert "prepare wrote" in caplog.text


@pytest.mark.parametrize("name", ["complete.json", "progress.json"])
@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe", b"{}", b'{"format": 1, "files": {"a": {"size": 1e999, "crc32": "0"}}}'])
def test_a_record_of_a_checkpoint_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    for file in ("complete.json", "progress.json"):
        (tmp_path / file).write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        marker.read(tmp_path) if name == "complete.json" else marker.read_progress(tmp_path)


def test_an_export_that_was_killed_over_its_first_file_is_begun_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    (run / "export.partial").mkdir()
    (run / "export.partial" / ".hybridtrain.json.17-140.partial").write_text("{")
    hf.run(exporting(run))
    assert not list(run.glob("export.*"))
