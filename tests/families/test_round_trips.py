"""Folders of transformers through stages and tensor-parallel ranks to an export; parity of both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybridtrain.cli import commands
from hybridtrain.config.schema import ParityRoot
from hybridtrain.errors import UserError
from tests.families.copies import EIGHT, fields_of, folder_of
from tests.families.test_shared import command
from tests.parity.test_parity import root, run
from tests.runs import finished

pytestmark = pytest.mark.table
TWENTY = (
    *(
        "llama",
        "qwen3",
        "gemma3_text",
        "cohere2",
        "olmo3",
        "qwen3_moe",
        "deepseek_v3",
        "gpt_neox",
        "opt",
        "phi",
    ),
    *("stablelm", "starcoder2", "glm4", "glm4_moe", "smollm3", "exaone4", "falcon", "qwen3_next", "mamba2"),
    *("gemma4_text", "ernie4_5", "phi"),
)


@pytest.mark.parametrize("model_type", [*EIGHT, *TWENTY])
def test_a_folder_comes_out_as_it_went_in(model_type: str, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, there = tmp_path / "source", tmp_path / "run"
    folder_of(model_type, source)
    # a rate at which no weight changes
    options = {"optim__lr": 1e-30, "train__steps": 1, "parallel__allow_replicated": True}
    finished(4, command(there, data, source, parallel="tp2_pp2", **options))
    assert commands.run_command("export", [str(there), "export.dtype=float32"]) == 0
    exported, saved = (load_file(folder / "model.safetensors") for folder in (there / "export", source))
    assert exported.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(exported[name], tensor), name
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
            for folder in (source, there / "export")
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("model_type", EIGHT)
def test_parity_of_both_engines(model_type: str, run_dir: Path) -> None:
    """DeepSpeed's layers for tensor parallelism cut two of the eight, and the MLP of two; others are refused
    by name."""

    def config(*layouts: str) -> ParityRoot:
        given = root(run_dir, *layouts)
        given.model.config = fields_of(model_type)
        given.parity.engines = ["torch", "deepspeed"]
        return given

    assert run(config("pp2", "dp_shard2-zero1", "dp_shard2-zero3")) == 0
    if model_type in ("gemma2", "granite", "bloom", "olmo2"):
        assert run(config("tp2", "pp2-tp2")) == 0
        return
    with pytest.raises(UserError, match=r"parallel.tp=2: .*of its layers' matrix products would be cut"):
        run(config("tp2"))
    given = config("tp2", "pp2-tp2")
    given.parity.engines = ["torch"]
    assert run(given) == 0
