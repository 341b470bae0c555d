"""Memory known before it is allocated: the formula against what engines hold, and the refusal."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from hybridtrain import engine as engines
from hybridtrain.analysis.facts import facts
from hybridtrain.cli.main import main
from hybridtrain.config.schema import Config, ParallelConfig
from hybridtrain.errors import UserError
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import memory, notation
from hybridtrain.plan.batch import BatchPlan
from tests.cases import Case, model, start
from tests.families.copies import fields_of
from tests.ranks import run_ranks
from tests.runs import arguments, corpus

LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def needs(config: Config, layout: str, fields: dict[str, Any]) -> memory.MemoryNeed:
    parallel = ParallelConfig(**notation.parse(layout))
    degrees = layouts.ParallelLayout(parallel.dp_replicate, parallel.dp_shard, 1, parallel.tp, parallel.pp)
    plan = BatchPlan(1, 16, 8 // degrees.dp, 8)
    return memory.needs(config, parallel=parallel, layout=degrees, plan=plan, facts=facts(fields))


def held(case: Case) -> int:
    """Bytes of this rank's weights, gradients and moments after a step."""
    engine = start(case)
    engine.train_step(case.batches(0, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr)
    shards = [item.shard for item in engine.optimizer.shards]
    # also of the second copy of a tied matrix, which a checkpoint does not have
    fields = [engine.optimizer.fields(item) for item in engine.optimizer.shards]
    state = [tensor for of_one in fields for tensor in of_one.values() if tensor.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*shards, *shards, *state))


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout", ["single", "dp_replicate2", "dp_shard2-zero1", "dp_shard2-zero3", "tp2", "pp2"]
)
def test_the_formula_is_what_an_engine_holds(layout, tied, precision):
    fields = model(tie_word_embeddings=tied)
    case = Case(layout, fields, precision=precision, micro_batch_size=1)
    config = case.config()
    assert needs(config, layout, fields).state == max(run_ranks(case.world_size, held, case))


@pytest.mark.parametrize("model_type", ["phi3", pytest.param("bloom", marks=pytest.mark.slow)])
def test_what_tensor_parallel_ranks_store_whole_is_counted(model_type):
    """Matrices of which a rank uses two parts; attention that is not cut."""
    case = Case("tp2", fields_of(model_type), micro_batch_size=1)
    settled = engines.settle(case.config(), world_size=2)
    need = memory.needs(
        case.config(),
        parallel=case.config().parallel,
        layout=settled.layout,
        plan=settled.plan,
        facts=settled.facts,
    )
    assert need.state == pytest.approx(max(run_ranks(2, held, case)), rel=0.01)


@pytest.mark.parametrize("layout", ["pp2-cut1", "pp2-cut3", "pp2-zbv_zero_bubble"])
def test_the_formula_follows_the_cut(layout):
    """The rank with the embedding, that with the head, and with a V schedule the one with both."""
    case = Case(layout, model(num_hidden_layers=6, vocab_size=1024), micro_batch_size=1)
    assert needs(case.config(), layout, case.fields).state == max(run_ranks(2, held, case))


def kept(case: Case) -> int:
    """Bytes that a step keeps for the backward pass; weights among them."""
    engine, sizes, alive = start(case), {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        sizes[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        alive.append(local)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.train_step(case.batches(0, dp_rank=0, dp=1), lr=case.lr)
    return sum(sizes.values())


def kept_everywhere(cases: list[Case]) -> list[int]:
    return [kept(case) for case in cases]


@pytest.mark.parametrize(
    ("layout", "precision"), [("single", "fp32"), ("single", "bf16_mixed"), ("tp2", "bf16_mixed")]
)
def test_the_estimate_of_activations_is_what_eager_layers_keep(layout, precision):
    """What four layers more keep of 96 tokens more: weights and ends drop out."""

    def case(layers: int, seq_len: int) -> Case:
        fields = model(num_hidden_layers=layers, intermediate_size=192)
        return Case(
            layout, fields, precision=precision, micro_batch_size=2, global_batch_size=2, seq_len=seq_len
        )

    def estimate(case: Case) -> int:
        degrees = layouts.ParallelLayout(1, 1, 1, case.world_size, 1)
        return memory.activations(
            case.config(), layout=degrees, plan=BatchPlan(2, case.seq_len, 1, 2), facts=facts(case.fields)
        )

    def difference(values: list[int]) -> int:
        return values[3] - values[2] - values[1] + values[0]

    cases = [case(layers, seq_len) for layers in (4, 8) for seq_len in (16, 64)]
    found = difference(run_ranks(cases[0].world_size, kept_everywhere, cases)[0])
    assert difference([estimate(case) for case in cases]) == pytest.approx(found, rel=0.03)


def test_a_layout_whose_activations_may_not_fit_is_warned_of_with_what_takes_less(caplog):
    config, world = (
        Config(),
        {
            "layout": layouts.ParallelLayout(1, 8, 1, 1, 1),
            "plan": BatchPlan(4, 8192, 1, 32),
            "facts": facts(LLAMA_8B),
        },
    )
    config.precision.kind, config.parallel = "bf16_mixed", ParallelConfig(**notation.parse("dp_shard8-zero3"))
    memory.warn(config, **world, available=80 * memory.GIB, place="GPU memory")
    assert "activations of about 196.0 GiB come on top of 17.3 GiB" in caplog.text
    assert (
        "there are 80.0 GiB of GPU memory for each rank; "
        "batch.micro_batch_size=2 or recompute=selective or recompute=full takes less"
    ) in caplog.text
    caplog.clear()
    config.recompute.kind = "full"
    memory.warn(config, **world, available=80 * memory.GIB, place="GPU memory")
    assert not caplog.text


@pytest.mark.parametrize(
    ("layout", "precision", "gib"),
    [
        ("single", "fp32", 8.03 * 16 / 1.0737),
        ("dp_shard8-zero3", "bf16_mixed", 8.03 * 16 / 8 / 1.0737),
        ("tp8", "bf16_pure", 8.03 * 10 / 8 / 1.0737),
    ],
)
def test_an_8b_model_holds_16_bytes_a_parameter(layout, precision, gib):
    config = Config()
    config.precision.kind = precision
    assert needs(config, layout, LLAMA_8B).state / memory.GIB == pytest.approx(gib, rel=0.01)


def test_a_step_that_the_numerics_monitor_samples_holds_the_weights_twice():
    config = Config()
    config.precision.monitor_every = 50
    assert needs(config, "single", LLAMA_8B).step == pytest.approx(8.03e9 * 4, rel=0.01)
    config.precision.monitor_every = 0
    assert needs(config, "single", LLAMA_8B).step < 3e9


def refused(available: int, **engine: Any) -> str:
    config = Config()
    config.engine = dataclasses.replace(config.engine, **engine)
    with pytest.raises(UserError) as error:
        memory.check(
            config,
            layout=layouts.ParallelLayout(1, 1, 1, 1, 1),
            plan=BatchPlan(1, 2048, 8, 8),
            facts=facts(LLAMA_8B),
            available=available,
            place="host memory",
        )
    return str(error.value)


def test_what_cannot_fit_is_refused_with_what_would():
    text = refused(24 * memory.GIB)
    assert text.startswith(
        "parallel=single: a rank needs 119.7 GiB for weights, gradients and optimizer state"
    )
    assert "dp_shard8-zero3 on 8 ranks" in text
    assert "engine.check_memory=false" in text


def test_offloading_is_not_the_gpus(monkeypatch):
    monkeypatch.setattr(memory, "_on_gpu", lambda: True)
    config = Config()
    config.engine.kind, config.precision.kind = "deepspeed", "bf16_mixed"
    before = needs(config, "dp_shard8-zero3", LLAMA_8B).state
    config.engine.offload_optimizer = "cpu"
    assert before - needs(config, "dp_shard8-zero3", LLAMA_8B).state == pytest.approx(
        8.03e9 / 8 * 12, rel=0.01
    )


def test_what_is_offloaded_is_the_hosts(monkeypatch):
    monkeypatch.setattr(memory, "_on_gpu", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = Config()
    config.engine.kind, config.precision.kind, config.engine.offload_optimizer = (
        "deepspeed",
        "bf16_mixed",
        "cpu",
    )
    config.parallel = ParallelConfig(**notation.parse("dp_shard8-zero3"))
    world = {
        "layout": layouts.ParallelLayout(1, 8, 1, 1, 1),
        "plan": BatchPlan(1, 16, 1, 8),
        "facts": facts(LLAMA_8B),
    }
    monkeypatch.setattr(memory, "host_memory", lambda: 80 * memory.GIB)
    with pytest.raises(
        UserError,
        match=r"a rank offloads 11\.2 GiB to the host's memory, of which there are 10\.0 GiB for each rank",
    ):
        memory.check_host(config, **world)
    monkeypatch.setattr(memory, "host_memory", lambda: 96 * memory.GIB)
    memory.check_host(config, **world)


@pytest.mark.parametrize(
    ("options", "device", "host"),
    [
        ({}, 16, 0),
        ({"offload_optimizer": "cpu"}, 8, 16),
        ({"offload_optimizer": "cpu", "offload_parameters": "cpu"}, 0, 16),
    ],
)
def test_what_engine_torch_offloads(options, device, host, monkeypatch):
    """Bytes of a parameter on a GPU's device and host; on a CPU, the copies of the weights are more."""
    config = Config()
    config.precision.kind, config.engine = "bf16_mixed", dataclasses.replace(config.engine, **options)
    for on_gpu, on_device, on_host in ((True, device, host), (False, 16 + 4 * (device == 8), 0)):
        monkeypatch.setattr(memory, "_on_gpu", lambda gpu=on_gpu: gpu)
        need = needs(config, "single", LLAMA_8B)
        assert need.state == pytest.approx(8.03e9 * on_device, rel=0.01)
        assert need.host == pytest.approx(8.03e9 * on_host, rel=0.01)
    streamed = "offload_parameters" in options
    assert (need.step < 8.03e9) == streamed  # a layer and the head's gradient, or all weights in bf16


@pytest.mark.parametrize("command", ["train", "bench"])
def test_the_command_line_refuses_before_a_corpus_is_looked_for(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "_on_gpu", lambda: False)
    monkeypatch.setattr(memory, "host_memory", lambda: 24 * memory.GIB)
    assert (
        main(
            [
                command,
                "model=llama3_1_8b",
                "parallel=single",
                "train.steps=1",
                f"data.path={tmp_path / 'none'}",
                f"run.dir={tmp_path / 'run'}",
            ]
        )
        == 2
    )
    assert "parallel=single: a rank needs 119.7 GiB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_whoever_knows_better_is_not_stopped():
    config = Config()
    config.engine.check_memory = False
    single = layouts.ParallelLayout(1, 1, 1, 1, 1)
    memory.check(
        config,
        layout=single,
        plan=BatchPlan(1, 16, 1, 1),
        facts=facts(LLAMA_8B),
        available=1,
        place="host memory",
    )


def test_training_and_benchmarks_on_a_cpu_ask_its_host_first(tmp_path, monkeypatch, capsys):
    """Before torch is imported by a process alone, and before a run directory is there; a rank has
    its share of the host."""
    monkeypatch.setattr(memory, "host_memory", lambda: 2 << 20)
    argv = arguments(tmp_path / "run", corpus(tmp_path / "corpus"), train__steps=1)
    assert main(["train", *argv]) == 2
    assert "parallel=single: a rank needs 0.0 GiB for weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["bench", *argv, "bench.rounds=1", "bench.plain=false"]) == 2
    capsys.readouterr()
    monkeypatch.setattr(memory, "host_memory", lambda: 1 << 40)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(1 << 20))
    with pytest.raises(UserError, match=r"there are 0\.0 GiB of host memory for each rank"):
        memory.check_host(
            Config(),
            layout=layouts.ParallelLayout(1, 1, 1, 1, 1),
            plan=BatchPlan(1, 16, 1, 1),
            facts=facts(LLAMA_8B),
        )
