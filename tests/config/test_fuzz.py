"""Hostile values for every option: each is accepted, and the config then resolves, or it is refused with a
UserError; nothing else, and soon."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest

from hybridtrain import engine as engines
from hybridtrain.config import checks, keys, schema
from hybridtrain.config.compose import compose, public, to_yaml
from hybridtrain.config.ranges import RANGES
from hybridtrain.errors import UserError
from tests.cases import model

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    2**63,
    2**64,
    10**18,
    10**30,
    1e-300,
    1e308,
    -1e308,
    0.5,
    1.5,
    1e30,
    float("nan"),
    float("inf"),
    -float("inf"),
]
TEXTS: list[Any] = [
    "",
    "x",
    "a" * 300,
    "a/" * 3000,
    "\0",
    "\udc80",
    "~",
    "..",
    "-",
    "$x",
    "${x}",
    "'",
    "\n",
    "💥",
    "[",
    "null",
    "nan",
    "fp32",
    "torch",
    "/dev/null",
]
FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "layer_types", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "tie_word_embeddings",
    "initializer_range", "sliding_window", "use_sliding_window", "max_window_layers", "pad_token_id",
    "eos_token_id", "model_type", "attention_dropout", "attention_bias",
)  # fmt: skip
ANY: list[Any] = [
    *NUMBERS,
    *TEXTS[:6],
    None,
    True,
    False,
    [],
    [1],
    {},
    {"a": 1},
    {"type": "x"},
    {"rope_type": "linear", "factor": float("nan")},
    [[[]]],
    "abc",
    7.5,
]
OPTIONS = [
    (root, field) for root in schema.ROOTS for fields in keys.sections(root).values() for field in fields
]


def hostile(kind: str, rng: random.Random) -> Any:
    match kind:
        case "int":
            return int(rng.choice([number for number in NUMBERS if number == number and abs(number) < 1e40]))
        case "float":
            return float(rng.choice(NUMBERS))
        case "float | None":
            return rng.choice([None, float(rng.choice(NUMBERS))])
        case "bool":
            return rng.random() < 0.5
        case "str":
            return rng.choice(TEXTS)
        case "list[str]":
            return [rng.choice(TEXTS) for _ in range(rng.randint(0, 3))]
        case "list[int]":
            numbers = [number for number in NUMBERS if number == number and abs(number) < 1e40]
            return [int(rng.choice(numbers)) for _ in range(rng.randint(0, 3))]
        case "list[float]":
            return [float(rng.choice(NUMBERS)) for _ in range(rng.randint(0, 3))]
        case "dict[str, float]":
            return {rng.choice(TEXTS): float(rng.choice(NUMBERS))}
        case _:
            return {rng.choice(["a", *FIELDS]): rng.choice(ANY)}


def tried(config: schema.Root) -> bool:
    """Whether the config is accepted."""
    begin = time.process_time()
    try:
        checks.check(config)
        if type(config) is schema.Config:
            engines.settle(config, world_size=1)
        to_yaml(config), public(config)
    except UserError:
        return False
    finally:
        assert time.process_time() - begin < 5
    return True


def base(root: str) -> schema.Root:
    config = schema.ROOTS[root]()
    for key, value in {
        "model.config": model(),
        "data.path": "x",
        "data.source": ["x"],
        "compare.schemes": ["int8"],
        "train.steps": 10,
        "run.name": "n",
        "run.dir": "runs/n",
    }.items():
        section, option = key.split(".")
        if hasattr(config, section):
            setattr(getattr(config, section), option, value)
    return config


def mutated(rng: random.Random) -> tuple[schema.Root, str]:
    if rng.random() < 0.4:
        config, key = base("train"), rng.choice(FIELDS)
        config.model.config = model(rng.choice(["llama", "mistral", "qwen2", "qwen3"])) | {
            key: rng.choice(ANY)
        }
        return config, f"model.config.{key}={config.model.config[key]!r}"
    root, field = rng.choice(OPTIONS)
    config, value = base(root), hostile(field.type, rng)
    section, option = field.key.split(".")
    setattr(getattr(config, section), option, value)
    return config, f"{root}: {field.key}={value!r}"


def fuzz(seed: int, count: int) -> dict[str, int]:
    rng, counts = random.Random(seed), {"accepted": 0, "refused": 0}
    for _ in range(count):
        config, words = mutated(rng)
        try:
            counts["accepted" if tried(config) else "refused"] += 1
        except Exception as error:
            raise AssertionError(f"{words}: {type(error).__name__}: {error}") from error
    return counts


def test_hostile_values_are_accepted_or_refused():
    counts = fuzz(0, 600)
    assert min(counts.values()) > 60, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_hostile_values(seed):
    print(fuzz(seed, 2500))


@pytest.mark.parametrize(
    "key",
    [
        field.key
        for _, field in {field.key: (root, field) for root, field in OPTIONS}.values()
        if field.type in ("int", "float", "float | None")
    ],
)
def test_every_number_has_a_range_that_holds_its_default(key):
    least, most = RANGES[key]
    default = next(field.default for _, field in OPTIONS if field.key == key)
    assert default is None or least <= default <= most
    command = next(root for root, field in OPTIONS if field.key == key)
    for beyond in (most * 4 + 2**70, -(2**70)):
        config = base(command)
        section, option = key.split(".")
        setattr(getattr(config, section), option, (float if default is None else type(default))(beyond))
        with pytest.raises(UserError, match=key):
            checks.check(config)


SLIPS = [
    (["precision.kind=bf16"], "try:     precision.kind=bf16_mixed"),
    (["parallel.schedule=1f1bb"], "try:     parallel.schedule=1f1b"),
    (["precision=bf16"], "try:     precision=bf16_mixed"),
    (["parallel=tp3"], "try:     parallel=tp2, or parallel.tp=3"),
    (["model=falcon_7b"], "model.from_pretrained=FOLDER"),
    (["~optim.clip"], "cannot be removed"),
    (["schedule=wsd", "schedule.warmup_steps=95"], "overlap in a run of 100"),
    (["parallel.virtual_stages=-5"], "parallel.virtual_stages=-5: out of range"),
    (["run.dir=" + "x" * 256], "more than 255 bytes"),
]


@pytest.mark.parametrize(("words", "expected"), SLIPS)
def test_advice_that_fits(words, expected):
    with pytest.raises(UserError) as refused:
        checks.check(
            compose(
                "train",
                [
                    "data.path=x",
                    "train.steps=100",
                    *([] if words[0].startswith("model=") else ["model=tiny"]),
                    *words,
                ],
            )
        )
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bert", "an encoder"),
        ("t5", "encoder-decoder"),
        ("dit", "see hybridtrain inspect"),
        ("roberta-prelayernorm", "attention_probs_dropout_prob=0"),
        ("lama", "model_type=llama"),
    ],
)
def test_architectures_that_are_not_trained(kind, expected):
    config = base("train")
    config.model.config["model_type"] = kind
    with pytest.raises(UserError, match=expected):
        engines.settle(config, world_size=1)


def test_zero_layers_are_not_missing_ones():
    config = base("train")
    config.model.config["num_hidden_layers"] = 0
    with pytest.raises(UserError, match=r"num_hidden_layers=0: out of range"):
        engines.settle(config, world_size=1)


def test_context_parallelism_is_refused_before_processes_are_counted():
    config = base("train")
    config.parallel = dataclasses.replace(config.parallel, cp=2)
    with pytest.raises(UserError, match=r"parallel\.cp=2"):
        engines.settle(config, world_size=1)


def test_an_experiment_without_its_package_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("train:\n  steps: 3\n")
    with pytest.raises(UserError, match="# @package _global_"):
        compose("train", ["--config-dir", str(tmp_path), "experiment=mine"])
