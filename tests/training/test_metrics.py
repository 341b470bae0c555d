"""Rates, FLOPs, memory, the record of metrics.jsonl and the progress line."""

import json
import math
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from hybridtrain.plan import flops, hardware
from hybridtrain.plan.batch import BatchPlan
from hybridtrain.training import metrics
from hybridtrain.training.callbacks import StepInfo
from hybridtrain.types import ModelFacts, StepResult
from tests.ranks import run_ranks

KEYS = [
    "step",
    "tokens_seen",
    "loss",
    "step_loss",
    "grad_norm",
    "lr",
    "loss_scale",
    "skipped",
    "tokens_per_s",
    "tokens_per_s_per_device",
    "step_time_s",
    "mfu",
    "max_memory_gib",
    "time",
]


def result(loss=2.5, grad_norm=0.75, skipped=0, empty=0, loss_scale=1.0) -> StepResult:
    return StepResult(
        loss=torch.tensor(loss),
        sums=torch.tensor([loss * 64]),
        counts=torch.tensor([0 if empty else 64]),
        grad_norm=torch.tensor(grad_norm),
        skipped=torch.tensor(skipped),
        empty=torch.tensor(empty),
        loss_scale=torch.tensor(loss_scale),
        next_scale=torch.tensor(loss_scale),
    )


def record(step: StepResult, *, number=7, lr=1e-3, totals=None, weights=None, **changes) -> dict:
    """The line of a step; of it alone unless `totals` says otherwise."""
    info = StepInfo(
        step=number, last=False, stopping=False, tokens_seen=1000 * number, lr=lr, result=step, flags={}
    )
    added = metrics.totals(step) if totals is None else torch.tensor(totals, dtype=torch.float64)
    return metrics.record(
        info, totals=added, weights=weights or {"loss": 1.0}, meter=meter(**changes), memory_gib=1.5
    )


def meter(**changes) -> metrics.Meter:
    settings = {
        "first_step": 0,
        "total_steps": 100,
        "plan": BatchPlan(1, 1000, 1, 1),
        "devices": 4,
        "flops_per_token": lambda length: 6e3 * length,
        "peak": 1e9,
    }
    return metrics.Meter(**settings | changes)


def facts_of(model) -> ModelFacts:
    c = model.config
    return ModelFacts(
        model_type=c.model_type,
        layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        ffn=c.intermediate_size,
        vocab=c.vocab_size,
        labels=(),
        tied=c.tie_word_embeddings,
        window=None,
        max_positions=c.max_position_embeddings,
        parameters=sum(p.numel() for p in model.parameters()),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_is_what_torch_counts(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    length = 48
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    facts = facts_of(model)
    # Eager attention computes all length x length products; ours counts the causal half and the diagonal.
    unmasked = 12 * facts.layers * facts.heads * facts.head_dim * (length - (length + 1) / 2)
    assert flops.flops_per_token(facts, seq_len=length) + unmasked == pytest.approx(
        counter.get_total_flops() / length, rel=5e-3
    )


def test_flops_of_a_window_are_a_count_of_visible_positions():
    facts = ModelFacts("mistral", 2, 64, 4, 2, 16, 160, 320, (), False, 5, 512, 100_000)
    seen = sum(min(t + 1, 5) for t in range(32)) / 32
    weights = 6 * (100_000 - 320 * 64)
    assert flops.flops_per_token(facts, seq_len=32) == pytest.approx(weights + 12 * 2 * 64 * seen)
    assert flops.flops_per_token(facts, seq_len=4) == pytest.approx(weights + 12 * 2 * 64 * 2.5)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", True, 312),
        ("NVIDIA A100 80GB PCIe", "float32", True, 156),
        ("NVIDIA A100-PCIE-40GB", "float32", False, 19.5),
        ("NVIDIA H100 80GB HBM3", "float16", True, 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", True, 756),
        ("NVIDIA H200", "bfloat16", True, 989.4),
        ("NVIDIA B200", "bfloat16", True, 2250),
        ("NVIDIA L40S", "bfloat16", True, 362),
        ("NVIDIA A10", "bfloat16", True, 125),
        ("NVIDIA A10G", "bfloat16", True, 70),
        ("NVIDIA GeForce RTX 4090", "bfloat16", True, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", True, None),
        ("NVIDIA GeForce GTX 1080", "float32", False, None),
        ("NVIDIA H100 80GB HBM3", "float64", False, None),
    ],
)
def test_peak_of(name, dtype, tf32, tflops):
    assert hardware.peak_of(name, dtype=dtype, tf32=tf32) == (tflops and tflops * 1e12)


def test_cpu_has_no_peak():
    assert metrics.peak_flops(torch.device("cpu"), dtype=torch.float32) is None


def test_memory_on_cpu_follows_what_is_allocated():
    before = metrics.max_memory_gib(torch.device("cpu"))
    # touches every page of more than the peak so far
    ballast = torch.ones(int((before + 0.125) * metrics.GIB) // 4)
    after = metrics.max_memory_gib(torch.device("cpu"))
    assert after - before > 0.12
    assert after < before + ballast.numel() * 4 / metrics.GIB + 0.5


def test_rates_leave_out_pauses():
    clock = meter()
    with clock.paused():
        time.sleep(0.4)
    time.sleep(0.1)
    rates = clock.measure(5)
    assert 0.02 <= rates.step_time_s < 0.06
    assert rates.tokens_per_s == pytest.approx(1000 / rates.step_time_s)
    assert rates.tokens_per_s_per_device == pytest.approx(rates.tokens_per_s / 4)
    assert rates.mfu == pytest.approx(rates.tokens_per_s_per_device * 6e6 / 1e9)
    assert clock.eta_s == pytest.approx(95 * rates.step_time_s)


def test_eta_averages_over_measurements_and_ends_at_zero():
    clock = meter(total_steps=4, peak=None)
    times = []
    for step, pause in ((1, 0.02), (2, 0.06), (3, 0.02)):
        time.sleep(pause)
        times.append(clock.measure(step).step_time_s)
    assert clock.eta_s == pytest.approx(sum(times) / 3)
    assert clock.measure(4).mfu is None
    assert clock.eta_s == 0


def test_record_has_the_keys_and_the_exact_loss():
    loss = torch.tensor(1 / 3)
    row = record(result(loss=1 / 3))
    assert list(row) == KEYS
    # over one step the mean is the step's own, to the last bit
    assert row["loss"] == row["step_loss"] == loss.item()
    assert (
        row["step"],
        row["tokens_seen"],
        row["grad_norm"],
        row["lr"],
        row["skipped"],
        row["loss_scale"],
    ) == (7, 7000, 0.75, 1e-3, 0, 1.0)
    assert abs(row["time"] - time.time()) < 5


def test_the_loss_of_a_line_is_the_mean_over_its_tokens():
    """100 tokens at 2.0 and 300 at 4.0; one update skipped, one step without a token."""
    row = record(result(loss=4.0), totals=[1400.0, 400.0, 1.0, 1.0, 1400.0, 400.0])
    assert (row["loss"], row["step_loss"], row["skipped"], row["steps_without_targets"]) == (3.5, 4.0, 1, 1)


def test_of_a_task_with_several_sums_a_line_has_the_mean_of_each():
    """Two steps: 10 and 30 targets of the first sum, 4 and none of the second, whose mean over the line is
    that of its 4; a third sum without any."""
    row = record(
        result(),
        totals=[110.0, 40.0, 0.0, 0.0, 110.0, 3.0, 0.0, 40.0, 4.0, 0.0],
        weights={"mlm": 1.0, "nsp": 0.5, "none": 1.0},
    )
    assert list(row) == [*KEYS, "train_mlm", "train_nsp", "train_none"]
    assert (row["loss"], row["train_mlm"], row["train_nsp"], row["train_none"]) == (3.125, 2.75, 0.75, None)


def test_the_allocator_is_one_of_gpus():
    assert metrics.allocator_stats(torch.device("cpu")) == {}


def test_record_writes_null_for_what_is_not_finite_or_unknown():
    bad = result(loss=math.nan, grad_norm=math.inf, skipped=1, loss_scale=32768.0)
    row = record(bad, peak=None)
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert row["mfu"] is None
    assert row["skipped"] == 1
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_steps_without_targets_have_no_loss_and_are_counted():
    row = record(result(loss=math.nan, grad_norm=0.0, empty=1), totals=[0.0, 0.0, 0.0, 2.0, 0.0, 0.0])
    assert list(row) == [*KEYS, "steps_without_targets"]
    assert (row["loss"], row["skipped"], row["steps_without_targets"]) == (None, 0, 2)
    assert (
        "| loss none | norm 0.000 | lr 1.0e-03 | 2 steps without a target, no update made |"
        in metrics.progress_line(row, total_steps=10, eta_s=1)
    )


def test_progress_line():
    row = {"step": 120, "loss": 3.42171, "grad_norm": 0.8711, "lr": 3e-4, "loss_scale": 1.0, "skipped": 0}
    row |= {"tokens_per_s": 41234.5, "mfu": 0.3812, "max_memory_gib": 12.3}
    line = metrics.progress_line(row, total_steps=2000, eta_s=192)
    assert line == (
        "step  120/2000 | loss 3.4217 | norm 0.871 | lr 3.0e-04 | "
        "41.2k tok/s | MFU 38.1% | 12.30 GiB | ETA 3m12s"
    )
    assert "| loss 3.4217 | eval 3.5000 | norm" in metrics.progress_line(
        {**row, "eval_loss": 3.5}, total_steps=2000, eta_s=192
    )
    row |= {"loss": None, "grad_norm": None, "skipped": 1, "loss_scale": 32768.0, "mfu": None}
    line = metrics.progress_line(row, total_steps=2000, eta_s=5)
    assert line == (
        "step  120/2000 | loss not finite | norm not finite | lr 3.0e-04 | "
        "skipped, loss scale 32768 | 41.2k tok/s | 12.30 GiB | ETA 5s"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4, "0"),
        (873, "873"),
        (999.7, "1.00k"),
        (41234, "41.2k"),
        (412345, "412k"),
        (1.05e6, "1.05M"),
        (2.5e9, "2.50G"),
    ],
)
def test_quantity(value, text):
    assert metrics.quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (192, "3m12s"), (18420, "5h07m"), (187300, "2d04h"), (-3600, "0s")],
)
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text


def largest() -> float:
    return metrics.max_over_ranks([1.25, 3.5][dist.get_rank()])


def test_max_over_ranks():
    assert run_ranks(2, largest) == [3.5, 3.5]
