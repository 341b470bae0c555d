"""Classifiers with adapters: the head is trained beside them, under every layout as by one process, and is in
the export, which peft reads."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hybridtrain import evaluate
from hybridtrain.cli.main import main
from hybridtrain.errors import UserError
from hybridtrain.models import adapter_folder, build
from tests import hub, runs
from tests.cases import model
from tests.models.test_hub import command
from tests.ranks import run_ranks
from tests.tasks import classified, encoders
from tests.tasks.classified import LABELS, SEQ, VOCAB
from tests.tasks.encoders import LAYOUTS, agree, goes_on

LORA = ["adapters=lora", "adapters.rank=4", "optim.lr=0.01"]
POOLER = {"bert": ["adapters.modules_to_save=[bert.pooler.*]"]}
"""A model of masked tokens has none."""
BERT = {
    **{"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 24, "vocab_size": VOCAB},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1},
}
FIELDS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT | {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "pad_token_id": 0},
    "llama": model("llama", vocab_size=VOCAB, architectures=["LlamaForCausalLM"], pad_token_id=0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora and models without a head for classes."""
    root = tmp_path_factory.mktemp("adapted")
    for kind, fields in FIELDS.items():
        torch.manual_seed(7)
        built = build.hf_config(fields, chosen={}, attention="sdpa")
        plain: Any = build.plain_model(built)
        plain.save_pretrained(root / kind)
    classified.corpus(root / "encoder", encoder=True)
    classified.corpus(root / "decoder", encoder=False)
    return root


def words(kind: str, folder: Path, *more: str) -> list[str]:
    data = folder / ("decoder" if kind == "llama" else "encoder") / "data"
    given = [word for word in classified.words("bert", data) if not word.startswith("++model.config")]
    names = f"model.labels=[{','.join(LABELS)}]"
    return [*given, f"model.from_pretrained={folder / kind}", names, *LORA, *POOLER.get(kind, []), *more]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("bert", "tp2"),
        *(
            pytest.param(kind, layout, marks=pytest.mark.slow)
            for kind, layout in (
                *(("bert", name) for name in ("dp2", "zero3", "pp2", "pp2-tp2")),
                *(("roberta", name) for name in ("tp2", "pp2")),
                *(("llama", name) for name in ("zero3", "tp2", "pp2")),
            )
        ),
    ],
)
def test_layouts_equal_the_plain_process(folder: Path, kind: str, layout: str) -> None:
    argv = words(kind, folder)
    expected = encoders.in_one_process(
        argv, encoder=kind != "llama", batches=classified.batches, by_hand=classified._by_hand
    )
    whole = {name.rpartition(".")[0] for name in expected.gradients if ".lora_" not in name}
    assert (
        whole
        == {
            "bert": {"classifier", "bert.pooler.dense"},
            "roberta": {"classifier.dense", "classifier.out_proj"},
            "llama": {"score"},
        }[kind]
    )
    ranks = 4 if layout == "pp2-tp2" else 2
    found = run_ranks(ranks, classified.on_rank, [*argv, *LAYOUTS[layout]], ranks)
    if kind == "llama":  # several texts are in a row, which `_by_hand` does not tell apart
        expected = dataclasses.replace(expected, sums=found[0].sums, counts=found[0].counts)
    agree(found, expected)


@pytest.fixture(scope="module", params=["bert", pytest.param("llama", marks=pytest.mark.slow)])
def exported(request: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run that stopped and went on bit for bit, and whose export scores as its training did."""
    root = tmp_path_factory.mktemp("run")
    run, _ = goes_on(root, 1, partial(words, request.param, folder), names=["loss", "accuracy"])
    return request.param, run


def logits(source: Path | str) -> torch.Tensor:
    module = evaluate.load_model(str(source), field="evaluate.source", trust_remote_code=False)
    assert [*module.config.id2label.values()] == LABELS
    return logits_of(module)


@torch.no_grad()
def logits_of(module: Any) -> torch.Tensor:
    ids = torch.randint(5, VOCAB, (4, SEQ), generator=torch.Generator().manual_seed(0))
    return module.eval()(ids).logits


def test_the_export_has_the_head(exported: tuple[str, Path], tmp_path: Path) -> None:
    """Alone and merged."""
    kind, run = exported
    saved = ["score"] if kind == "llama" else ["bert.pooler.dense", "classifier"]
    fields = json.loads((run / "export/adapter_config.json").read_text())
    assert (fields["task_type"], fields["modules_to_save"]) == ("SEQ_CLS", saved)
    with safe_open(run / "export/adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {f"base_model.model.{name}.weight" for name in saved} < names
    merged = tmp_path / "merged"
    assert main(["export", str(run), "export.merge=true", f"export.out={merged}"]) == 0
    torch.testing.assert_close(logits(run / "export"), logits(merged), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_reads_adapters_and_head(exported: tuple[str, Path], folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    kind, run = exported
    base = AutoModelForSequenceClassification.from_pretrained(folder / kind, num_labels=3)
    theirs = PeftModel.from_pretrained(base, run / "export")
    torch.testing.assert_close(logits_of(theirs), logits(run / "export"), rtol=1e-5, atol=1e-6)
    without = run / "export/hybridtrain.json"
    record = without.read_bytes()
    without.unlink()  # as in a folder of peft's own: classes have no names
    module = evaluate.load_model(str(run / "export"), field="evaluate.source", trust_remote_code=False)
    without.write_bytes(record)
    torch.testing.assert_close(logits_of(module), logits_of(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "problem", "instead"),
    [
        ([], "bert.pooler.dense.bias is not in", "adapters.modules_to_save=[bert.pooler.dense]"),
        (["bert.embeddings.*"], "is the embedding or the head of tokens", "a pattern that does not match it"),
        (["*.query"], "has an adapter", "a pattern that does not match it"),
        (["*.pool"], "it matches no module of the model", "bert.pooler.dense"),
    ],
)
def test_modules_that_cannot_be_saved_are_refused(
    folder: Path, tmp_path: Path, given: list[str], problem: str, instead: str
) -> None:
    argv = [word for word in words("bert", folder) if "modules_to_save" not in word]
    ended = runs.on_ranks(
        1, [*argv, f"run.dir={tmp_path / 'run'}", f"adapters.modules_to_save=[{','.join(given)}]"]
    )
    assert ended.code == 2
    assert problem in ended.err
    assert instead in ended.err


def test_a_base_that_lacks_what_the_folder_lacks_is_refused(exported: tuple[str, Path]) -> None:
    """It would be random, and another at each load."""
    _, run = exported
    weights = run / "export/adapter_model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    save_file({name: each for name, each in tensors.items() if "pooler" not in name}, weights)
    (record := run / "export/hybridtrain.json").rename(run / "record")
    try:
        if len(tensors) == len(load_file(weights)):
            pytest.skip("of a model without a pooler")
        with pytest.raises(UserError, match="is neither in it nor in its base model"):
            evaluate.load_model(str(run / "export"), field="evaluate.source", trust_remote_code=False)
    finally:
        weights.write_bytes(before)
        (run / "record").rename(record)


def test_rows_of_a_head_are_those_of_its_last_layer(tmp_path: Path) -> None:
    """DistilBERT has another before it, whose name comes last."""
    prefix = adapter_folder.PREFIX
    tensors = {
        f"{prefix}classifier.weight": torch.zeros(3, 8),
        f"{prefix}pre_classifier.weight": torch.zeros(8, 8),
    }
    save_file(tensors, tmp_path / adapter_folder.WEIGHTS)
    (tmp_path / adapter_folder.CONFIG).write_text(json.dumps({"task_type": "SEQ_CLS"}))
    config = build.hf_config(BERT, chosen={}, attention="sdpa")
    adapter_folder.add_classes(config, tmp_path, known={}, field="evaluate.source")
    assert config.num_labels == 3


@pytest.mark.slow
def test_so_of_a_hub_id(folder: Path, tmp_path: Path) -> None:
    """Whose weights are not known before the ranks have started."""
    shutil.copytree(folder / "bert", tmp_path / "repositories" / "me" / "bert")
    argv = [word for word in words("bert", folder) if "modules_to_save" not in word]
    argv += ["model.from_pretrained=me/bert", f"run.dir={tmp_path / 'run'}"]
    with hub.serving(tmp_path / "repositories", gated=()) as served:
        ended = command(served, tmp_path / "home", "train", *argv)
    assert ended.returncode == 2
    assert "bert.pooler.dense.bias is not in me/bert" in ended.stderr


@pytest.mark.slow
def test_tokens_are_classified_with_adapters(tmp_path: Path) -> None:
    """task=token_classification, whose run names no architecture."""
    from tests.tasks import tagged

    torch.manual_seed(7)
    plain: Any = build.plain_model(build.hf_config(BERT, chosen={}, attention="sdpa"))
    plain.save_pretrained(tmp_path / "base")
    data = tagged.corpus(tmp_path / "tagged", encoder=True)
    given = [word for word in tagged.words("bert", data) if not word.startswith("++model.config")]
    argv = [*given, f"model.from_pretrained={tmp_path / 'base'}", *LORA, f"run.dir={tmp_path / 'run'}"]
    runs.finished(1, [*argv, "train.eval_every=2", "train.steps=4"])
    assert main(["export", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
