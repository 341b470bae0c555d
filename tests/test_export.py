"""Exports: the same values as the model's own state, files that safetensors and transformers read, memory of one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hybridtrain.checkpoint import hf, safetensors, sharded
from hybridtrain.config import compose
from hybridtrain.config.schema import Config, ExportConfig, ExportRoot, RunConfig
from hybridtrain.types import Progress, UserError

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
    assert json.loads((out / "hybridtrain.json").read_text()) == {"step": 20, "tokens_seen": 20, "dtype": "float32"}
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


def test_shards_hold_what_fits_and_a_large_tensor_stands_alone() -> None:
    entries = [safetensors.Entry(str(n), (n,), torch.uint8) for n in (3, 3, 3, 20, 1, 9)]
    cut = safetensors.shards(entries, max_bytes=10)
    assert [[entry.size for entry in shard] for shard in cut] == [[3, 3, 3], [20], [1, 9]]


MEASURED = """
import re, sys
from pathlib import Path
from hybridtrain.checkpoint import hf
def export(run):
    hf.export(Path(run) / "step-1", model_dir=Path(run) / "model", tokenizer_dir=None, out=Path(run) / "out", dtype="float32", max_shard_bytes=50_000_000)
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
