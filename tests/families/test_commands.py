"""The commands on architectures without code of their own: train, resume, export, start from the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridtrain.cli import commands
from tests.runs import arguments, finished, rows, summary

MODELS = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64},
    "gemma2_2b": {
        **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6},
        **{"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8},
    },
    "mixtral_8x7b": {
        **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6},
        **{"num_key_value_heads": 2, "num_local_experts": 4},
    },
}


def command(name: str, run: Path, data: Path, **options: object) -> list[str]:
    fields = {f"model__config__{key}": value for key, value in MODELS[name].items()}
    return arguments(
        run, data, model=name, **{**fields, "train__steps": 4, "checkpoint__every": 2, **options}
    )


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        pytest.param("gemma2_2b", marks=pytest.mark.slow),
        pytest.param("mixtral_8x7b", marks=pytest.mark.slow),
    ],
)
def test_trained_in_stages_it_resumes_elsewhere_and_its_export_is_a_model_of_transformers(
    name: str, data: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    whole, run, on = (tmp_path / each for each in ("whole", "run", "on"))
    finished(1, command(name, whole, data))
    finished(2, command(name, run, data, parallel="pp2", train__steps=2, schedule="constant"))
    finished(2, command(name, run, data, parallel="zero3", train__steps=4, schedule="constant"))
    losses = [[row["loss"] for row in rows(each)] for each in (whole, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert commands.run_command("export", [str(run)]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(
        run / "export", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == summary(run)["parameters"]
    again = command(name, on, data, train__steps=1, model__from_pretrained=run / "export")
    finished(2, [*again, "parallel=zero3"])
    ids = torch.arange(32)[None] % 300
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
    # The first step from the export begins where the run ended: its loss is that of the next step.
    assert rows(on)[0]["loss"] < rows(whole)[0]["loss"]
