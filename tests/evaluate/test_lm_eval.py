"""EleutherAI's lm-evaluation-harness, as a callback of a run and as a command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from hybridtrain.cli.main import main
from hybridtrain.report import benchmarks, history, single
from tests.report.folders import finished as finished_folder
from tests.runs import arguments, finished, four_parts, on_this_rank

INSTALLED = importlib.util.find_spec("lm_eval") is not None
DOCUMENTS = [
    {"question": f"number {number}", "choices": ["follows", "number 1,", "0"], "answer": number * number % 3}
    for number in range(12)
]
TASK = """
task: own_numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def accuracy(export: Path) -> float:
    """The share of documents whose answer has the largest probability after the question."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    right = 0
    for document in DOCUMENTS:
        sums = []
        for choice in document["choices"]:
            start = len(tokenizer(document["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{document['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : -1]
            sums.append(float(log_p.gather(1, ids[0, start:, None]).sum()))
        right += max(range(3), key=sums.__getitem__) == document["answer"]
    return right / len(DOCUMENTS)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="the package lm_eval is not installed")
def test_the_last_checkpoint_is_measured_and_so_is_an_export(data: Path, tmp_path: Path) -> None:
    own, run = tmp_path / "own tasks", tmp_path / "run"
    own.mkdir()
    (own / "test.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (own / "own.yaml").write_text(TASK.format(file=own / "test.jsonl"))
    options = {"run__callbacks": "[lm_eval]", "lm_eval__tasks": "[own_numbers]", "lm_eval__task_folder": own}
    varied = {"model__config__initializer_range": 0.2, "train__steps": 2}
    finished(2, arguments(run, data, **options, **varied, parallel="pp2"))
    said = (run / "logs/lm_eval.log").read_text()
    [line] = [json.loads(line) for line in (run / "lm_eval.jsonl").read_text().splitlines()]
    assert main(["export", str(run)]) == 0
    assert (line["step"], line["limit"]) == (2, 0), said
    assert line["scores"]["own_numbers"]["acc"] == pytest.approx(accuracy(run / "export"))
    argv = [
        "evaluate",
        str(run),
        "lm_eval.tasks=[own_numbers]",
        f"lm_eval.task_folder={own}",
        "lm_eval.limit=3",
    ]
    assert main(argv) == 0
    assert [json.loads(line)["limit"] for line in (run / "lm_eval.jsonl").read_text().splitlines()] == [0, 3]
    words = [argv[1], *argv[2:4], "compare.dtypes=[bfloat16]", "compare.rows=2"]
    assert main(["compare", *words]) == 0
    compared = json.loads((run / "compare.json").read_text())
    own, narrow = (
        each["lm_eval"]["own_numbers"] for each in (compared["reference"], *compared["candidates"])
    )
    assert own["acc"] == pytest.approx(accuracy(run / "export"))
    assert narrow.keys() == own.keys()
    assert (run / "compare.html").read_text().count('<td class="wide">own_numbers</td>') == 2 * len(own)
    page = single.document(history.read(run), [])
    assert page.count("own_numbers</th>") == 2
    assert main([*argv[:2], "lm_eval.tasks=[own_number]"]) == 2


def test_what_cannot_be_measured_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(field: str, **options: object) -> str:
        ended = on_this_rank(arguments(tmp_path / "run", data, **options))
        assert ended.code == 2, ended
        return four_parts(ended.err, field)

    assert "lm_eval.tasks is empty" in refused("run.callbacks", run__callbacks="[lm_eval]")
    assert "nothing measures them" in refused("lm_eval.tasks", lm_eval__tasks="[hellaswag]")
    both = {"run__callbacks": "[lm_eval]", "lm_eval__tasks": "[hellaswag]"}
    if not INSTALLED:
        assert "pip install lm_eval" in refused("lm_eval.tasks", **both)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    no_folder = tmp_path / "none"
    assert "no such folder" in refused("lm_eval.task_folder", **both, lm_eval__task_folder=no_folder)
    given = ["run.callbacks=[lm_eval]", "lm_eval.tasks=[hellaswag]", f"run.dir={tmp_path / 'run'}"]
    bert = ["--config-dir", "conf", "experiment=bert", "task.next_sentence=false", f"data.path={data}"]
    assert "an encoder, which writes no text" in four_parts(
        on_this_rank([*bert, *given]).err, "run.callbacks"
    )
    assert not (tmp_path / "run").exists()


def test_the_page_shows_scores_with_their_errors(tmp_path: Path) -> None:
    folder = finished_folder(tmp_path / "run")
    scores = {"acc": 0.25, "acc_stderr": 0.0125, "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1}
    line = {"source": "x", "step": 200, "time": 1.7e9, "limit": 0, "scores": {"mine": scores}}
    text = json.dumps(line) + '\n{"step": 1}\n[2]\n{"step": 3, "limit": 1, "scores": 4}\n{"st'
    (folder / "lm_eval.jsonl").write_text(text)
    read = history.read(folder)
    assert read.unread == {"lm_eval.jsonl": 3}
    shown = benchmarks.section(read.scores)
    assert "0.2500 ± 0.0125" in shown
    assert "0.5000 ± 0.1000" in shown
    assert shown.count("<tr>") == 3
    assert shown in single.document(read, [])
