"""config.yaml that is read: of another run, command or version, spoilt or hostile."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
import yaml

from hybridtrain import __version__
from hybridtrain.config import keys, migrate, schema
from hybridtrain.config.compose import compose, read_run, to_yaml
from hybridtrain.errors import UserError
from hybridtrain.run import identity


def test_the_run_of_another_resolves_nothing_and_permits_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    texts = {
        "run": {"name": "${oc.env:SECRET}", "dir": "${..run.name}"},
        "tracker": {"project": "${run[name]}", "kinds": ["${oc.env:SECRET}"]},
    }
    texts["model"] = {
        "trust_remote_code": True,
        "name": "${${model.revision}:SECRET}",
        "revision": "oc.env",
        "config": {"a": "${oc.env:SECRET}", "b": "${model.config.a}"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(texts))
    config = read_run(tmp_path / "config.yaml")
    assert "hunter2" not in str(dataclasses.asdict(config))
    assert (config.run.name, config.tracker.project) == ("${oc.env:SECRET}", "${oc.env:SECRET}")
    assert not config.model.trust_remote_code
    (tmp_path / "config.yaml").write_text("train: {steps: '${oc.env:SECRET}'}")
    with pytest.raises(UserError, match=r"train.steps=\$\{oc.env:SECRET\}, which is not looked up"):
        read_run(tmp_path / "config.yaml")
    # plain references hold
    (tmp_path / "config.yaml").write_text("data: {path: 'a/${run.name}'}\nrun: {name: b}\n")
    assert read_run(tmp_path / "config.yaml").data.path == "a/b"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "words_"),
    [
        (BOMB.encode(), "becomes too large through its aliases"),
        (b"run: {name: " + b"[" * 200_000 + b"]" * 200_000, "nested more than"),
        (b"".join(b" " * (2 * n) + b"a:\n" for n in range(300)), "nested more than"),
        (b"- " * 300 + b"x", "nested more than"),
        (b"run: {name: \xff}", "is not UTF-8"),
        (b"#" * (1 << 20) + b"\n", "bytes, too many for a configuration"),
        (b"run: {name: &x *x}", "does not compose"),
        (b"run: [1]", ""),
        (b"\0", ""),
    ],
)
def test_hostile_config_files_are_refused_at_once(tmp_path, data, words_):
    (tmp_path / "config.yaml").write_bytes(data)
    begin = time.process_time()
    with pytest.raises(UserError) as refused:
        read_run(tmp_path / "config.yaml")
    assert words_ in str(refused.value)
    assert time.process_time() - begin < 2


def test_anchors_in_a_config_file_are_no_crime(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {source: &s [a, b]}\nmodel: {freeze: *s}\n")
    assert read_run(tmp_path / "config.yaml").model.freeze == ["a", "b"]


def test_a_config_of_another_command_is_read_without_its_own_section(tmp_path):
    (tmp_path / "config.yaml").write_text(
        to_yaml(compose("parity", ["experiment=smoke", "train.steps=37", "parity.steps=9"]))
    )
    assert read_run(tmp_path / "config.yaml").train.steps == 37


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stepz: 3}", "train.steps=VALUE"),
        ("train: {steps: soon}", "train.steps=soon"),
        ("[1, 2]", "not a configuration"),
        ("7", "not a configuration"),
        ("a: [", "does not compose"),
    ],
)
def test_a_spoilt_config_file_is_refused(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        read_run(tmp_path / "config.yaml")


def test_a_missing_config_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no config\.yaml in it"):
        read_run(tmp_path / "config.yaml")


def test_a_file_of_an_earlier_version_is_read_under_todays_names(tmp_path, monkeypatch):
    """The table as it will be when options of today have had other names and other defaults."""
    monkeypatch.setattr(
        migrate,
        "RENAMED",
        {"trainer.max_steps": "train.steps", "optim.learning_rate": "optim.lr", "data.folder": "data.path"},
    )
    monkeypatch.setattr(migrate, "ABSENT", {"optim.clip": 0.5, "batch.micro_batch_size": 3})
    monkeypatch.setenv("PLACE", "here")
    lines = [
        "trainer: {max_steps: 7}",
        "optim: {learning_rate: 0.25, eps: 1.0e-7}",
        "data: {folder: '${oc.env:PLACE}/x', seq_len: 32}",
    ]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "batch: {micro_batch_size: 2}"]))
    config = read_run(tmp_path / "config.yaml")
    assert (config.train.steps, config.optim.lr, config.optim.eps, config.data.path, config.data.seq_len) == (
        7,
        0.25,
        1e-7,
        "${oc.env:PLACE}/x",
        32,
    )
    # absent: what that meant then; present: as it stands
    assert (config.optim.clip, config.batch.micro_batch_size) == (0.5, 2)
    today = schema.Config()
    today.train.steps, today.optim = 7, dataclasses.replace(today.optim, lr=0.25, eps=1e-7, clip=0.5)
    today.data.seq_len, today.data.path, today.batch.micro_batch_size = 32, "${oc.env:PLACE}/x", 2
    assert identity.differences(config, today) == {}
    with pytest.raises(UserError, match=r"it has been renamed to optim\.lr"):
        compose("train", ["optim.learning_rate=1"])


def test_an_option_of_another_version_is_refused_with_the_version_that_wrote_it(tmp_path):
    (tmp_path / "config.yaml").write_text("optim: {lr: 1.0, beta_of_tomorrow: 3}")
    with pytest.raises(UserError, match=r"(?s)optim\.beta_of_tomorrow=.*no such option.*allowed: optim: "):
        read_run(tmp_path / "config.yaml")  # which version is not known
    for version in ("9.1.0", __version__):
        (tmp_path / "summary.json").write_text(json.dumps({"versions": {"hybridtrain": version}}))
        with pytest.raises(UserError, match=r"optim\.beta_of_tomorrow=") as refused:
            read_run(tmp_path / "config.yaml")
        assert (f"was written by hybridtrain {version}" in str(refused.value)) == (version != __version__)


def test_every_entry_of_the_table_of_earlier_names_leads_to_an_option_of_today():
    options = {field.key for fields in keys.all_sections().values() for field in fields}
    earlier = {name for (key, _), values in migrate.ABSENT_WITH.items() for name in (key, *values)}
    assert {*migrate.RENAMED.values(), *migrate.ABSENT, *earlier} <= options
    assert not migrate.RENAMED.keys() & options


def test_a_run_keeps_the_default_it_began_with_unless_the_command_sets_the_option():
    before, now = schema.Config(), schema.Config()
    before.precision.hysteresis = 1
    assert migrate.kept(before, now) == {"precision.hysteresis": 1}
    now.given = frozenset({"precision.hysteresis"})
    assert migrate.kept(before, now) == {}
    now.given, before.precision.hysteresis = frozenset(), 3
    assert migrate.kept(before, now) == {}, "a value of its own is no earlier default"
    before.precision.hysteresis, now.precision.hysteresis = 1, 4
    assert migrate.kept(before, now) == {}
