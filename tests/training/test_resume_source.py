"""A resumed run sets no initial weights: it needs neither the pretrained model it began from nor
the time to draw them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hybridtrain import engine as engines
from hybridtrain.config.compose import compose
from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.plan import layout as layouts
from hybridtrain.plan.batch import plan_batch
from hybridtrain.types import Progress
from tests import runs
from tests.cases import Case, model, start
from tests.ranks import run_ranks


@pytest.mark.parametrize("kind", ["torch", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_run_goes_on_without_the_pretrained_model_it_began_from(tmp_path, kind):
    pytest.importorskip("deepspeed") if kind == "deepspeed" else None
    source, data = tmp_path / "source", runs.corpus(tmp_path)
    fields = {**compose("train", ["model=tiny"]).model.config, "vocab_size": 300}
    plain_model(hf_config(fields, chosen={}, attention="sdpa")).save_pretrained(source)
    generation = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    options = {"model__from_pretrained": source, "engine": kind}
    options |= {"train__steps": 4, "train__log_every": 2, "checkpoint__every": 2}
    whole = runs.arguments(tmp_path / "whole", data, **options)
    runs.finished(1, whole)
    runs.finished(1, runs.arguments(tmp_path / "run", data, **{**options, "train__steps": 2}))
    shutil.rmtree(source)
    runs.finished(1, runs.arguments(tmp_path / "run", data, **options))
    assert runs.rows(tmp_path / "run") == runs.rows(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text()) == generation


def saved_and_loaded(case: Case, path: Path) -> None:
    """Save an engine after a step, load that into one built for it, save that one again."""
    first = start(case)
    first.train_step(case.batches(0, dp_rank=first.mesh.dp_rank, dp=first.layout.dp), lr=case.lr)
    first.save(path, Progress(1, 0, {})).result()
    config = case.config()
    layout = layouts.resolve(config.parallel, world_size=case.world_size)
    plan = plan_batch(config.batch, layout=layout, seq_len=case.seq_len)
    second = engines.build_for(
        None, config, layout=layout, plan=plan, device=torch.device("cpu"), initial=False
    )
    second.load(path)
    second.save(path.with_name("again"), Progress(1, 0, {})).result()


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("pp2", "torch"),
        ("dp_shard2-zero3", "torch"),
        ("tp2", "torch"),
        pytest.param("dp_shard2-zero3", "deepspeed", marks=pytest.mark.slow),
    ],
)
def test_everything_a_run_has_comes_from_its_checkpoint(tmp_path, layout, kind):
    """Frozen parameters and both copies of a tied matrix too (pp2)."""
    pytest.importorskip("deepspeed") if kind == "deepspeed" else None
    freeze = ("model.layers.0.*",) if kind == "torch" else ()
    case = Case(
        layout, model(tie_word_embeddings=layout == "pp2"), freeze=freeze, overrides=(("engine.kind", kind),)
    )
    run_ranks(case.world_size, saved_and_loaded, case, tmp_path / "one")
    runs.assert_equal_state(tmp_path / "again", tmp_path / "one")
