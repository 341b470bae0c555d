"""`hybridtrain evaluate` and `generate` on a run that real ranks trained and saved, and on plain Hugging Face folders."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hybridtrain import engine as engines
from hybridtrain import evaluate
from hybridtrain.cli.main import main
from hybridtrain.config import compose, schema
from hybridtrain.data.blend import open_data
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.loader import Loader, eval_batches
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.errors import UserError
from hybridtrain.evaluate.generate import sample
from hybridtrain.evaluate.perplexity import scores
from hybridtrain.models.build import hf_config
from hybridtrain.plan import layout as layouts
from hybridtrain.plan.batch import plan_batch
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.types import IGNORE_INDEX, Batch, Progress
from tests.cases import model as model_fields
from tests.ranks import run_ranks

SEQ_LEN, EVAL_ROWS = 32, 5  # 5 rows do not fill the last step of 2 ranks x 2 micro-batches
PARALLEL = {"tp": 2, "dp_replicate": 1, "dp_shard": 2, "zero_stage": 2}


def settings(root: Path) -> schema.Config:
    config = schema.Config()
    config.run.dir, config.run.name = str(root / "run"), "run"
    config.data = schema.DataConfig(path=str(root / "data"), source=[str(root / "text")], vocab_size=300, eval_fraction=0.3, seq_len=SEQ_LEN)
    config.model.config = model_fields(vocab_size=300, max_position_embeddings=64, tie_word_embeddings=True)
    config.batch = schema.BatchConfig(global_batch_size=4, micro_batch_size=1)
    config.train.eval_rows = EVAL_ROWS
    config.parallel = schema.ParallelConfig(**PARALLEL)
    return config


def train_and_save(root: Path) -> tuple[float, int]:
    """On each rank: two steps, training's own evaluation, a checkpoint. Returns loss sum and tokens of the evaluation."""
    config = settings(root)
    layout = layouts.resolve(config.parallel, world_size=4)
    plan = plan_batch(config.batch, layout=layout, seq_len=SEQ_LEN)
    engine = engines.build(config, layout=layout, plan=plan, device=torch.device("cpu"))
    data = open_data(config.data, timeout_s=0)
    share = {"plan": plan, "dp_rank": engine.mesh.dp_rank, "dp_size": layout.dp, "vocab": 300, "collate": engine.task.collate}
    loader = Loader(data, seed=0, **share)
    for step in range(2):
        engine.train_step(loader.micro_batches(step), lr=1e-2)
    steps = eval_batches(data, rows=EVAL_ROWS, micro_batches_per_step=plan.grad_accum, **share)
    results = [engine.eval_step(batches) for batches in steps]
    engine.save(root / "run" / "checkpoints" / "step-00000002", Progress(step=2, tokens_seen=256, fingerprints={})).result()
    return sum(result.values["loss"] for result in results), sum(result.counts["loss"] for result in results)


@dataclasses.dataclass(frozen=True)
class Trained:
    root: Path
    loss: float
    tokens: int

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    (root / "text").mkdir()
    for number in range(12):
        (root / "text" / f"{number}.txt").write_text(" ".join(f"number {number * n} follows {n}," for n in range(60)))
    config = settings(root)
    prepare(config.data, options=schema.PrepareConfig())
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(compose.to_yaml(config))
    hf_config(config.model.config, chosen={}, attention="sdpa").save_pretrained(root / "run" / "model")
    loss_sum, tokens = run_ranks(4, train_and_save, root)[0]
    assert main(["export", str(root / "run")]) == 0
    return Trained(root, loss_sum / tokens, tokens)


def test_evaluate_agrees_with_training_and_with_plain_transformers(trained, capsys):
    assert main(["evaluate", str(trained.run)]) == 0
    out = capsys.readouterr().out
    result = json.loads((trained.run / "evaluation.json").read_text())
    assert result["tokens"] == trained.tokens == EVAL_ROWS * SEQ_LEN
    assert result["loss"] == pytest.approx(trained.loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(trained.loss), rel=1e-4)
    assert (result["rows"], result["seq_len"]) == (EVAL_ROWS, SEQ_LEN)
    assert f"loss        {result['loss']:.6f}" in out
    assert f"perplexity  {result['perplexity']:.4f}" in out
    # transformers' own loss of whole rows: labels are the inputs, shifted inside the model
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.run / "export")
    held_out = Corpus.open(trained.root / "data").rows("eval", seq_len=SEQ_LEN, documents=False, vocab=300)
    rows = torch.from_numpy(held_out.gather(torch.arange(EVAL_ROWS).numpy() * len(held_out) // EVAL_ROWS).tokens)  # evenly spread
    with torch.no_grad():
        assert model(input_ids=rows, labels=rows).loss.item() == pytest.approx(result["loss"], rel=1e-5)


def test_options_of_the_command_line_come_before_the_runs(trained, capsys):
    assert main(["evaluate", str(trained.run), "evaluate.rows=2", "data.seq_len=16"]) == 0
    result = json.loads((trained.run / "evaluation.json").read_text())
    assert (result["rows"], result["seq_len"], result["tokens"]) == (2, 16, 32)
    assert "perplexity" in capsys.readouterr().out


def test_evaluate_a_checkpoint_and_a_folder_that_is_no_run(trained, tmp_path, capsys):
    data = ["data.path=" + str(trained.root / "data"), f"data.seq_len={SEQ_LEN}", f"train.eval_rows={EVAL_ROWS}", f"run.dir={tmp_path / 'none'}"]
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
        scores(model, [Batch(ids, torch.full_like(ids, IGNORE_INDEX), positions)], device=torch.device("cpu"), task=CausalLM())


def draw(trained, *, seed: int = 3, prompt: str = "number 4 follows", source: Path | None = None, **changes: Any) -> str:
    options = schema.GenerateConfig(**{"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.95, **changes})
    [text] = sample(source or trained.run / "export", prompts=[prompt], options=options, seed=seed, trust_remote_code=False)
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
        assert main(["generate", *source, "generate.prompt=number", "generate.max_new_tokens=10", "run.seed=5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("number")
    assert len(texts[0]) > len("number\n")


def test_too_many_tokens_are_refused(trained):
    with pytest.raises(UserError, match="than the model's 64 positions"):
        draw(trained, max_new_tokens=64)


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
    shutil.copytree(trained.run / "export", bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
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


# -- generate: chats, ends, several prompts ------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the export, to be changed."""
    return Path(shutil.copytree(trained.run / "export", tmp_path / "folder"))


def generated(capsys, *argv: str) -> str:
    assert main(["generate", *argv, "generate.max_new_tokens=8", "generate.temperature=0"]) == 0
    return capsys.readouterr().out


def test_a_chat_is_put_into_the_models_template(trained, folder, capsys):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    answer = generated(capsys, f"generate.source={folder}", "generate.prompt=number", "generate.chat=true", "generate.system=four")
    whole = generated(capsys, f"generate.source={folder}", "generate.prompt='[system] four\\n[user] number\\n[assistant]'".replace("\\n", "\n"))
    assert whole == "[system] four\n[user] number\n[assistant]" + answer
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system messages') }}")
    assert main(["generate", f"generate.source={folder}", "generate.chat=true"]) == 2
    assert "the chat template fails: no system messages" in capsys.readouterr().err
    assert main(["generate", str(trained.run), "generate.chat=true"]) == 2
    assert "generate.chat=true: the tokenizer has no chat template" in capsys.readouterr().err
    assert main(["generate", str(trained.run), "generate.system=x"]) == 2
    assert "generate.system=x: a system message belongs to a chat" in capsys.readouterr().err


def test_several_prompts_and_a_file_of_them(trained, tmp_path, capsys):
    alone = [generated(capsys, str(trained.run), f"generate.prompt={prompt}") for prompt in ("number 4", "follows")]
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


@pytest.mark.parametrize(("name", "value"), [("bos_token_id", "text"), ("eos_token_id", [1, "x"]), ("eos_token_id", 0.5), ("pad_token_id", {})])
def test_special_tokens_that_are_no_ids_are_refused(trained, folder, name, value):
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(UserError, match=rf"generate\.source=.*the {name} of its generation_config\.json is .*|cannot load its"):
        draw(trained, temperature=0.0, source=folder)


def test_end_tokens_of_generation_config_end_a_text(trained, folder):
    text = draw(trained, temperature=0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    second = tokenizer("number 4 follows" + text)["input_ids"][len(tokenizer("number 4 follows")["input_ids"]) + 1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [second, 0]}))
    assert len(draw(trained, temperature=0.0, source=folder)) < len(text)


def test_a_prompt_beyond_the_vocabulary_is_refused(folder, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    assert main(["generate", f"generate.source={folder}", "generate.prompt='a <new>'"]) == 2
    assert "generate.prompt=(token id 300): the tokenizer has a token that the model, of 300 rows" in capsys.readouterr().err


# -- damaged and hostile folders -----------------------------------------------------------------------------------

DAMAGE = {
    "weights cut": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "weights pointer": ("model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
    "config no JSON": ("config.json", lambda _: b"{"),
    "config no object": ("config.json", lambda _: b"[1]"),
    "config nonsense": ("config.json", lambda data: data.replace(b'"hidden_size": 64', b'"hidden_size": "wide"')),
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
        assert main([command, f"{command}.source={folder}", *([str(trained.run)] if command == "evaluate" else [])]) == 2
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
        f"open({str(victim)!r}, 'w').close()\nfrom transformers import LlamaConfig as Evil, LlamaForCausalLM as EvilModel\n"
    )
    config = json.loads((run / "export" / "config.json").read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
    (run / "export" / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    for command in ("evaluate", "generate"):
        assert main([command, str(run)]) == 2
        assert "cannot load its" in capsys.readouterr().err
        assert not victim.exists()
