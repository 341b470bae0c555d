"""`hybridtrain bench` on an NVIDIA GPU: both sides share it, and each one's memory is its own.

Run: pytest -m gpu tests/gpu
"""

import json

import pytest
import torch

from hybridtrain.cli import commands
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no NVIDIA GPU")]


def bench(argv: list[str]) -> int:
    return commands.run_command("bench", argv)


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_both_sides_do_the_same_work_in_memory_of_their_own(tmp_path, precision):
    out = tmp_path / "bench.json"
    argv = [
        "model=nano",
        "data.seq_len=128",
        f"precision={precision}",
        "bench.rounds=2",
        "bench.parts=true",
        f"bench.out={out}",
    ]
    assert run_ranks(1, bench, argv, backend="cpu:gloo,cuda:nccl") == [0]
    told = json.loads(out.read_text())
    for side in told["sides"].values():
        assert side["memory_gib_before"] == 0
        # weights, gradients and two moments in fp32, and activations
        assert 16 * told["model"]["parameters"] / 2**30 < side["memory_gib_max"] < 8
        assert len(side["rounds"]) == 2
        assert all(0 < step < 10 for steps in side["rounds"] for step in steps)
    assert all(part["seconds"] > 0 for parts in told["parts"].values() for part in parts[:5])
