"""What DeepSpeed cannot do, or would do wrongly without a word, is refused before processes meet,
with what to do instead.

One case for each row of the table in docs/support.md. As in tests/training/test_bad_input.py: the trainer
answers, and must not import torch to do so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hybridtrain.config import checks
from hybridtrain.config.compose import compose
from hybridtrain.errors import UserError
from tests.runs import arguments, corpus, four_parts
from tests.training.answers import answers

TORCH = "engine=torch"


class Case(NamedTuple):
    field: str
    words: str
    instead: str
    world_size: int
    options: dict[str, Any]


CASES = {
    "ZeRO 2 with a pipeline": Case(
        "parallel.zero_stage=2",
        "has no pipeline (pp=2)",
        TORCH,
        4,
        {"parallel": "pp2", "parallel__dp_shard": 2, "parallel__zero_stage": 2},
    ),
    "ZeRO 3 with a pipeline": Case(
        "parallel.zero_stage=3",
        "has no pipeline (pp=2)",
        TORCH,
        4,
        {"parallel": "pp2", "parallel__dp_shard": 2, "parallel__zero_stage": 3},
    ),
    "another schedule": Case(
        "parallel.schedule=interleaved_1f1b", "does not run it", TORCH, 2, {"parallel": "pp2_interleaved"}
    ),
    "hybrid sharding": Case(
        "parallel.dp_replicate=2", "does not replicate groups", TORCH, 4, {"parallel": "hsdp2_zero3"}
    ),
    "sequence parallelism": Case(
        "parallel.sequence_parallel=true",
        "whole sequences",
        TORCH,
        2,
        {"parallel": "tp2", "parallel__sequence_parallel": "true"},
    ),
    "fewer key/value heads than ranks": Case(
        "parallel.tp=4", "does not share a key/value head", TORCH, 4, {"parallel": "tp4"}
    ),
    "bf16 without master weights": Case(
        "precision.kind=bf16_pure", "does not run it", TORCH, 2, {"precision": "bf16_pure"}
    ),
    "the numerics monitor with tensor parallelism": Case(
        "precision.monitor_every=50",
        "does not know what DeepSpeed's tensor parallelism cuts",
        TORCH,
        2,
        {"parallel": "tp2", "precision__monitor_every": 50},
    ),
    "compilation": Case(
        "engine.compile=True", "not with engine=deepspeed", TORCH, 2, {"engine__compile": True}
    ),
    "frozen weights": Case(
        "model.freeze=", "in 16 bits only", TORCH, 2, {"model__freeze": "[model.embed_tokens.*]"}
    ),
    "selective recomputation in ZeRO 3": Case(
        "recompute.kind=selective",
        "does not allow",
        TORCH,
        2,
        {"parallel": "zero3", "recompute": "selective"},
    ),
    "parameters offloaded without ZeRO 3": Case(
        "engine.offload_parameters=cpu",
        "only ZeRO 3",
        "parallel=zero3",
        2,
        {"engine__offload_parameters": "cpu"},
    ),
    "offload to NVMe": Case(
        "engine.offload_optimizer=nvme",
        "not supported yet",
        "engine.offload_optimizer=cpu",
        2,
        {"engine__offload_optimizer": "nvme"},
    ),
    "an override of what the config decides": Case(
        "engine.config_overrides.zero_optimization.stage=3",
        "says 1",
        "decides it",
        2,
        {"parallel": "zero1", "engine__config_overrides": "{zero_optimization:{stage:3}}"},
    ),
    "an override of another section": Case(
        "engine.config_overrides.bf16.enabled=True",
        "precision decides this",
        "option precision",
        2,
        {"engine__config_overrides__bf16__enabled": True},
    ),
    "context parallelism": Case(
        "parallel.cp=2", "does not run this axis yet", "parallel.cp=1", 2, {"parallel__cp": 2}
    ),
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cases")
    data = corpus(folder / "corpus")
    return answers(
        [
            (name, case.world_size, arguments(folder / name, data, engine="deepspeed", **case.options))
            for name, case in CASES.items()
        ]
    )


@pytest.mark.parametrize("name", CASES)
def test_refused(answered: dict[str, dict[str, Any]], name: str) -> None:
    given, case = answered[name], CASES[name]
    assert given["code"] == 2, given
    text = four_parts(given["err"], case.field.partition("=")[0])
    assert text.startswith(f"hybridtrain train: {case.field}"), text
    assert case.words in text, text
    assert case.instead in text.partition("try:")[2], text
    assert "IMPORTED TORCH" not in text


def test_its_own_options_are_refused_elsewhere() -> None:
    option = "engine.config_overrides.zero_optimization.overlap_comm=true"
    with pytest.raises(UserError, match=r"engine\.config_overrides=") as told:
        checks.check(compose("train", ["data.path=x", "model=tiny", "train.steps=1", option]))
    assert "engine=deepspeed" in str(told.value)


def test_not_installed_is_said_with_the_command_that_installs_it() -> None:
    """In an interpreter that finds no package deepspeed."""
    script = (
        "import importlib.util, sys; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'deepspeed' else found(name, *rest)\n"
        "from hybridtrain.cli import commands\n"
        "sys.exit(commands.run_command('train', "
        "['data.path=x', 'model=tiny', 'train.steps=1', 'engine=deepspeed']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 2, ended.stderr
    assert "engine.kind=deepspeed: the package deepspeed is not installed here" in ended.stderr
    assert 'pip install "hybridtrain[deepspeed]"' in ended.stderr


def test_fp16_where_the_processor_has_none() -> None:
    """DeepSpeed's rule, asked of torch; GPUs have it."""
    import torch

    from hybridtrain import engine as engines

    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported():
        engines.check_device(["deepspeed"], precision="fp16_mixed")
        return
    with pytest.raises(UserError, match=r"precision\.kind=fp16_mixed") as told:
        engines.check_device(["torch", "deepspeed"], precision="fp16_mixed")
    assert "engine=torch" in str(told.value)
    engines.check_device(["torch"], precision="fp16_mixed")
