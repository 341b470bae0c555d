"""`hybridtrain evaluate` on a run of real ranks and Hugging Face folders; sources that cannot be loaded."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from hybridtrain import evaluate
from hybridtrain.cli.main import main
from hybridtrain.data.corpus import Corpus
from hybridtrain.errors import UserError
from hybridtrain.evaluate.perplexity import scores
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch
from tests.evaluate.trained import EVAL_ROWS, SEQ_LEN


def test_evaluate_agrees_with_training_and_with_plain_transformers(trained, capsys):
    assert main(["evaluate", str(trained.run)]) == 0
    out = capsys.readouterr().out
    result = json.loads((trained.run / "evaluation.json").read_text())
    assert result["tokens"] == trained.tokens == EVAL_ROWS * SEQ_LEN
    assert result["loss"] == pytest.approx(trained.loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(trained.loss), rel=1e-4)
    assert (result["rows"], result["seq_len"], result["step"]) == (EVAL_ROWS, SEQ_LEN, 2)
    assert "step        2\n" in out
    assert f"loss        {result['loss']:.6f}" in out
    assert f"perplexity  {result['perplexity']:.4f}" in out
    # transformers' own loss of whole rows: labels are the inputs, shifted inside the model
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.run / "export")
    held_out = Corpus.open(trained.root / "data").rows("eval", seq_len=SEQ_LEN, documents=False, vocab=300)
    # evenly spread
    rows = torch.from_numpy(
        held_out.gather(torch.arange(EVAL_ROWS).numpy() * len(held_out) // EVAL_ROWS).tokens
    )
    with torch.no_grad():
        assert model(input_ids=rows, labels=rows).loss.item() == pytest.approx(result["loss"], rel=1e-5)


@pytest.mark.parametrize(("newest", "warned"), [(2, False), (5, True)])
def test_an_export_that_the_run_has_passed_is_named(newest, warned, trained, folder, caplog):
    run = folder.parent
    folder.rename(run / "export")
    shutil.copytree(trained.checkpoint, run / "checkpoints" / f"step-{newest:08d}")
    with evaluate.loadable("", run_dir=run, field="evaluate.source") as source:
        assert source == str(run / "export")
    told = f"the export is of step 2, the newest checkpoint is of step 5: hybridtrain export {run} writes"
    assert (told in caplog.text) is warned


def test_options_of_the_command_line_come_before_the_runs(trained, capsys):
    assert main(["evaluate", str(trained.run), "evaluate.rows=2", "data.seq_len=16"]) == 0
    result = json.loads((trained.run / "evaluation.json").read_text())
    assert (result["rows"], result["seq_len"], result["tokens"]) == (2, 16, 32)
    assert "perplexity" in capsys.readouterr().out


def test_evaluate_a_checkpoint_and_a_folder_that_is_no_run(trained, tmp_path, capsys):
    data = [
        "data.path=" + str(trained.root / "data"),
        f"data.seq_len={SEQ_LEN}",
        f"train.eval_rows={EVAL_ROWS}",
        f"run.dir={tmp_path / 'none'}",
    ]
    shown = []
    for source in (trained.checkpoint, trained.run / "export"):
        assert main(["evaluate", f"evaluate.source={source}", *data]) == 0
        shown.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("source")])
    assert shown[0] == shown[1]
    assert not (tmp_path / "none").exists()


def test_perplexity_counts_valid_tokens_only(trained):
    model = evaluate.load_model(str(trained.run / "export"), field="evaluate.source", trust_remote_code=False)
    ids, labels = torch.arange(40).view(2, 20) + 3, torch.arange(40).view(2, 20) + 4
    masked = labels.clone()
    masked[0, 3:], masked[1, :] = IGNORE_INDEX, IGNORE_INDEX
    positions = torch.arange(20).repeat(2, 1)
    sums = scores(model, [Batch(ids, masked, positions)], device=torch.device("cpu"), task=CausalLM())
    with torch.no_grad():
        expected = -model(input_ids=ids).logits.log_softmax(-1)[0, range(3), labels[0, :3]].mean().item()
    assert sums.counts["loss"] == 3
    assert sums.values["loss"] / 3 == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="no held-out token carries a loss"):
        scores(
            model,
            [Batch(ids, torch.full_like(ids, IGNORE_INDEX), positions)],
            device=torch.device("cpu"),
            task=CausalLM(),
        )


def test_sources_that_cannot_be_loaded(trained, tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    assert main(["generate", f"run.dir={tmp_path}"]) == 2
    assert f"generate.source=(none): {tmp_path} holds no export" in capsys.readouterr().err
    assert main(["evaluate", str(trained.run), f"evaluate.source={tmp_path}"]) == 2
    assert "it holds neither config.json nor a complete checkpoint" in capsys.readouterr().err
    assert main(["evaluate", str(trained.run), f"evaluate.source={tmp_path}/nowhere"]) == 2
    assert f"evaluate.source={tmp_path}/nowhere: there is no such folder" in capsys.readouterr().err
    assert main(["evaluate", str(trained.run), "evaluate.source=nobody/nothing"]) == 2
    assert "evaluate.source=nobody/nothing: transformers cannot load its model" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(
        trained.run / "export", bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*")
    )
    assert main(["generate", f"generate.source={bare}"]) == 2
    assert f"generate.source={bare}: transformers cannot load its tokenizer" in capsys.readouterr().err


def test_evaluate_without_data_or_with_a_smaller_vocabulary_is_refused(trained, tmp_path, capsys):
    export = trained.run / "export"
    assert main(["evaluate", f"evaluate.source={export}", f"run.dir={tmp_path / 'none'}"]) == 2
    assert "data.path=(none): no data chosen" in capsys.readouterr().err
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path / "small")
    assert main(["evaluate", str(trained.run), f"evaluate.source={tmp_path / 'small'}"]) == 2
    assert "model.config.vocab_size=50" in capsys.readouterr().err


# -- damaged and hostile folders -----------------------------------------------------------------------------

DAMAGE = {
    "weights cut": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "weights pointer": ("model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
    "config no JSON": ("config.json", lambda _: b"{"),
    "config no object": ("config.json", lambda _: b"[1]"),
    "config nonsense": (
        "config.json",
        lambda data: data.replace(b'"hidden_size": 64', b'"hidden_size": "wide"'),
    ),
    "tokenizer cut": ("tokenizer.json", lambda data: data[: len(data) // 2]),
    "tokenizer kind": ("tokenizer.json", lambda data: data.replace(b'"BPE"', b'"Unheard"')),
    "tokenizer pointer": ("tokenizer.json", lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders_are_refused_by_name(kind, trained, folder, capsys):
    name, change = DAMAGE[kind]
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(change(before))
    assert (folder / name).read_bytes() != before
    for command in ("generate",) if name == "tokenizer.json" else ("generate", "evaluate"):
        assert (
            main(
                [
                    command,
                    f"{command}.source={folder}",
                    *([str(trained.run)] if command == "evaluate" else []),
                ]
            )
            == 2
        )
        refused = capsys.readouterr().err
        assert f"{command}.source=" in refused
        assert str(folder) in refused
        assert ("git-lfs pointer" in refused) == ("pointer" in kind)


def test_of_an_export_that_cannot_be_loaded_another_is_asked_for(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    (run / "export" / "config.json").write_text("{")
    assert main(["evaluate", str(run)]) == 2
    assert f"try:     hybridtrain export {run}, which writes it again" in capsys.readouterr().err


def test_a_run_directory_grants_no_permission_to_run_its_code(trained, tmp_path, capsys):
    """Its config.yaml says model.trust_remote_code=true; only the command line's own word counts."""
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert (run / "config.yaml").read_text() != text
    victim = tmp_path / "victim"
    (run / "export" / "evil.py").write_text(
        f"open({str(victim)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Evil, LlamaForCausalLM as EvilModel\n"
    )
    config = json.loads((run / "export" / "config.json").read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
    (run / "export" / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "auto_map": auto})
    )
    for command in ("evaluate", "generate"):
        assert main([command, str(run)]) == 2
        assert "cannot load its" in capsys.readouterr().err
        assert not victim.exists()
