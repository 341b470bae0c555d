"""What holds in every layout besides parity: initial weights, names, replicas, frozen parameters,
evaluation, what ZeRO saves."""

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.models.patterns import matches
from hybridtrain.parallel.pipeline import _parameter_groups
from hybridtrain.types import IGNORE_INDEX
from tests.cases import Case, assert_parity, model, on_ranks, reference, start, whole
from tests.ranks import run_ranks

LAYOUTS = (
    "single",
    "tp2",
    "pp2",
    "dp_shard2-zero3",
    "dp_replicate2-tp2",
    "pp2-zbv_zero_bubble",
    "pp2-dp_shard2-tp2",
)


def step(engine: Any, case: Case, number: int) -> Any:
    return engine.train_step(
        case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp), lr=case.lr
    )


# -- weights, names, buffers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "fields", [model("qwen3", vocab_size=257), model("llama", attention_bias=True, tie_word_embeddings=True)]
)
def test_initial_weights_do_not_depend_on_the_layout(layout, fields):
    case = Case(layout, fields, steps=0)
    ours, theirs = on_ranks(case).parameters, reference(case).parameters
    assert ours.keys() == theirs.keys()  # the stages together have Hugging Face's names
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_seed_and_the_name_decide_the_initial_weights():
    one, two = (reference(Case(steps=0, overrides=(("run.seed", seed),))).parameters for seed in (1, 2))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], two[name])
    assert not torch.equal(one[name], one[name.replace("layers.0", "layers.1")])
    assert one[name].std() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(one["model.norm.weight"], torch.ones(64))


def describe(case: Case) -> dict[str, Any]:
    engine = start(case)
    names = [name for stage in engine.stages for name, _ in stage.named_parameters()]
    plain = [
        name
        for stage in engine.stages
        for name, parameter in stage.named_parameters()
        if not isinstance(parameter, DTensor)
    ]
    buffers = {name: buffer.clone() for stage in engine.stages for name, buffer in stage.named_buffers()}
    return {"names": names, "plain": plain, "buffers": buffers}


@pytest.mark.parametrize("layout", ["single", "dp_shard2-zero3", "pp2-tp2", "pp2-interleaved_1f1b"])
def test_structure(layout):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 5e5,
    }
    case = Case(layout, model(rope_parameters=scaling))
    theirs = plain_model(hf_config(case.fields, chosen={}, attention="sdpa"))
    found = run_ranks(case.world_size, describe, case)
    first_of_tp = found[:: 2 if "tp2" in layout else 1]
    if "pp2" in layout:  # one home for every parameter
        assert sorted(name for rank in first_of_tp for name in rank["names"]) == sorted(
            name for name, _ in theirs.named_parameters()
        )
    for rank in found:  # DTensors all, or none where nothing is sharded and nothing cast
        assert rank["plain"] == ([] if "tp2" in layout or "shard2" in layout else rank["names"])
        assert set(rank["buffers"]) == {name for name, _ in theirs.named_buffers()}
        for name, buffer in theirs.named_buffers():
            assert torch.equal(rank["buffers"][name], buffer), name


# -- replicas ------------------------------------------------------------------------------------------------


def local_values(case: Case) -> tuple[dict[str, int], dict[str, torch.Tensor], list[str]]:
    """Coordinates, this rank's own numbers after training, and which of them are replicated over tp."""
    engine = start(case)
    for number in range(case.steps):
        step(engine, case, number)
    locals_ = {name: parameter.to_local().detach().clone() for name, parameter in engine.weights()}
    over_tp = [
        name
        for name, p in engine.weights()
        if "tp" in p.device_mesh.mesh_dim_names
        and p.placements[p.device_mesh.mesh_dim_names.index("tp")].is_replicate()
    ]
    return engine.mesh.coordinates, locals_, over_tp


@pytest.mark.parametrize(
    "layout",
    [
        "dp_replicate2-tp2",
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in ("tp2", "dp_replicate2-dp_shard2-zero3", "pp2-dp_replicate2", "dp_shard2-tp2-zero2")
        ),
    ],
)
def test_replicated_parameters_stay_bitwise_equal(layout):
    case = Case(layout, model("qwen3", num_key_value_heads=1), steps=5, lr=1e-2)
    ranks = run_ranks(case.world_size, local_values, case)
    compared = 0
    for coordinates, mine, replicated_over_tp in ranks:
        for other, theirs, _ in ranks:
            axes = {axis for axis in coordinates if coordinates[axis] != other[axis]}
            for name in mine if axes == {"dp_replicate"} else replicated_over_tp if axes == {"tp"} else []:
                assert torch.equal(mine[name], theirs[name]), name
                compared += 1
    assert compared > 0


def both_copies(case: Case) -> list[torch.Tensor]:
    engine = start(case)
    for number in range(case.steps):
        step(engine, case, number)
    name = f"{engine.structure.embed}.weight"
    return [
        whole(parameter)
        for stage in engine.stages
        for own, parameter in stage.named_parameters(remove_duplicate=False)
        if stage.owner(own) == name
    ]


@pytest.mark.parametrize(
    "layout",
    [
        *("single", "pp2", "pp2-zbv_zero_bubble", "pp2-dp_shard2-tp2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "pp2-dualpipev")),
    ],
)
def test_the_copies_of_a_tied_matrix_stay_bitwise_equal(layout):
    copies = [
        copy
        for rank in run_ranks(
            Case(layout).world_size,
            both_copies,
            Case(layout, model(tie_word_embeddings=True), steps=4, lr=1e-2),
        )
        for copy in rank
    ]
    assert len(copies) >= 2
    assert all(torch.equal(copy, copies[0]) for copy in copies)


# -- frozen parameters ---------------------------------------------------------------------------------------

FIRST_STAGE = ("model.embed_tokens.*", "model.layers.0.*", "model.layers.1.*")


def frozen_run(case: Case) -> dict[str, Any]:
    engine = start(case)
    before = {name: whole(parameter) for name, parameter in engine.weights()}
    for number in range(case.steps):
        step(engine, case, number)
    changed = [
        name for name, parameter in engine.weights() if not torch.equal(before[name], whole(parameter))
    ]
    return {
        "changed": changed,
        "names": list(before),
        "state": sorted({key.split(".", 1)[1].rsplit(".", 1)[0] for key in engine.optimizer.state()}),
    }


@pytest.mark.parametrize(
    ("layout", "freeze", "tied"),
    [
        ("single", ("model.embed_tokens.*",), False),
        ("tp2", ("*norm*", "lm_head.weight"), False),
        pytest.param("dp_shard2-tp2-zero3", FIRST_STAGE, False, marks=pytest.mark.slow),
        ("pp2", FIRST_STAGE, False),
        pytest.param("pp2-zbv_zero_bubble", FIRST_STAGE, False, marks=pytest.mark.slow),
        ("pp2-dp_shard2-zero3", FIRST_STAGE, False),
        pytest.param(
            "pp2-gpipe", ("model.layers.[23].*", "model.norm.*", "lm_head.*"), False, marks=pytest.mark.slow
        ),
        ("single", ("model.embed_tokens.*",), True),
        ("pp2", ("model.embed_tokens.*",), True),
        pytest.param("pp2-zbv_zero_bubble", ("model.embed_tokens.*",), True, marks=pytest.mark.slow),
    ],
)
def test_freezing(layout, freeze, tied):
    case = Case(layout, model(tie_word_embeddings=tied), freeze=freeze)
    assert_parity(case)
    frozen = {name for name, parameter in plain_parameters(case) if matches(name, freeze)}
    assert frozen
    for rank in run_ranks(case.world_size, frozen_run, case):
        trained = set(rank["names"]) - frozen
        assert set(rank["changed"]) == trained
        assert set(rank["state"]) == trained


def plain_parameters(case: Case) -> list[tuple[str, torch.Tensor]]:
    return list(plain_model(hf_config(case.fields, chosen={}, attention="sdpa")).named_parameters())


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_freezing_with_recomputation(kind):
    assert_parity(Case("pp2", freeze=FIRST_STAGE, overrides=(("recompute.kind", kind),)))


# -- evaluation ----------------------------------------------------------------------------------------------


def evaluations(case: Case) -> list[tuple[float, int]]:
    engine = start(case)
    found = []
    for number in range(2):
        result = engine.eval_step(case.batches(number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp))
        found.append((result.values["loss"], result.counts["loss"]))
    return found


def reference_loss_sum(case: Case, number: int) -> tuple[float, int]:
    ids, labels = case.rows(number)
    plain = plain_model(hf_config(case.fields, chosen={}, attention="sdpa")).eval()
    plain.load_state_dict(reference(Case(fields=case.fields, steps=0)).parameters, strict=False)
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return float(loss), int((labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize(
    "layout",
    [
        *LAYOUTS,
        "pp2-gpipe",
        "pp2-interleaved_1f1b",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("pp2-looped_bfs", "pp2-dualpipev", "pp2-interleaved_zero_bubble")
        ),
        "pp2-dp_shard2-zero3",
    ],
)
def test_eval_step_gives_the_plain_loss(layout):
    case = Case(layout, micro_batch_size=1)
    wanted = [reference_loss_sum(case, number) for number in range(2)]
    for found in run_ranks(case.world_size, evaluations, case):
        for (loss_sum, tokens), (expected, count) in zip(found, wanted, strict=True):
            assert loss_sum == pytest.approx(expected, rel=1e-6)
            assert tokens == count


def train_with_evaluations(case: Case, between: bool) -> list[float]:
    engine = start(case)
    losses = []
    for number in range(3):
        losses.append(float(step(engine, case, number).loss))
        if between:
            engine.eval_step(case.batches(50 + number, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp))
    return losses


OFTEN = ("dp_shard2-zero3", "pp2-dp_shard2-dualpipev")
SELDOM = [
    pytest.param(layout, marks=pytest.mark.slow)
    for layout in [*LAYOUTS, "pp2-dp_shard2-zero2"]
    if layout not in OFTEN
]


@pytest.mark.parametrize("layout", [*OFTEN, *SELDOM])
def test_evaluation_leaves_training_bitwise_as_it_was(layout):
    case = Case(layout, micro_batch_size=1)
    assert run_ranks(case.world_size, train_with_evaluations, case, True) == run_ranks(
        case.world_size, train_with_evaluations, case, False
    )


def state_around_an_evaluation(case: Case) -> list[str]:
    """What an evaluation changes of the state that a checkpoint would hold: values, dtypes, shards."""
    engine = start(case)
    step(engine, case, 0)
    before = {key: value.clone() for key, value in engine.state().items()}
    engine.eval_step(case.batches(50, dp_rank=engine.mesh.dp_rank, dp=engine.layout.dp))
    after = engine.state()
    assert before.keys() == after.keys()
    return [
        key
        for key, value in before.items()
        if type(value) is not type(after[key])
        or value.dtype != after[key].dtype
        or not same(value, after[key])
    ]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(value.to_local() if isinstance(value, DTensor) else value for value in (one, other)))


@pytest.mark.parametrize(
    "layout", ["single", "dp_shard2-zero1", "tp2", "pp2-dp_shard2-zero2", "dp_shard2-zero3"]
)
def test_a_checkpoint_beside_an_evaluation_has_the_shards_of_the_master_weights(layout):
    """An evaluation gathers whole copies in compute precision: a checkpoint that took them would
    round the run to bf16."""
    case = Case(layout, micro_batch_size=1, precision="bf16_mixed")
    assert run_ranks(case.world_size, state_around_an_evaluation, case) == [[]] * case.world_size


# -- what ZeRO saves -----------------------------------------------------------------------------------------


def live_memory(stage: FSDPModule) -> dict[str, int]:
    """Elements of unsharded parameters and of unsharded gradients that this stage holds right now."""
    parameters = gradients = 0
    for group in _parameter_groups(stage):
        for item in group.fsdp_params:
            if not hasattr(item, "_unsharded_param"):
                continue
            unsharded = item._unsharded_param
            local = unsharded.to_local() if isinstance(unsharded, DTensor) else unsharded
            if local.untyped_storage().nbytes():
                parameters += local.numel()
            if unsharded.grad is not None or item.unsharded_accumulated_grad is not None:
                gradients += local.numel()
    return {"parameters": parameters, "gradients": gradients}


def memory_between_micro_batches(case: Case) -> list[dict[str, int]]:
    """Unsharded memory of each rank when a later micro-batch begins, the whole stage's size, and what
    the optimizer holds."""
    engine = start(case)
    stage = engine.stages[-1]
    seen: list[dict[str, int]] = []
    stage.register_forward_pre_hook(lambda module, _: seen.append(live_memory(module)), prepend=True)
    step(engine, case, 0)
    size = sum(parameter.numel() for parameter in stage.parameters())
    held = sum(value.numel() for key, value in engine.optimizer.state().items() if key.endswith("exp_avg"))
    local = sum(item.shard.numel() for item in engine.optimizer.shards)
    moments = sum(state["exp_avg"].numel() for state in engine.optimizer.optimizer.state.values())
    assert held == sum(item.parameter.numel() for item in engine.optimizer.shards)
    return [{**seen[-1], "size": size, "local": local, "moments": moments, "whole": held}]


@pytest.mark.parametrize(
    "layout",
    [
        *("dp_shard2", "pp2-dp_shard2", "pp2-dp_shard2-gpipe"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("dp_shard2-tp2", "pp2-dp_shard2-interleaved_1f1b")
        ),
    ],
)
def test_every_zero_stage_saves_what_it_says(layout):
    """Before the last micro-batch of a step: which whole parameters and gradients are still in memory."""
    # all forward passes of a stage may come before its first backward
    pipelined = "gpipe" in layout or "interleaved" in layout
    for zero in (1, 2, 3):
        case = Case(f"{layout}-zero{zero}", model(vocab_size=64), micro_batch_size=1)
        for (found,) in run_ranks(case.world_size, memory_between_micro_batches, case):
            parts = 4 if "tp2" in layout else 2
            assert found["moments"] == found["local"]
            assert found["local"] < found["whole"] / parts * 1.1  # norms are replicated over tp
            kept = found["size"] / (2 if "tp2" in layout else 1)
            if zero == 3:
                # the root's own parameters (embedding, norm, head) stay from forward to
                # backward, layers never do
                assert found["parameters"] <= (64 * 64 * 2 + 64 if pipelined or "pp2" in layout else 0)
            else:
                assert found["parameters"] >= kept * 0.98
            if zero >= 2:
                assert found["gradients"] == 0
            elif not pipelined:
                assert found["gradients"] >= kept * 0.98
