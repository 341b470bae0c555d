"""What is typed is what arrives: text byte for byte, paths with ~, runs by any name, options over those of a
run; and what may leave the process."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hybridtrain.cli.commands import TAKES_RUN, _with_runs
from hybridtrain.config import keys, schema, words
from hybridtrain.config.compose import Interpolated, compose, override, public, read_run, to_yaml
from hybridtrain.config.overrides import normalize
from hybridtrain.config.sweep import sweep
from hybridtrain.errors import UserError
from hybridtrain.run.identity import choose, differences

TEXTS = [
    "2026_11_26",
    "10_12_07",
    "1e3",
    "1.50",
    "1234e56",
    "1_000",
    "0x10",
    "true",
    "a,b",
    "a: b",
    "früh",
    "C:\\runs\\x",
    "it's",
    'say "so"',
    "a=b=c",
    "x y",
    "%d",
    "-1",
]
PROMPTS = [
    *TEXTS, "a, b: {c} $x = 'y'", " def ", "[1, 2]", "{a: 1}", "choice(a,b)", "null", "two\nlines", "${HOME}",
    "echo ${x[@]} \\", "\\", "'", "'''", "\\'", "a\\\\'b",
]  # fmt: skip
TEXT_OPTIONS = [
    field
    for root in schema.ROOTS
    for fields in keys.sections(root).values()
    for field in fields
    if field.type == "str"
]


def test_text_arrives_as_it_was_typed(tmp_path):
    options = [
        field.key for fields in keys.sections("train").values() for field in fields if field.type == "str"
    ]
    given = dict(zip(options, TEXTS, strict=False))
    assert len(given) == len(TEXTS)
    config = compose("train", [f"{key}={text}" for key, text in given.items()])
    assert {
        key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in given
    } == given
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_run(tmp_path / "config.yaml") == config


def test_a_prompt_may_be_anything():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for text in PROMPTS:
        [override] = normalize(
            "generate", [f"generate.prompt={text}"], folders=[keys.conf_folder()]
        ).overrides
        assert parser.parse_overrides([override])[0].value() == words.escaped(text)
    for text in (text for text in PROMPTS if "${" in text or text == PROMPTS[0]):
        config = compose("generate", [f"generate.prompt={text}"])
        assert isinstance(config, schema.GenerateRoot)
        assert config.generate.prompt == text
        assert OmegaConf.to_container(OmegaConf.create(to_yaml(config)), resolve=True) == dataclasses.asdict(
            config
        )


def test_text_in_lists_and_mappings_arrives_too():
    config = compose(
        "prepare",
        ["data.source=[2024_01, 1e3,'a,b',dir/[ab]*.txt]", "data.blend={2024_01:0.5,2024_02:1e-1,s3://a:2}"],
    )
    assert config.data.source == ["2024_01", "1e3", "a,b", "dir/[ab]*.txt"]
    assert config.data.blend == {"2024_01": 0.5, "2024_02": 0.1, "s3://a": 2.0}
    cluster = compose(
        "submit",
        [
            "cluster.environment={A: 1_0, PATH: /a:/b}",
            "cluster.environment.B=1_1",
            "cluster.sbatch={exclusive: ''}",
        ],
    )
    assert isinstance(cluster, schema.SubmitRoot)
    assert cluster.cluster.environment == {"A": "1_0", "PATH": "/a:/b", "B": "1_1"}
    assert cluster.cluster.sbatch == {"exclusive": ""}


def test_quotes_references_and_nothing_still_work(monkeypatch):
    monkeypatch.setenv("PLACE", "there")
    config = compose(
        "train",
        ["run.name='a b'", 'model.name="c"', "data.path=x/${run.name}/${oc.env:PLACE}", "data.eval_path="],
    )
    assert (config.run.name, config.model.name, config.data.path, config.data.eval_path) == (
        "a b",
        "c",
        "x/a b/there",
        "",
    )
    for nothing in ("run.name=null", "run.name=[a]", "data.source=x"):
        with pytest.raises(UserError, match=r"a value of type"):
            compose("train", [nothing])


def test_whole_numbers_in_any_spelling():
    for text, value in (
        ("1e9", 10**9),
        ("2.5e6", 2_500_000),
        ("1_000", "1_000"),
        ("3.0", 3),
        ("12", 12),
        ("1e400", "1e400"),
        ("1.5", "1.5"),
        ("x", "x"),
    ):
        assert words.as_typed(text, kind="int", free=False) == str(value)
    assert compose("train", ["train.tokens=1e9", "train.steps=1_000"]).train == schema.TrainConfig(
        tokens=10**9, steps=1000
    )


@pytest.mark.parametrize(("text", "instead"), [("1.5", "train.tokens=2"), ("x", "train.tokens=1000000000")])
def test_what_is_no_whole_number_gets_advice_that_fits(text, instead):
    with pytest.raises(UserError, match=f"train.tokens={text}: (?s:.*)try:     {instead}"):
        compose("train", [f"train.tokens={text}"])


def test_quoting_goes_there_and_back():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in PROMPTS:
        [override] = OverridesParser.create().parse_overrides([f"a={words.quoted(text)}"])
        assert override.value() == text


# -- paths ---------------------------------------------------------------------------------------------------


def test_every_option_that_is_a_path_expands_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", os.sep + "at-home")
    seen = 0
    for command in schema.ROOTS:
        here = [
            field.key
            for fields in keys.sections(command).values()
            for field in fields
            if field.key in keys.PATHS
        ]
        values = {"data.blend": "{~/x:1}", "data.source": "[~/x]", "report.compare": "[~/x,b]"}
        values["compare.sources"] = "[~/x,b]"
        config: Any = compose(command, [f"{key}={values.get(key, '~/x')}" for key in here])
        for key in here:
            section, option = key.split(".")
            assert "/at-home/x" in str(getattr(getattr(config, section), option)), key
            seen += 1
        assert "~" not in to_yaml(config)
    assert seen > len(keys.PATHS)
    assert compose("train", ["run.name=~/x", "run.dir=y"]).run.name == "~/x"  # no path


def test_options_that_speak_of_places_are_paths():
    """A new option that holds a path has to be in the list; these are the ones that speak of folders and
    files without being one."""
    speak = {
        field.key
        for field in [*TEXT_OPTIONS]
        if any(word in field.doc.lower() for word in ("folder", "prefix of", "file for"))
    }
    assert speak - set(keys.PATHS) <= {"data.format", "data.pattern"}
    assert set(keys.PATHS) <= {
        field.key for root in schema.ROOTS for fields in keys.sections(root).values() for field in fields
    }


@pytest.mark.parametrize(
    "name", ["runs/lr=1e-3", "-run", "a b", "~x", "back\\slash", "lr=1", "it's", "${x}", "--multi", "[a]"]
)
def test_an_existing_folder_is_a_run_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    for command in TAKES_RUN:
        run = f"run.dir={words.literal(name)}"
        sources = [f"compare.sources=[{words.literal(name)}]"] if command == "compare" else []
        assert _with_runs(command, [name, "run.seed=3"]) == [run, *sources, "run.seed=3"]
    assert compose("report", _with_runs("report", [name])).run.dir == name
    both = compose("report", _with_runs("report", ["--compare", name, "b"]))
    assert isinstance(both, schema.ReportRoot)
    assert both.report.compare == [name, "b"]


def test_a_missing_run_with_an_equals_sign_is_still_a_run():
    assert compose("report", _with_runs("report", ["runs/lr=1e-3"])).run.dir == "runs/lr=1e-3"
    assert _with_runs("report", ["run.dir=a", "report.out=b/c=d", "model=tiny"]) == [
        "run.dir=a",
        "report.out=b/c=d",
        "model=tiny",
    ]


# -- sweeps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "'a,b'", "x{y", "2024_01", "it's"])
def test_runs_of_a_sweep_have_names_of_any_kind(name):
    configs = [compose("train", job) for job in sweep("train", ["optim.lr=1e-3,1e-4", f"run.name={name}"])]
    assert [config.run.name for config in configs] == [
        f"{name.strip(chr(39)) if name[0] == chr(39) else name}-{n}" for n in (0, 1)
    ]


def test_sweeps_keep_what_was_typed():
    jobs = sweep("train", ["run.name=2024_01,1e3", "optim.lr=1e-3"])
    assert [compose("train", job).run.name for job in jobs] == ["2024_01", "1e3"]
    assert [job[0] for job in jobs] == ["run.name=2024_01", "run.name=1e3"]
    assert [
        compose("train", job).optim.betas for job in sweep("train", ["optim.betas=[0.9,0.95],[0.8,0.9]"])
    ] == [[0.9, 0.95], [0.8, 0.9]]
    assert [compose("train", job).train.steps for job in sweep("train", ["train.steps=range(1,4)"])] == [
        1,
        2,
        3,
    ]
    assert [compose("train", job).run.seed for job in sweep("train", ["run.seed=choice(4,5)"])] == [4, 5]


def test_a_thousand_runs_of_a_sweep_are_named_in_a_moment():
    begin = time.process_time()
    jobs = sweep("train", ["model=tiny", "data.path=x", "train.steps=1", "run.seed=range(0,1000)"])
    assert len(jobs) == 1000
    assert time.process_time() - begin < 10


# -- options over those of a run -----------------------------------------------------------------------------


def test_an_option_at_its_default_that_was_asked_for_is_in_force(tmp_path):
    run = compose(
        "train",
        [
            "model=tiny",
            "data.path=x",
            "data.seq_len=512",
            "batch.micro_batch_size=4",
            "data.document_mask=true",
            "train.eval_rows=7",
        ],
    )
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  eval_rows: 64\n")
    asked = [
        "data.seq_len=256",
        "batch.micro_batch_size=1",
        "data.document_mask=false",
        "--config-dir",
        str(tmp_path),
        "experiment=mine",
    ]
    laid = override(read_run(tmp_path / "config.yaml"), by=compose("evaluate", asked))
    assert (
        laid.data.seq_len,
        laid.batch.micro_batch_size,
        laid.data.document_mask,
        laid.train.eval_rows,
    ) == (256, 1, False, 64)
    assert laid.data.path == "x"
    untouched = override(read_run(tmp_path / "config.yaml"), by=compose("evaluate", []))
    assert (untouched.data, untouched.batch, untouched.train) == (run.data, run.batch, run.train)


# -- secrets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", schema.ROOTS)
@pytest.mark.parametrize("way", ["${SECTION[OPTION]}", "x-${SECTION.OPTION}"])
def test_a_secret_in_any_option_leaves_the_process_as_its_reference(command, way, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    holder, *options = [
        field.key for fields in keys.sections(command).values() for field in fields if field.type == "str"
    ]
    section, _, option = holder.partition(".")
    config = compose(
        command,
        [
            f"{holder}=${{oc.env:SECRET}}",
            *(f"{key}={way.replace('SECTION', section).replace('OPTION', option)}" for key in options),
        ],
    )
    for key in [holder, *options]:
        assert getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]).endswith("hunter2"), key
    assert "hunter2" not in to_yaml(config) + str(public(config))


def test_secrets_in_lists_mappings_and_free_fields(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    words_ = [
        "run.stop_signal=${oc.env:SECRET}",
        "tracker.kinds=['${oc.env:SECRET}']",
        "model.config.a={b:[1,'${oc.env:SECRET}'],c:'${run.stop_signal}'}",
    ]
    config = compose(
        "train",
        [
            *words_,
            "model.config.d=${model.config.a}",
            "model.config.e=${tracker.kinds}",
            "model.freeze=${tracker.kinds}",
        ],
    )
    assert config.model.config["d"]["b"] == [1, "hunter2"]
    assert config.model.freeze == ["hunter2"]
    assert "hunter2" not in to_yaml(config) + str(public(config))
    with pytest.raises(UserError, match="refers to a whole section"):
        compose("train", ["model.config.a=${run}"])


def test_a_sweep_does_not_print_secrets(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    jobs = sweep("train", ["run.name=${oc.env:SECRET}", "optim.lr=1,2"])
    assert "hunter2" not in str(jobs)
    assert compose("train", jobs[1]).run.name == "hunter2-1"


def test_ones_own_run_goes_on_and_names_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    line = ["model=tiny", "data.path=x", f"run.dir={tmp_path}", "model.trust_remote_code=true"]
    (tmp_path / "config.yaml").write_text(
        to_yaml(compose("train", [*line, "tracker.project=${oc.env:SECRET}", "model.name=${oc.env:SECRET}"]))
    )
    again = compose("train", [*line, "tracker.project=${oc.env:SECRET}", "model.name=${oc.env:SECRET}"])
    before = choose(again).before
    assert before is not None
    assert differences(before, again) == {}
    changed = compose("train", [*line, "tracker.project=x-${oc.env:SECRET}", "model.name=${oc.env:SECRET}"])
    assert differences(before, changed) == {"tracker.project": ("${oc.env:SECRET}", "x-${oc.env:SECRET}")}


def test_marked_text_is_text():
    text = Interpolated("a", "${oc.env:A}")
    assert (text, text.source) == ("a", "${oc.env:A}")
