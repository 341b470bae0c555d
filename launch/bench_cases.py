#!/usr/bin/env python3
"""One GPU, one process, one case after the other: ours, a plain PyTorch loop and the Hugging Face Trainer on
the same model and rows.

    python3 launch/bench_cases.py [--out runs/cases.jsonl] [--tiny | --warm] [case ...]    default: all CASES

A Llama of 1.1 billion parameters, bf16_mixed, rows of 2048 tokens, 16 rows a step. Each case is built, warmed
up (3 steps), timed by CUDA events (8 steps) and freed, so that no case shares memory with another. Needs
torch, transformers, accelerate and PyYAML; hydra and torchrun are not used. --tiny runs every case on a model
of a few thousand parameters, on a CPU too: it shows that the script works. --warm compiles what the cases
need on a model of two layers, and measures nothing: several such processes at once fill inductor's cache.
The cases named torchao need torchao.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import itertools
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402

from hybridtrain import engine as engines  # noqa: E402
from hybridtrain.analysis import facts as facts_module  # noqa: E402
from hybridtrain.bench import plain as plain_module  # noqa: E402
from hybridtrain.config import schema  # noqa: E402
from hybridtrain.data.synthetic import Synthetic  # noqa: E402
from hybridtrain.models import load  # noqa: E402
from hybridtrain.parallel import mesh  # noqa: E402
from hybridtrain.plan import flops as flops_module  # noqa: E402
from hybridtrain.plan import layout as layouts  # noqa: E402
from hybridtrain.plan import notation  # noqa: E402
from hybridtrain.plan.batch import plan_batch  # noqa: E402
from hybridtrain.tasks.causal_lm import CausalLM  # noqa: E402
from hybridtrain.training import metrics  # noqa: E402

CUDA = torch.cuda.is_available()
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
PACKED_TOKENS = 300  # documents of this length on average, lengths drawn


def model_fields(tiny: bool) -> dict[str, Any]:
    fields = yaml.safe_load((ROOT / "conf/model/llama_1_1b.yaml").read_text())["config"] | {
        "max_position_embeddings": 8192
    }
    return fields | TINY if tiny else fields


def draw_on_device(device: torch.device) -> Callable[..., Any]:
    """In place of initial weights drawn on the CPU: 1.1 billion numbers take 7 s there."""

    def draw(config: Any, *, seed: int) -> Any:
        def values(name: str, shape: tuple[int, ...], box: Any) -> torch.Tensor:
            if name.endswith(".bias") or "norm" in name:
                return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, device=device)[box]
            generator = torch.Generator(device=device).manual_seed(
                int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
            )
            return torch.randn(shape, generator=generator, device=device).mul_(config.initializer_range)[box]

        return values

    return draw


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed."""

    side: str = "ours"
    """ours, plain or trainer."""
    compiled: bool = False
    rows: int = 4
    """Rows of a micro-batch."""
    seq_len: int = 2048
    global_batch_size: int = 16
    recompute: str = "none"
    precision: str = "bf16_mixed"
    compute: str = ""
    """precision.compute: the format of linear layers; of the plain loop's by torchao."""
    packed: bool = False
    profiled: bool = False
    """Also: the kernels that take longest, where the host waits for the device, and how long the
    host needs for a step."""


CASES = {
    "compiled": Case(compiled=True, profiled=True),
    "plain-compiled": Case("plain", compiled=True),
    "eager": Case(),
    "plain": Case("plain"),
    "compiled-8-rows": Case(compiled=True, rows=8),
    "selective": Case(compiled=True, recompute="selective", rows=8),
    "full": Case(compiled=True, recompute="full", rows=8),
    "packed": Case(compiled=True, packed=True, profiled=True),
    "rows-of-4096": Case(compiled=True, rows=2, seq_len=4096, global_batch_size=8),
    "bf16-pure": Case(compiled=True, precision="bf16_pure"),
    "fp16": Case(compiled=True, precision="fp16_mixed"),
    "fp8-tensorwise": Case(compiled=True, compute="fp8_tensorwise", profiled=True),
    "fp8-rowwise": Case(compiled=True, compute="fp8_rowwise"),
    "fp8-tensorwise-4096": Case(
        compiled=True, compute="fp8_tensorwise", rows=2, seq_len=4096, global_batch_size=8
    ),
    "fp8-rowwise-4096": Case(compiled=True, compute="fp8_rowwise", rows=2, seq_len=4096, global_batch_size=8),
    "torchao-tensorwise": Case("plain", compiled=True, compute="fp8_tensorwise"),
    "torchao-rowwise": Case("plain", compiled=True, compute="fp8_rowwise"),
    "trainer": Case("trainer"),
    "trainer-compiled": Case("trainer", compiled=True),
}


def settings(case: Case, *, fields: dict[str, Any], tiny: bool) -> schema.BenchRoot:
    config = schema.BenchRoot()
    config.model.config = fields
    config.data.seq_len = 32 if tiny else case.seq_len
    config.batch = schema.BatchConfig(case.global_batch_size, case.rows)
    config.precision.kind, config.recompute.kind, config.optim.lr = case.precision, case.recompute, 1e-4
    config.precision.compute = case.compute
    config.engine.compile = case.compiled
    if tiny:
        config.engine.compile_backend = "eager"
    config.parallel = schema.ParallelConfig(**notation.parse("single"))
    return config


def batches_of(plan: Any, *, vocab: int, packed: bool) -> list[list[Any]]:
    """Four steps' micro-batches, in pinned memory where there is a GPU."""
    tokens = Synthetic(
        vocab=vocab, plan=plan, dp_rank=0, dp_size=1, seed=0, labels=0, head="", collate=CausalLM().collate
    )
    keep = (lambda tensor: tensor.contiguous().pin_memory()) if CUDA else (lambda tensor: tensor.contiguous())
    steps = []
    for step in range(4):
        done = []
        for batch in tokens.micro_batches(step):
            positions = batch.position_ids_BT
            if packed:
                starts = torch.rand(positions.shape, generator=torch.Generator().manual_seed(1)) < 1 / min(
                    PACKED_TOKENS, positions.shape[1] // 4
                )
                starts[:, 0] = True
                index = torch.arange(positions.shape[1]).expand_as(positions)
                positions = index - torch.where(starts, index, 0).cummax(1).values
            tensors = {
                "input_ids_BT": keep(batch.input_ids_BT),
                "labels_BT": keep(batch.labels_BT),
                "position_ids_BT": keep(positions),
            }
            done.append(dataclasses.replace(batch, **tensors, packed=packed))
        steps.append(done)
    return steps


def timed(step: Callable[[int], Any], count: int) -> list[float]:
    """Seconds of each step; on a GPU by events, so that nothing waits in between."""
    if not CUDA:
        marks = [time.perf_counter()]
        for number in range(count):
            step(number)
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for number in range(count):
        step(number)
        events[number + 1].record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def where_the_host_waits(step: Callable[[int], Any]) -> dict[str, Any]:
    """Lines at which a step waits for the device, and how long the host needs to launch one."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step(0)
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    began = time.perf_counter()
    step(0)
    host_s = time.perf_counter() - began
    torch.cuda.synchronize()
    waits = (warning for warning in seen if "called a synchronizing" in str(warning.message))
    return {
        "syncs": sorted({f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in waits}),
        "host_s": host_s,
    }


def kernels(step: Callable[[int], Any]) -> list[list[Any]]:
    """(name, calls, ms, share) of what takes longest by itself in a step."""
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if CUDA else []),
    ]
    with torch.profiler.profile(activities=activities) as profile:
        step(0)
        if CUDA:
            torch.cuda.synchronize()
    events = [
        event
        for event in profile.key_averages()
        if not CUDA or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    own = (lambda event: event.self_device_time_total) if CUDA else (lambda event: event.self_cpu_time_total)
    total = sum(map(own, events)) or 1
    return [
        [event.key[:90], event.count, round(own(event) / 1e3, 2), round(own(event) / total, 4)]
        for event in sorted(events, key=own, reverse=True)[:20]
    ]


def to_torchao(model: torch.nn.Module, *, recipe: str) -> None:
    """Convert all linear layers but the head to torchao's float8."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    settings = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(model, config=settings, module_filter_fn=lambda _, name: name != "lm_head")


def measure(case: Case, *, fields: dict[str, Any], tiny: bool, device: torch.device) -> dict[str, Any]:
    """One row: seconds a step, tokens/s, MFU, memory, first loss."""
    config = settings(case, fields=fields, tiny=tiny)
    layout = layouts.resolve(config.parallel, world_size=1)
    plan = plan_batch(config.batch, layout=layout, seq_len=config.data.seq_len)
    facts = facts_module.facts(fields)
    batches = batches_of(plan, vocab=facts.vocab, packed=case.packed)
    if case.side == "ours":
        engine = engines.build(config, layout=layout, plan=plan, device=device)
        step = lambda number: engine.train_step(batches[number % 4], lr=1e-4).loss  # noqa: E731
    else:
        loop = plain_module.PlainLoop(config, device=device)
        if case.compute:
            to_torchao(loop.model, recipe=case.compute.removeprefix("fp8_"))
        step = lambda number: loop.step(batches[number % 4])  # noqa: E731
    row: dict[str, Any] = {"loss": float(step(0))}
    for number in range(2):
        step(number)
    times = sorted(timed(step, 8))
    median = times[len(times) // 2]
    flops = flops_module.flops_per_token(facts, seq_len=plan.seq_len)
    # as others count it: not halved for causality
    whole_attention = flops + 6 * facts.layers * facts.heads * facts.head_dim * (plan.seq_len - 1)
    row |= {"step_s": median, "min_s": times[0], "max_s": times[-1], "tokens_per_s": plan.tokens / median}
    if CUDA:
        peak = metrics.peak_flops(device, dtype=torch.bfloat16)
        row |= (
            {
                "mfu": plan.tokens / median * flops / peak,
                "mfu_whole_attention": plan.tokens / median * whole_attention / peak,
            }
            if peak
            else {}
        )
        statistics = torch.cuda.memory_stats()
        row |= {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
        row |= {"allocator_retries": statistics["num_alloc_retries"]}
        if case.profiled:
            row |= where_the_host_waits(step)
    return row | ({"kernels": kernels(step)} if case.profiled else {})


def measure_trainer(case: Case, *, fields: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """The Hugging Face Trainer with its fused AdamW, on random rows."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    steps = 12
    known = {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(fields["model_type"], **known, use_cache=False)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    length = 32 if tiny else case.seq_len
    ids = torch.randint(
        0,
        config.vocab_size,
        (case.global_batch_size * steps, length),
        generator=torch.Generator().manual_seed(0),
    )
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if CUDA:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    Trainer(
        model=model,
        args=TrainingArguments(**_trainer_settings(case, steps=steps)),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[Clock()],
    ).train()
    laps = sorted(after - before for before, after in itertools.pairwise(marks[3:]))
    median = laps[len(laps) // 2]
    row = {
        "step_s": median,
        "min_s": laps[0],
        "max_s": laps[-1],
        "tokens_per_s": case.global_batch_size * length / median,
    }
    return row | (
        {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
        if CUDA
        else {}
    )


def _trainer_settings(case: Case, *, steps: int) -> dict[str, Any]:
    settings = {
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": case.global_batch_size // case.rows,
        "max_steps": steps,
        "bf16": True,
        "disable_tqdm": True,
    }
    settings |= {
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "report_to": [],
    }
    settings |= {
        "save_strategy": "no",
        "torch_compile": case.compiled,
        "use_cpu": not CUDA,
        "dataloader_pin_memory": CUDA,
        "output_dir": "/tmp/bench-trainer",
    }
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/cases.jsonl"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warm", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    device = mesh.device()
    mesh.connect(device, timeout_s=600)
    load.draw = draw_on_device(device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fields = model_fields(options.tiny)
    if options.warm:
        fields |= {"num_hidden_layers": 2}
    for name in options.cases or CASES:
        case, began = CASES[name], time.monotonic()
        torch._dynamo.reset()
        torch.set_float32_matmul_precision("highest")  # the Trainer leaves a choice of its own behind
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {
            "case": name,
            **dataclasses.asdict(case),
            "device": torch.cuda.get_device_name() if CUDA else "cpu",
            "torch": torch.__version__,
        }
        try:
            trainer = case.side == "trainer"
            row |= (
                measure_trainer(case, fields=fields, tiny=options.tiny)
                if trainer
                else measure(case, fields=fields, tiny=options.tiny, device=device)
            )
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        row["wall_s"] = round(time.monotonic() - began, 1)
        if not options.warm:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key != "kernels"}, flush=True)
        for kernel in row.get("kernels", [])[:12]:
            print("   ", *kernel, flush=True)
    mesh.disconnect()


if __name__ == "__main__":
    main()
