"""What an export has beside the weights: config.json, the tokens that end a text, the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hybridtrain.config import compose
from hybridtrain.data import digests
from hybridtrain.errors import UserError
from hybridtrain.export import hf
from hybridtrain.models import tokens
from hybridtrain.models.saved_config import save_config
from tests.export.runs import as_earlier, exporting, model_of, read_back, run_of

# pytest puts back what the module turns off
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_config_that_was_edited_after_training_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    file = run / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_hidden_layers": 1, "rms_norm_eps": 1e-3}))
    hf.run(exporting(run))
    exported = json.loads((run / "export" / "config.json").read_text())
    assert (exported["num_hidden_layers"], exported["rms_norm_eps"]) == (11, 1e-6)
    assert (
        "config.json has changed since the checkpoint was written (num_hidden_layers was 11 and is 1; "
        "rms_norm_eps was 1e-06 and is 0.001)"
    ) in caplog.text
    as_earlier(run / "checkpoints" / "step-00000020")
    with pytest.raises(UserError, match=r"num_hidden_layers=1, the checkpoint's model has 11; was it edited"):
        hf.run(exporting(run))
    file.write_text(json.dumps(config))
    hf.run(exporting(run))


def test_end_tokens_that_were_edited_after_training_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    file = run / "model" / "generation_config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps({**given, "temperature": 7.0}))
    hf.run(exporting(run))
    assert (
        "generation_config.json has changed since the checkpoint was written; "
        "the checkpoint's own is exported"
    ) in caplog.text
    assert "temperature" not in json.loads((run / "export" / "generation_config.json").read_text())
    as_earlier(run / "checkpoints" / "step-00000020")  # which took no copy along
    hf.run(exporting(run))
    assert json.loads((run / "export" / "generation_config.json").read_text())["temperature"] == 7.0


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}


@pytest.mark.parametrize("earlier", [False, True])
def test_the_sources_end_tokens_and_sampling_values_are_exported(
    tmp_path: Path, earlier: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is taken over when training starts; of a run of an earlier release, which did
    not, from the source."""
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
    # the corpus's texts end with token 1, which the source did not know: training taught
    # the model to end with it
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
    assert "pad_token_id" not in {
        key
        for key, value in json.loads((run / "export" / "config.json").read_text()).items()
        if value is not None
    }


@pytest.mark.parametrize("new", [False, True])
def test_the_end_of_an_answer_ends_what_an_export_generates(tmp_path: Path, new: bool) -> None:
    """Of conversations, training teaches the token of the chat template that ends an answer, which need not
    be the tokenizer's end of text."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "data" / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ message['role'] + ' ' + message['content'] + '<|turn|>' }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "data" / "tokenizer")
    (tmp_path / "data" / "corpus.json").write_text(json.dumps({"kind": "chat"}))
    if not new:
        model_of(tied=True).save_pretrained(tmp_path / "source")
        config = compose.read_run(run / "config.yaml")
        config.model.from_pretrained = str(tmp_path / "source")
        (run / "config.yaml").write_text(compose.to_yaml(config))
    hf.run(exporting(run))
    assert GenerationConfig.from_pretrained(run / "export").eos_token_id == [
        1,
        tokenizer.convert_tokens_to_ids("<|turn|>"),
    ]
    assert json.loads((run / "export" / "config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ('{"kind": "cha', "whether the run was trained on conversations is not known: data."),
        ('{"kind": "chat"}', "cannot tell which token ends an answer: data."),
    ],
)
def test_data_that_was_damaged_since_is_no_reason_not_to_export(
    tmp_path: Path, facts: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """corpus.json cut short; a tokenizer that has lost its chat template."""
    run = run_of(tmp_path, model_of(tied=True), tied=True)
    (tmp_path / "data" / "corpus.json").write_text(facts)
    hf.run(exporting(run))
    assert GenerationConfig.from_pretrained(run / "export").eos_token_id == 1
    assert words in caplog.text


def test_end_tokens_that_differ_are_named() -> None:
    ends = tokens.Ends(begin=None, end=7, pad=None, turn=9)
    config, generation, lines = tokens.with_end_tokens(
        {"eos_token_id": 2}, {"eos_token_id": [2, 7]}, of_tokenizer=ends, new=False
    )
    assert (config, generation) == ({"eos_token_id": 2}, {"eos_token_id": [2, 7, 9]})
    assert lines == [
        "config.json ends texts with [2], the tokenizer with 7",
        "the chat template ends answers with 9, the tokenizer ends texts with [7]",
        "generation_config.json: eos_token_id [2, 7] and 9, which ended what was trained on",
    ]
    assert (
        tokens.with_end_tokens(
            {"eos_token_id": 7}, {}, of_tokenizer=tokens.Ends(None, 7, None, 7), new=False
        )[2]
        == []
    )
    assert len(tokens.with_end_tokens({"eos_token_id": 2}, {}, of_tokenizer=ends, new=True)[2]) == 2


@pytest.mark.parametrize(
    "content",
    [
        b'{"version": "1.0", "trunc',
        b'{"version": "1.0", "model": {"type": "Unheard"}}',
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
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


def test_a_tokenizer_that_changed_after_prepare_is_named_when_it_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, model_of(tied=False), tied=False)
    file = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    record = {"tokenizer_files": {"tokenizer/tokenizer.json": digests.record(file)}}
    (tmp_path / "data" / "corpus.json").write_text(json.dumps(record))
    hf.run(exporting(run))
    assert "prepare wrote" not in caplog.text
    file.write_text(file.read_text() + " ")
    hf.run(exporting(run))
    assert "tokenizer/tokenizer.json has" in caplog.text
    assert "prepare wrote" in caplog.text
