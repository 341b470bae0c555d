"""`hybridtrain generate`: sampling, chats, ends of texts, several prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hybridtrain.cli.main import main
from hybridtrain.config import schema
from hybridtrain.errors import UserError
from hybridtrain.evaluate.generate import sample


def draw(
    trained, *, seed: int = 3, prompt: str = "number 4 follows", source: Path | None = None, **changes: Any
) -> str:
    options = schema.GenerateConfig(**{"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.95, **changes})
    [text] = sample(
        source or trained.run / "export",
        prompts=[prompt],
        options=options,
        inference=schema.InferenceConfig(),
        seed=seed,
        trust_remote_code=False,
    )
    return text


def test_sampling_is_seeded_and_leaves_the_callers_random_state(trained):
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = draw(trained)
    assert torch.equal(torch.rand(1), expected)
    assert draw(trained) == first
    assert len({draw(trained, seed=seed) for seed in range(4)}) > 1


def test_greedy_takes_the_likeliest_token(trained):
    text = draw(trained, temperature=0.0)
    assert draw(trained, temperature=0.0, seed=99) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.run / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.run / "export")
    ids = tokenizer("number 4 follows")["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_top_p_of_nearly_nothing_is_greedy(trained):
    assert draw(trained, temperature=1.0, top_p=1e-6) == draw(trained, temperature=0.0)


def test_an_empty_prompt_starts_a_text(trained):
    assert draw(trained, prompt="") != ""


def test_generate_from_export_and_checkpoint_is_the_same(trained, capsys):
    texts = []
    for source in ([str(trained.run)], [f"generate.source={trained.checkpoint}"]):
        assert (
            main(["generate", *source, "generate.prompt=number", "generate.max_new_tokens=10", "run.seed=5"])
            == 0
        )
        out, err = capsys.readouterr()
        texts.append(out)
        assert err.splitlines()[0].endswith(", step 2")
    assert texts[0] == texts[1]
    assert texts[0].startswith("number")
    assert len(texts[0]) > len("number\n")


def test_too_many_tokens_are_refused(trained):
    with pytest.raises(UserError, match="than the model's 64 positions"):
        draw(trained, max_new_tokens=64)


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def generated(capsys, *argv: str) -> str:
    assert main(["generate", *argv, "generate.max_new_tokens=8", "generate.temperature=0"]) == 0
    return capsys.readouterr().out


def test_a_chat_is_put_into_the_models_template(trained, folder, capsys):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    answer = generated(
        capsys,
        f"generate.source={folder}",
        "generate.prompt=number",
        "generate.chat=true",
        "generate.system=four",
    )
    whole = generated(
        capsys,
        f"generate.source={folder}",
        "generate.prompt='[system] four\\n[user] number\\n[assistant]'".replace("\\n", "\n"),
    )
    assert whole == "[system] four\n[user] number\n[assistant]" + answer
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system messages') }}")
    assert main(["generate", f"generate.source={folder}", "generate.chat=true"]) == 2
    assert "the chat template fails: no system messages" in capsys.readouterr().err
    assert main(["generate", str(trained.run), "generate.chat=true"]) == 2
    assert "generate.chat=true: the tokenizer has no chat template" in capsys.readouterr().err
    assert main(["generate", str(trained.run), "generate.system=x"]) == 2
    assert "generate.system=x: a system message belongs to a chat" in capsys.readouterr().err


def test_several_prompts_and_a_file_of_them(trained, tmp_path, capsys):
    alone = [
        generated(capsys, str(trained.run), f"generate.prompt={prompt}") for prompt in ("number 4", "follows")
    ]
    both = generated(capsys, str(trained.run), "generate.prompts=[number 4,follows]")
    assert both == f"[1]\n{alone[0]}\n[2]\n{alone[1]}"
    (tmp_path / "prompts.txt").write_text("number 4\n\nfollows\n")
    assert generated(capsys, str(trained.run), f"generate.prompts_file={tmp_path / 'prompts.txt'}") == both
    assert main(["generate", str(trained.run), f"generate.prompts_file={tmp_path / 'none.txt'}"]) == 2
    assert "generate.prompts_file=" in capsys.readouterr().err


def test_stop_texts_and_seeds(trained):
    text = draw(trained, temperature=0.0)
    assert len(text) > 4
    stop = text[2:4]
    assert draw(trained, temperature=0.0, stop=[stop]) == text[: text.find(stop)]
    assert draw(trained, temperature=0.0, stop=["never there"]) == text


def test_a_seed_of_its_own_goes_before_the_runs(trained, capsys):
    argv = [str(trained.run), "generate.max_new_tokens=10", "generate.temperature=2", "generate.top_p=1"]
    shown = {}
    for options in ("run.seed=1", "generate.seed=1", "run.seed=2"):
        assert main(["generate", *argv, options]) == 0
        shown[options] = capsys.readouterr().out
    assert shown["run.seed=1"] == shown["generate.seed=1"] != shown["run.seed=2"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("bos_token_id", "text"), ("eos_token_id", [1, "x"]), ("eos_token_id", 0.5), ("pad_token_id", {})],
)
def test_special_tokens_that_are_no_ids_are_refused(trained, folder, name, value):
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(
        UserError,
        match=rf"generate\.source=.*the {name} of its generation_config\.json is .*|cannot load its",
    ):
        draw(trained, temperature=0.0, source=folder)


def test_end_tokens_of_generation_config_end_a_text(trained, folder):
    text = draw(trained, temperature=0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    second = tokenizer("number 4 follows" + text)["input_ids"][
        len(tokenizer("number 4 follows")["input_ids"]) + 1
    ]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [second, 0]}))
    assert len(draw(trained, temperature=0.0, source=folder)) < len(text)


def test_a_prompt_beyond_the_vocabulary_is_refused(folder, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    assert main(["generate", f"generate.source={folder}", "generate.prompt='a <new>'"]) == 2
    assert (
        "generate.prompt=(token id 300): the tokenizer has a token for which the model, with 300 rows"
        in capsys.readouterr().err
    )
