"""conf/ and the schema: every file composes and types, models are the published ones, every option is
documented and read."""

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from hybridtrain.config import checks, keys, ranges, schema
from hybridtrain.config.compose import Interpolated, compose, read_run, to_yaml
from hybridtrain.config.sweep import sweep
from hybridtrain.errors import UserError
from hybridtrain.plan import layout

ROOT = Path(__file__).resolve().parents[2]
GROUPS = keys.groups([keys.conf_folder()])
FILES = [(group, name) for group, names in GROUPS.items() for name in names]
OPTIONS = [field for fields in keys.all_sections().values() for field in fields]
ENOUGH = ["data.path=x", "model=tiny", "train.steps=100"]

PARAMETERS = {
    "llama_1_1b": 1_100_048_384,
    "llama3_2_1b": 1_235_814_400,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "qwen2_5_7b": 7_615_616_512,
    "mistral_7b": 7_248_023_552,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "phi4_mini": 3_836_021_760,
    "olmo2_7b": 7_298_617_344,
    "granite3_2b": 2_533_525_504,
    "smollm3_3b": 3_075_098_624,
    "glm4_9b": 9_400_279_040,
    "bert_base": 110_106_428,
    "roberta_base": 124_697_433,
    "gpt2": 124_439_808,
    "gpt2_xl": 1_557_611_200,
    "pythia_1b": 1_011_781_632,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("command", schema.ROOTS)
def test_every_default_is_within_the_range_of_its_option(command):
    """An option that nobody set is never refused."""
    ranges.check(compose(command, []))


@pytest.mark.parametrize("command", schema.ROOTS)
def test_every_command_composes_to_its_own_sections_with_files_and_without(command):
    for words in ([], ["experiment=smoke"]):
        assert type(compose(command, words)) is schema.ROOTS[command]


def test_a_file_may_set_options_of_any_section_and_a_command_keeps_its_own(tmp_path):
    """One file for all that is done with a run: prepared, trained, submitted, exported."""
    (tmp_path / "experiment").mkdir()
    lines = [
        "# @package _global_",
        "defaults: [override /cluster: gpu8, override /parallel: tp2]",
        "cluster: {nodes: 3}",
        "export: {dtype: bfloat16}",
    ]
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "\n".join([*lines, "data: {path: 'x/${run.name}'}"]) + "\n"
    )
    words = ["--config-dir", str(tmp_path), "experiment=mine"]
    assert compose("prepare", words).data.path == compose("train", words).data.path == "x/mine"
    submit, export = compose("submit", words), compose("export", words)
    assert (submit.cluster.nodes, submit.cluster.gpus_per_node, submit.parallel.tp) == (3, 8, 2)
    assert (export.run.dir, export.export.dtype) == ("runs/mine", "bfloat16")


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_composes_types_and_passes(group, name):
    overrides = (
        [f"{group}={name}"]
        if group in ("experiment",)
        else [f"{group}={name}", *(text for text in ENOUGH if not text.startswith(f"{group}="))]
    )
    config = compose("submit" if group == "cluster" else "train", overrides)
    assert isinstance(config, schema.Config)
    if group == "tracker" and name != "none" and importlib.util.find_spec(name) is None:
        with pytest.raises(UserError, match=f"pip install {name}"):
            checks.check(config)
    else:
        checks.check(config)
    for section in dataclasses.fields(config):  # typed all the way down
        values = getattr(config, section.name)
        for option, kind in get_type_hints(type(values)).items():
            assert isinstance(getattr(values, option), getattr(kind, "__origin__", kind)), (
                f"{section.name}.{option}"
            )


@pytest.mark.parametrize(("group", "name"), FILES)
def test_group_files_hold_only_what_deviates(group, name):
    if group in ("model", "experiment", "data"):
        return
    text = (keys.conf_folder() / group / f"{name}.yaml").read_text()
    values = yaml.safe_load(text) or {}
    written = values if "@package _global_" in text else {group: values}
    command, root = ("submit", schema.SubmitRoot) if group == "cluster" else ("train", schema.Config)
    changed, defaults = dataclasses.asdict(compose(command, [f"{group}={name}"])), dataclasses.asdict(root())
    assert next(iter(written)) == group
    for section, options in written.items():
        assert sorted(options) == sorted(
            key
            for key, value in changed[section].items()
            if value != defaults[section][key] and key != "name"
        )


@pytest.mark.parametrize("name", GROUPS["parallel"])
def test_every_parallel_file_resolves_on_eight_or_fewer(name):
    parallel = compose("train", [f"parallel={name}"]).parallel
    sizes = []
    for world_size in (1, 2, 4, 8):
        try:
            layout.resolve(parallel, world_size=world_size)
        except UserError:
            continue
        sizes.append(world_size)
    assert sizes, "fits no world of up to 8 processes"


@pytest.mark.parametrize("name", GROUPS["model"])
def test_models_are_the_published_ones(name):
    import torch
    from transformers import AutoConfig

    from hybridtrain.models.build import auto_class

    fields = compose("train", [f"model={name}"]).model.config
    config = AutoConfig.for_model(**fields)
    for key in fields.keys() - {"model_type", "rope_theta", "rope_scaling", "partial_rotary_factor"}:
        assert hasattr(config, key), f"{key} is no field of {type(config).__name__}"
    for key in ("rope_theta", "partial_rotary_factor"):
        assert key not in fields or config.rope_parameters[key] == fields[key]
    for key, value in (fields.get("rope_scaling") or {}).items():
        assert config.rope_parameters[key] == value
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    assert type(model).__name__ == fields["architectures"][0]
    count = sum(parameter.numel() for parameter in model.parameters())
    if name in PARAMETERS:
        assert count == PARAMETERS[name]
    elif name == "nano":
        assert 5e6 < count < 8e6
    else:
        assert count < 500_000


def test_every_option_is_documented():
    assert [field.key for field in OPTIONS if not field.doc] == []


def options_read(tree: ast.AST) -> set[str]:
    """Keys read as `config.<section>.<option>`, or through a name: a parameter annotated with the section's
    class, or `name = config.<section>`."""
    classes = {
        kind.__name__: section
        for root in schema.ROOTS.values()
        for section, kind in get_type_hints(root).items()
    }
    # a name may hold different sections in different functions of a file
    sections_of: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            section = classes.get(ast.unparse(node.annotation).strip("\"'").rpartition(".")[2])
            sections_of.setdefault(node.arg, set()).update({section} if section else set())
        elif isinstance(node, ast.Assign):
            for target, value in [
                (t, v)
                for left in node.targets
                for t, v in zip(*map(_unpacked, (left, node.value)), strict=False)
            ]:
                if isinstance(value, ast.Attribute | ast.Name):
                    sections_of.setdefault(_last(target), set()).add(_last(value))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            names = {_last(node.value)}
            while more := set().union(*(sections_of.get(name, set()) for name in names)) - names:
                names |= more
            found |= {f"{name}.{node.attr}" for name in names}
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Subscript):
            # of the public form, which is a mapping of mappings
            keys = [
                part.value
                for part in (node.value.slice, node.slice)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            found |= {".".join(keys)} if len(keys) == 2 else set()
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and ast.unparse(node).startswith("getattr(parallel, axis")
        ):
            found |= {f"parallel.{axis}" for axis in layout.AXES}
    return found


def _last(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _unpacked(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def test_every_option_is_read():
    """Some part reads it; checks alone do not count."""
    parts = [path for path in (ROOT / "hybridtrain").rglob("*.py") if path.parent.name != "config"]
    read = set().union(*(options_read(ast.parse(path.read_text())) for path in parts))
    unread = [field.key for field in OPTIONS if field.key not in read]
    assert not unread, f"options that nobody reads: {', '.join(unread)}"


def test_the_scan_for_options_can_tell():
    source = (
        "def f(config, *, scale: schema.PrecisionConfig):\n"
        "    chosen, x = config.export, 1\n"
        "    return config.train.steps, scale.min_scale, chosen.out, x.dtype"
    )
    assert options_read(ast.parse(source)) >= {"train.steps", "precision.min_scale", "export.out"}
    assert not options_read(ast.parse(source)) & {"export.dtype", "train.tokens", "precision.init_scale"}


def test_run_name_and_directory_follow_from_the_experiment():
    assert (compose("train", []).run.name, compose("train", []).run.dir) == ("default", "runs/default")
    smoke = compose("train", ["experiment=smoke"]).run
    assert (smoke.name, smoke.dir) == ("smoke", "runs/smoke")
    assert compose("train", ["experiment=smoke", "run.name=mine"]).run.dir == "runs/mine"
    assert compose("train", ["experiment=smoke", "run.dir=/tmp/x"]).run.dir == "/tmp/x"


def test_overrides_win_over_the_experiment_and_plus_is_optional():
    config = compose(
        "train",
        [
            "experiment=smoke",
            "+train.steps=7",
            "model=nano",
            "model.config.num_hidden_layers=3",
            "model.config.my_field=[1,a]",
        ],
    )
    assert config.train.steps == 7
    assert config.model.config["num_hidden_layers"] == 3
    assert config.model.config["model_type"] == "qwen3"
    assert config.model.config["vocab_size"] == 1024  # the experiment's, over nano's
    assert config.model.config["my_field"] == [1, "a"]


def test_yaml_round_trip(tmp_path):
    config = compose(
        "train", ["experiment=quickstart", "optim.lr=1e-5", "data.pattern='*.md'", "run.name='1e-3'"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_run(tmp_path / "config.yaml") == config


def test_secrets_stay_unresolved_in_yaml(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    config = compose(
        "train",
        [
            "experiment=smoke",
            "tracker.project=${oc.env:MY_TOKEN}",
            "run.name=x-${tracker.project}",
            "model.freeze=['${oc.env:MY_TOKEN}']",
            "data.path=a/${model.name}",
        ],
    )
    assert config.tracker.project == "hunter2"
    assert config.run.dir == "runs/x-hunter2"
    assert isinstance(config.tracker.project, Interpolated)
    text = to_yaml(dataclasses.replace(config))
    assert "hunter2" not in text
    assert "project: ${oc.env:MY_TOKEN}" in text
    assert "path: a/smoke" in text  # without a secret in it: resolved


@pytest.mark.parametrize(
    "command", [name for name, root in schema.ROOTS.items() if issubclass(root, schema.Config)]
)
def test_null_is_no_file_of_a_group(command):
    standard = compose(command, [])
    for group in (*keys.OPTIONAL, "tracker", "recompute"):
        assert compose(command, [f"{group}=null"]) == standard
    there = compose(command, ["model=tiny", "tracker=tensorboard", "experiment=smoke"])
    assert there.model.config["hidden_size"] == 64
    assert there.tracker.kinds == ["tensorboard"]
    assert there.run.name == "smoke"
    assert (
        compose(
            command,
            [
                "experiment=smoke",
                "model=tiny",
                "tracker=tensorboard",
                "experiment=null",
                "tracker=null",
                "model=null",
            ],
        )
        == standard
    )
    assert compose(command, ["model=null", "model=tiny"]).model == compose(command, ["model=tiny"]).model
    assert "hidden_size" not in compose(command, ["experiment=smoke", "model=null"]).model.config


def test_own_folder_adds_groups_and_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /parallel: tp2\ntrain:\n  steps: 3\n"
    )
    config = compose("train", ["--config-dir", str(tmp_path), "experiment=mine"])
    assert (config.train.steps, config.parallel.tp, config.run.dir) == (3, 2, "runs/mine")
    with pytest.raises(UserError, match=r"--config-dir=.*no such folder"):
        compose("train", ["--config-dir", str(tmp_path / "none")])


def test_a_misspelt_key_in_a_file_names_the_nearest(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  weight_decai: 3\n")
    with pytest.raises(UserError, match=r"(?s)in experiment/mine\.yaml.*try:     optim\.weight_decay=VALUE"):
        compose("train", ["--config-dir", str(tmp_path), "experiment=mine"])


def test_a_sweep_is_one_command_line_per_combination():
    jobs = sweep("train", ["experiment=smoke", "optim.lr=1e-3,1e-4", "parallel=ddp,tp2"])
    assert len(jobs) == 4
    configs = [compose("train", job) for job in jobs]
    assert {(config.optim.lr, config.parallel.tp) for config in configs} == {
        (1e-3, 1),
        (1e-3, 2),
        (1e-4, 1),
        (1e-4, 2),
    }
    assert [config.run.dir for config in configs] == [f"runs/smoke-{number}" for number in range(4)]
