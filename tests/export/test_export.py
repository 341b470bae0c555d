"""Exports: the same values as the model's own state, files that safetensors and transformers read,
memory of one tensor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridtrain.checkpoint import export_record, marker, sharded
from hybridtrain.cli.main import main
from hybridtrain.errors import UserError
from hybridtrain.export import hf, safetensors
from hybridtrain.precision.rounding import split
from hybridtrain.types import Progress
from tests.export.runs import as_earlier, exporting, model_of, read_back, run_of
from tests.runs import four_parts

# pytest puts back what the module turns off
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_holds_the_models_values_and_loads_in_transformers(tmp_path: Path, tied: bool) -> None:
    model = model_of(tied=tied)
    run = run_of(tmp_path, model, tied=tied)
    assert hf.run(exporting(run)) == 0
    out = run / "export"
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "hybridtrain.json",
    } <= set(os.listdir(out))
    stored, state = read_back(out), model.state_dict()
    assert set(stored) == set(state) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    origin = json.loads((out / "hybridtrain.json").read_text())
    assert sorted(origin.pop("contents")) == sorted(set(os.listdir(out)) - {"hybridtrain.json"})
    assert {**origin, "files": sorted(os.listdir(out))} == {
        "step": 20,
        "tokens_seen": 20,
        "dtype": "float32",
        "files": sorted(os.listdir(out)),
    }
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
    assert all(
        torch.equal(value, state[name].to(torch_dtype)) for name, value in read_back(run / "export").items()
    )
    assert AutoModelForCausalLM.from_pretrained(run / "export").dtype == torch_dtype


def test_what_bf16_weights_lack_is_exported_in_fp32(tmp_path: Path) -> None:
    """precision=bf16_pure keeps it in the optimizer's state."""
    model = model_of(tied=False)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    run = run_of(tmp_path, model.to(torch.bfloat16), tied=False)
    parts = {name: split(value) for name, value in wanted.items()}
    tensors = {f"model.{name}": weight for name, (weight, _) in parts.items()}
    tensors |= {f"optim.{name}.compensation": rest for name, (_, rest) in parts.items()}
    path = run / "checkpoints" / "step-00000030"
    sharded.save(tensors, path=path, progress=Progress(30, 30, {}), group=None, asynchronous=False).result()
    hf.run(exporting(run, dtype="float32"))
    assert all(torch.equal(value, wanted[name]) for name, value in read_back(run / "export").items())


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = model_of(tied=False)
    with torch.no_grad():
        model.model.norm.weight[3] = 70000.0
    run = run_of(tmp_path, model, tied=False)
    with pytest.raises(
        UserError, match=r"export\.dtype=float16: model\.norm\.weight has values up to 7e\+04"
    ):
        hf.run(exporting(run, dtype="float16"))
    assert not list(run.glob("export*"))
    hf.run(exporting(run, dtype="bfloat16"))


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


def test_a_checkpoint_that_is_none_is_refused_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    monkeypatch.chdir(run)
    assert main(["export", "export.checkpoint=200"]) == 2
    assert "export.checkpoint=200: there is no such folder" in four_parts(
        capsys.readouterr().err, "export.checkpoint"
    )
    alone = shutil.copytree(run / "checkpoints" / "step-00000020", tmp_path / "a" / "b" / "mine")
    for command, option in (("export", "export.checkpoint"), ("generate", "generate.source")):
        assert main([command, f"{option}={alone}"]) == 2
        said = four_parts(capsys.readouterr().err, option)
        assert (
            f"{option}={alone}: it is not in the checkpoints folder of a run: "
            f"{tmp_path / 'a'} has no config.yaml"
        ) in said
        assert "run.dir" not in said


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
    entries = [
        safetensors.TensorSpec(name, tuple(value.shape), value.dtype) for name, value in values.items()
    ]
    safetensors.write(
        tmp_path / "x.safetensors", specs=entries, tensor=lambda entry: values[entry.name], metadata={}
    )
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
    run = Path(run)
    its = hf.SourceRun(run, Config())
    options = {"dtype": "float32", "which": "last", "merge": False, "max_shard_bytes": 50_000_000}
    hf.export(run / "step-1", run=its, out=run / "out", **options)
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
        sharded.save(
            tensors,
            path=tmp_path / name / "step-1",
            progress=Progress(1, 1, {}),
            group=None,
            asynchronous=False,
        ).result()
        (tmp_path / name / "model").mkdir()
        (tmp_path / name / "model" / "config.json").write_text(
            '{"model_type": "llama", "tie_word_embeddings": true}'
        )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        MEASURED,
        str(tmp_path / "small"),
        str(tmp_path / "large"),
    ]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(list((tmp_path / "large" / "out").glob("*.safetensors"))) == 4
    assert 8 < grown < 90, f"{grown:.0f} MiB more for a model of 160 MB whose tensors have 8 MB"


# -- an export is what was written ---------------------------------------------------------------------------


def test_weights_that_are_not_those_that_were_exported_are_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    hf.run(exporting(run))
    out = run / "export"
    file, name = out / "model.safetensors", "model.safetensors"
    whole = file.read_bytes()
    export_record.check(out, field="evaluate.source")
    assert export_record.verify(out, field="run.dir") == []
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace("1e-06", "1e-05"))
    export_record.check(out, field="evaluate.source")  # may be meant
    assert "config.json holds other bytes than the export wrote" in caplog.text
    (out / "config.json").write_text(config)
    for damaged, words in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "holds other bytes than the export wrote"),
        (whole + b"0", "bytes, and"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: {'holds' if 'holds' in words else 'has'}"):
            export_record.check(out, field="evaluate.source")
        assert words in export_record.verify(out, field="run.dir")[0]
        assert main(["verify", str(out)]) == 1
        assert main(["evaluate", f"evaluate.source={out}", f"data.path={tmp_path / 'none'}"]) == 2
    file.write_bytes(whole)
    assert main(["verify", str(out)]) == 0
    (out / "hybridtrain.json").write_text('{"step": 20}')  # an earlier release's
    export_record.check(out, field="evaluate.source")
    assert "earlier release" in export_record.verify(out, field="run.dir")[0]


@pytest.mark.parametrize("name", ["complete.json", "progress.json"])
@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b"\xff\xfe", b"{}", b'{"format": 1, "files": {"a": {"size": 1e999, "crc32": "0"}}}'],
)
def test_a_record_of_a_checkpoint_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    for file in ("complete.json", "progress.json"):
        (tmp_path / file).write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        marker.read(tmp_path) if name == "complete.json" else marker.read_progress(tmp_path)
