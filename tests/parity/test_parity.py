"""hybridtrain parity on real ranks: it passes where it should, fails where it must, and refuses
before anything starts."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hybridtrain.analysis.facts import facts
from hybridtrain.config import schema
from hybridtrain.data.prepare.tokenize import prepare
from hybridtrain.errors import UserError
from hybridtrain.parallel.grad_norm import gradient_norm
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parity import compare, plan, run, verdict
from hybridtrain.parity.measure import LayoutJob, Measurement, train_layout
from hybridtrain.plan import layout as layouts
from hybridtrain.plan import schedules
from hybridtrain.plan.capabilities import of_engine
from tests.cases import model
from tests.ranks import run_ranks

CAPABILITIES = of_engine("torch")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Layouts of several processes, also on a machine with one GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def root(run_dir: Path, *names: str, family: str = "llama", precision: str = "fp32") -> schema.ParityRoot:
    config = schema.ParityRoot()
    config.run.dir, config.run.seed = str(run_dir), 3
    config.model.config = model(family)
    config.data.seq_len = 16
    config.optim.lr = 1e-3
    config.precision.kind = precision
    config.parity.layouts = list(names)
    return config


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "parity.json").read_text())


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["dp_shard2-zero3", "pp2-tp2"]),
        pytest.param("qwen3", ["tp2", "pp2-dp_shard2-zero1"], marks=pytest.mark.slow),
    ],
)
def test_layouts_pass(run_dir, capsys, family, names):
    assert run(root(run_dir, *names, family=family)) == 0
    written = result(run_dir)
    assert [row["layout"] for row in written["layouts"]] == names
    assert all(set(row) == set(verdict.COLUMNS) for row in written["layouts"])
    assert all(
        row["passed"] and row["engine"] == "torch" and row["precision"] == "fp32"
        for row in written["layouts"]
    )
    assert all(
        0 < row["grad_rel"] < 1e-5 and 0 < row["param_abs"] < 0.05 * 3e-3 for row in written["layouts"]
    )
    assert len(written["reference"]["losses"]) == 3
    shown = capsys.readouterr().out
    assert "random tokens from run.seed=3 (data.path is empty)" in shown
    assert "optim.eps 1e-06 instead of 1e-08" in shown
    assert all(f"{row['grad_rel']:.1e}" in shown for row in written["layouts"])
    assert "2 of 2 layouts pass" in shown


@pytest.mark.parametrize(
    "precision",
    [
        "bf16_mixed",
        pytest.param("bf16_pure", marks=pytest.mark.slow),
        pytest.param("fp16_mixed", marks=pytest.mark.slow),
    ],
)
def test_half_precision_passes(run_dir, precision):
    assert run(root(run_dir, "single", "dp_shard2-zero2", "pp2-tp2", precision=precision)) == 0
    single, _, cut = result(run_dir)["layouts"]
    assert cut["grad_rel"] > 2 * single["grad_rel"], (
        "a matrix product cut by tp rounds differently, a whole one does not"
    )


def test_tokens_of_a_prepared_corpus(run_dir, tmp_path, capsys):
    config = root(run_dir, "dp_replicate2")
    (tmp_path / "text.txt").write_text("".join(f"line {number} of a small text\n" for number in range(400)))
    config.data = schema.DataConfig(
        path=str(tmp_path / "data"),
        source=[str(tmp_path / "text.txt")],
        vocab_size=300,
        seq_len=16,
        eval_fraction=0.0,
    )
    config.model.config["vocab_size"] = 300
    with pytest.raises(UserError, match=r"data\.path=''"):
        run(config)
    prepare(config.data, options=schema.PrepareConfig())
    assert run(config) == 0
    assert f"the corpus at {config.data.path}" in capsys.readouterr().out
    assert result(run_dir)["tokens"] == config.data.path


# -- it can fail ---------------------------------------------------------------------------------------------


def one_rank_exaggerates(job: LayoutJob, reference_norm: float) -> Measurement:
    """Rank 1 feeds its gradients into the reduction 1 % too large."""
    if dist.get_rank() == 1:
        torch.nn.Linear.__call__ = _louder(torch.nn.Linear.__call__)
    return train_layout(job, reference_norm)


def _louder(call):
    def louder(self, x):
        if x.requires_grad:
            x = x + 0.0
            x.register_hook(lambda grad: grad * 1.01)
        return call(self, x)

    return louder


def divides_by_its_own_tokens(job: LayoutJob, reference_norm: float) -> Measurement:
    """Every data rank divides by the tokens it sees, not by the global count."""
    from hybridtrain.engine import torch_native

    count = torch_native.global_counts
    torch_native.global_counts = lambda batches, **rest: count(batches, **rest) // job.layout.dp
    return train_layout(job, reference_norm)


def forgets_weight_decay(job: LayoutJob, reference_norm: float) -> Measurement:
    job.config.optim.weight_decay = 0.0
    return train_layout(job, reference_norm)


def crashes(job: LayoutJob, reference_norm: float) -> Measurement:
    if job.layout.tp > 1 and dist.get_rank() == 1:
        raise RuntimeError("planted in rank 1")
    return train_layout(job, reference_norm)


@pytest.mark.parametrize(
    ("broken", "layout", "columns"),
    [
        (one_rank_exaggerates, "dp_replicate2", {"grad_rel"}),
        (divides_by_its_own_tokens, "dp_shard2-zero2", {"loss_rel", "grad_norm_rel", "grad_rel"}),
        (forgets_weight_decay, "single", {"param_abs"}),
    ],
)
def test_a_broken_layout_fails_in_the_right_column(run_dir, capsys, broken, layout, columns):
    config = root(run_dir, layout)
    config.optim.weight_decay = 1.0
    config.model.config["initializer_range"] = 0.5
    assert compare(config, train=broken) == 1
    [row] = result(run_dir)["layouts"]
    tolerance = result(run_dir)["tolerances"][layout]
    assert not row["passed"]
    assert columns <= {name for name in verdict.MEASURES if row[name] > tolerance[name]}
    shown = capsys.readouterr().out
    assert f"FAILED: {layout}" in shown
    assert "FAIL (" in shown


def test_a_crash_is_a_failure_and_the_others_go_on(run_dir, capsys):
    assert compare(root(run_dir, "tp2", "pp2"), train=crashes) == 1
    crashed, other = result(run_dir)["layouts"]
    assert (crashed["passed"], crashed["grad_rel"]) == (False, None)
    assert other["passed"]
    assert "planted in rank 1" in result(run_dir)["errors"]["tp2"]
    assert "planted in rank 1" in capsys.readouterr().out


def test_a_value_that_is_not_a_number_fails():
    tolerance = verdict.tolerances(schema.PrecisionConfig(), tp=1, moved=3e-3, noise=0.0)
    good = dict.fromkeys(verdict.MEASURES, 0.0)
    row = verdict.Row("single", "torch", 1, "fp32", tolerance, 0.0, good, {}, "")
    assert row.passed
    assert verdict.Row(
        "single", "torch", 1, "fp32", tolerance, 0.0, {**good, "grad_rel": float("nan")}, {}, ""
    ).exceeded == ["grad_rel"]
    assert not verdict.Row(
        "single", "torch", 1, "fp32", tolerance, 0.0, good, {}, "one step was skipped"
    ).passed


# -- which layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tp3", "parallel.tp=3"),
        ("pp8", "parallel.pp=8"),
        ("dp_replicate16", "batch.global_batch_size=8"),
        ("pp2-dp_shard2-zero3-zbv_zero_bubble", "parallel.zero_stage=3"),
        ("pp2-dq2", "is no part of a layout"),
        ("pp2-zero3", "try:     dp_shard2-pp2-zero3"),
    ],
)
def test_a_named_layout_that_cannot_run_is_refused_before_anything_starts(run_dir, name, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        run(root(run_dir, "single", name))
    assert not (run_dir / "parity.json").exists()


def test_a_file_of_the_same_name_is_not_replaced(run_dir):
    run_dir.mkdir(exist_ok=True)
    file = run_dir / "parity.json"
    for content in ("[1, 2]", '{"layouts": 3}', "mine"):
        file.write_text(content)
        with pytest.raises(UserError, match="not of this command"):
            run(root(run_dir, "single"))
        assert file.read_text() == content


def test_what_deepspeed_cannot_do_in_zero_3_is_refused_for_each_layout(run_dir):
    config = root(run_dir, "dp_shard2-zero1", "dp_shard2-zero3")
    config.engine.kind, config.recompute.kind = "deepspeed", "selective"
    with pytest.raises(
        UserError, match=r"dp_shard2-zero3 cannot run with this model and batch:\nrecompute\.kind=selective"
    ):
        run(config)
    assert not (run_dir / "parity.json").exists()


def test_inside_torchrun_it_is_refused(run_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        run(root(run_dir, "single"))


@pytest.mark.parametrize(("processes", "least"), [(1, 1), (2, 10), (4, 18), (8, 22)])
def test_the_default_set_fits_model_and_machine(run_dir, processes, least):
    config = root(run_dir)
    config.parity.max_processes = processes
    chosen = plan.prepare(config, capabilities={"torch": CAPABILITIES}, devices=None)
    names = [case.name for case in chosen.cases]
    assert len(names) == len(set(names)) >= least
    assert max(case.layout.world_size for case in chosen.cases) <= processes
    config.model.config["num_hidden_layers"] = 2
    fewer = plan.prepare(config, capabilities={"torch": CAPABILITIES}, devices=None)
    assert all(case.layout.pp * schedules.stages_per_rank(case.parallel) <= 2 for case in fewer.cases)
    assert all("2 layers" in why for why in fewer.left_out.values())
    assert [
        case.name for case in plan.prepare(config, capabilities={"torch": CAPABILITIES}, devices=1).cases
    ] == ["single"]


def test_the_default_set_holds_the_users_own_layout(run_dir):
    config = root(run_dir)
    config.parallel = schema.ParallelConfig(
        pp=2, dp_replicate=1, tp=2, schedule="gpipe", sequence_parallel="false"
    )
    assert "pp2-tp2-gpipe-nosp" in [
        case.name for case in plan.prepare(config, capabilities={"torch": CAPABILITIES}, devices=None).cases
    ]


@pytest.mark.parametrize("name", ["llama3_1_70b", "qwen3_32b", "qwen2_5_7b", "mistral_7b", "llama3_2_1b"])
def test_shrink_keeps_the_family_and_its_head_ratio(run_dir, name):
    from hybridtrain.config.compose import compose

    config = compose(
        "parity",
        [
            f"model={name}",
            "parity.shrink=true",
            "parity.max_processes=8",
            f"run.dir={run_dir}",
            "data.seq_len=64",
        ],
    )
    full = facts(config.model.config)
    chosen = plan.prepare(config, capabilities={"torch": CAPABILITIES}, devices=None)
    small = chosen.facts
    assert small.model_type == full.model_type
    assert small.heads / small.kv_heads == full.heads / full.kv_heads
    assert small.parameters < 40e6 < full.parameters
    assert (small.tied, small.vocab % 2) == (full.tied, full.vocab % 2)
    assert chosen.config.model.config["num_hidden_layers"] == small.layers == 8
    assert any(f"num_hidden_layers {full.layers} -> 8" in text for text in chosen.changes)
    assert len(chosen.cases) >= 16


def test_a_shrunken_model_trains(run_dir):
    from hybridtrain.config.compose import compose

    config = compose(
        "parity",
        [
            "model=qwen2_5_7b",
            "parity.shrink=true",
            "parity.layouts=[pp2]",
            "parity.steps=1",
            f"run.dir={run_dir}",
            "data.seq_len=16",
        ],
    )
    assert run(config) == 0


@pytest.mark.slow
def test_both_engines_in_one_table(run_dir, capsys):
    config = root(run_dir, "dp_shard2-zero3", "tp2")
    config.parity.engines = ["torch", "deepspeed"]
    assert run(config) == 0
    rows = [(row["layout"], row["engine"], row["passed"]) for row in result(run_dir)["layouts"]]
    assert rows == [
        ("dp_shard2-zero3", "torch", True),
        ("tp2", "torch", True),
        ("dp_shard2-zero3", "deepspeed", True),
        ("tp2-nosp", "deepspeed", True),
    ]
    assert "tp2-nosp (deepspeed)" in capsys.readouterr().out


OF_DEEPSPEED = [
    *(f"dp_shard{ranks}-zero{stage}" for ranks in (2, 4) for stage in (1, 2, 3)),
    *("tp2", "dp_shard2-tp2-zero1", "dp_shard2-tp2-zero2", "dp_shard2-tp2-zero3"),
    *("pp2", "pp2-dp_shard2-zero1", "pp2-tp2", "pp2-dp_shard2-tp2-zero1"),
]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *(
            pytest.param(family, tied, marks=pytest.mark.slow)
            for family, tied in (("llama", False), ("qwen3", True))
        ),
        *(
            pytest.param(family, tied, marks=pytest.mark.table)
            for family, tied in (("llama", True), ("qwen3", False))
        ),
    ],
)
def test_every_layout_of_deepspeed(run_dir, family, tied):
    config = root(run_dir, *OF_DEEPSPEED, family=family)
    config.engine.kind, config.model.config["tie_word_embeddings"] = "deepspeed", tied
    config.parity.max_processes = 8
    assert run(config) == 0
    assert [row["passed"] for row in result(run_dir)["layouts"]] == [True] * len(OF_DEEPSPEED)


def norm_of_a_large_gradient() -> tuple[float, float]:
    parameter = torch.nn.Parameter(torch.zeros(1 << 22))
    parameter.grad = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    mesh = Mesh(layouts.ParallelLayout(1, 1, 1, 1, 1), device=torch.device("cpu"), timeout_s=60)
    return float(gradient_norm([parameter], mesh=mesh, dtype=torch.float32)), float(
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
    )


def test_the_norm_of_a_large_gradient_does_not_depend_on_how_it_is_cut():
    """torch's own fp32 norm of 2^22 numbers is 8e-5 off on the CPU, so a sharded one would
    differ from a whole one."""
    [(ours, exact)] = run_ranks(1, norm_of_a_large_gradient)
    assert ours == pytest.approx(exact, rel=1e-6)


# -- the whole table -----------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.slow), pytest.param("qwen3", marks=pytest.mark.table)]
)
def test_sixteen_layouts_up_to_eight_processes(run_dir, family):
    config = root(run_dir, family=family)
    config.model.config["num_hidden_layers"] = 8
    config.parity.max_processes = 8
    assert run(config) == 0
    rows = result(run_dir)["layouts"]
    assert len(rows) >= 16
    assert max(result(run_dir)["processes"].values()) == 8
    assert all(row["passed"] for row in rows)
