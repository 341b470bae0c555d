"""Process-wide settings: exactness decides the fp32 kernels, threads are shared out, explicit options win."""

import subprocess
import sys

import pytest
import torch

from hybridtrain.config.checks import check
from hybridtrain.config.compose import compose
from hybridtrain.config.schema import EngineConfig
from hybridtrain.errors import UserError
from hybridtrain.runtime import cpu


def settings(*, environment, **options) -> list[str]:
    """threads, fp32 precision, relative error of a product: in a process of its own, with these
    options of `engine`."""
    program = (
        "import torch\n"
        "from hybridtrain.runtime import cpu\n"
        "from hybridtrain.config.schema import EngineConfig\n"
        f"cpu.apply(EngineConfig(**{options!r}), device=torch.device('cpu'), tf32=False)\n"
        "print(torch.get_num_threads(), torch.get_float32_matmul_precision(), cpu._product_error())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    return done.stdout.split()


def test_automatic_products_are_as_exact_as_fp32():
    _, precision, error = settings(environment={})
    assert float(error) < 2e-6  # tf32 has 3e-4, bf16 3e-3
    assert precision in ("highest", "medium")


@pytest.mark.parametrize(("tf32", "expected"), [(True, "high"), (False, "highest")])
def test_tf32_is_how_a_gpu_multiplies(tf32, expected):
    before = torch.get_float32_matmul_precision()
    try:
        cpu.apply(EngineConfig(), device=torch.device("cuda"), tf32=tf32)
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_named_precision_is_taken_as_it_is():
    _, precision, _ = settings(environment={}, fp32_matmul="highest")
    assert precision == "highest"


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "4096", "OMP_NUM_THREADS": "2"}, {}, 2),  # the user's
        ({"LOCAL_WORLD_SIZE": "4096", "OMP_NUM_THREADS": "1"}, {}, 1),  # never none
        ({"OMP_NUM_THREADS": "1"}, {}, 1),  # one process: torch's own choice
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, {"threads": 2}, 2),
    ],
)
def test_threads(environment, options, expected):
    threads, _, _ = settings(environment=environment, **options)
    assert int(threads) == expected


def test_torchruns_one_thread_is_not_taken_for_the_users_choice():
    alone, _, _ = settings(environment={})
    shared, _, _ = settings(environment={"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})
    assert int(shared) == max(1, int(alone) // 2)


def test_refusals():
    with pytest.raises(
        UserError, match=r"engine\.fp32_matmul=tf32.*\n  allowed: auto, highest, high, medium"
    ):
        check(compose("train", ["experiment=smoke", "engine.fp32_matmul=tf32"]))
    with pytest.raises(UserError, match=r"engine\.threads=-1"):
        check(compose("train", ["experiment=smoke", "engine.threads=-1"]))
