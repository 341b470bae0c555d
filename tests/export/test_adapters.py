"""A run with adapters as a user has it: trained, exported alone and merged, evaluated, and read by peft."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hybridtrain import evaluate
from hybridtrain.api import export
from hybridtrain.cli.main import main
from hybridtrain.errors import UserError
from tests.families.copies import folder_of
from tests.runs import finished, on_ranks

IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def options(run: Path, data: Path, base: Path, **more: object) -> list[str]:
    given = {
        "model.from_pretrained": base,
        "adapters": "lora",
        "adapters.rank": 4,
        "adapters.dropout": 0.1,
        "run.dir": run,
        "data.path": data,
        "data.seq_len": 32,
        "train.steps": 3,
        "optim.lr": 0.01,
        **more,
    }
    return [f"{key.replace('__', '.')}={value}" for key, value in given.items()]


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def run(request, data, tmp_path_factory) -> Path:
    """A finished run; its model is in the folder `base` beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    folder_of(request.param, folder / "base")
    finished(1, options(folder / "run", data, folder / "base"))
    return folder / "run"


def logits(source: Path) -> torch.Tensor:
    model = evaluate.load_model(str(source), field="evaluate.source", trust_remote_code=False)
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def folders(run) -> tuple[Path, Path]:
    """The export of adapters, and of the merged model."""
    return export(run), export(run, out=run.parent / "merged", merge=True)


def test_adapters_and_the_merged_model_compute_the_same(run, folders):
    alone, merged = folders
    assert not (alone / "config.json").exists()
    fields = json.loads((alone / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["peft_type"]) == (4, 32, "LORA")
    assert fields["lora_dropout"] == 0.1
    assert fields["base_model_name_or_path"] == str(run.parent / "base")
    torch.testing.assert_close(logits(alone), logits(merged), rtol=1e-4, atol=1e-4)
    assert (logits(alone) - logits(run.parent / "base")).abs().max() > 1e-2


def test_evaluate_and_generate_take_adapters(run, folders, capsys):
    losses = []
    for source in folders:
        assert main(["evaluate", f"run.dir={run}", f"evaluate.source={source}", "evaluate.rows=4"]) == 0
        losses.append(json.loads((run / "evaluation.json").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    capsys.readouterr()
    assert main(["generate", f"run.dir={run}", "generate.prompt=number", "generate.max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.startswith("number")


PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@PEFT
def test_peft_reads_the_adapters_and_merges_them_as_we_do(run, folders):
    check_with_peft(run.parent / "base", *folders)


@PEFT
@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_magnitudes_are_exported_and_merged_as_by_peft(model_type, data, tmp_path):
    """DoRA; magnitudes alone would not change the directions of weights."""
    folder_of(model_type, tmp_path / "base")
    finished(1, options(tmp_path / "run", data, tmp_path / "base", adapters__dora="true"))
    alone = export(tmp_path / "run")
    with safe_open(alone / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert sum(name.endswith(".lora_magnitude_vector") for name in names) * 3 == len(names)
    merged = export(tmp_path / "run", out=tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(alone), logits(merged), rtol=1e-4, atol=1e-4)
    check_with_peft(tmp_path / "base", alone, merged)


def check_with_peft(base: Path, alone: Path, merged: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), alone)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, logits(alone), rtol=1e-5, atol=1e-5)
    weights = theirs.merge_and_unload().state_dict()
    with safe_open(merged / "model.safetensors", framework="pt") as file:
        ours = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    names = {name: name if name in weights else f"transformer.{name}" for name in ours}
    assert {name for name, theirs in names.items() if not torch.equal(ours[name], weights[theirs])} == set()


def test_other_weights_under_the_same_name_are_refused(run, data, tmp_path):
    shutil.copytree(run.parent, tmp_path / "copy")
    base = tmp_path / "copy" / "base"
    text = (tmp_path / "copy/run/config.yaml").read_text()
    (tmp_path / "copy/run/config.yaml").write_text(text.replace(str(run.parent), str(tmp_path / "copy")))
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (base / "model.safetensors").write_bytes(raw)
    ended = on_ranks(1, options(tmp_path / "copy/run", data, base, train__steps=6))
    assert ended.code == 2
    assert "the checkpoint has adapters of other weights" in ended.err
    with pytest.raises(UserError, match="adapters of other weights"):
        export(tmp_path / "copy/run", out=tmp_path / "merged", merge=True)


def test_a_folder_of_adapters_is_no_model_to_start_from(folders, data, tmp_path):
    ended = on_ranks(1, options(tmp_path / "run", data, folders[0]))
    assert ended.code == 2
    assert "it holds a LoRA adapter, not a model" in ended.err
    assert "export.merge=true" in ended.err


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("use_dora", True, "lora_magnitude_vector'"),
        ("bias", "all", "its bias is"),
        ("rank_pattern", {"q_proj": 8}, "its rank_pattern is"),
    ],
)
def test_adapters_of_another_kind_are_refused(folders, tmp_path, field, value, words):
    shutil.copytree(folders[0], tmp_path / "alone")
    (tmp_path / "alone/hybridtrain.json").unlink()
    fields = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    (tmp_path / "alone/adapter_config.json").write_text(json.dumps({**fields, field: value}))
    with pytest.raises(UserError, match=words):
        logits(tmp_path / "alone")


def test_merging_needs_adapters(data, tmp_path):
    folder_of("llama", tmp_path / "base")
    plain = [
        word
        for word in options(tmp_path / "run", data, tmp_path / "base", train__steps=1)
        if not word.startswith("adapters")
    ]
    finished(1, plain)
    with pytest.raises(UserError, match="the run has no adapters"):
        export(tmp_path / "run", merge=True)
