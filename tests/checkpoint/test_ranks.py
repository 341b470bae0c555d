"""Saving and loading over gloo ranks: other layouts, other keys per rank, asynchronous writing,
kills and full disks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hybridtrain.checkpoint import sharded
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.schema import CheckpointConfig
from hybridtrain.errors import UserError
from hybridtrain.types import Progress
from tests.ranks import run_ranks

# pytest puts back what the module turns off
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PROGRESS = Progress(7, 700, {"model": "m", "data": "d"})


class Net(nn.Module):
    """Odd sizes on purpose: 7 rows over 2 data ranks and 10 over 2 x 2 give parts of different length, and
    an empty one over 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.embed(ids))))


def build(shard: int, tp: int) -> Net:
    # on purpose different everywhere: only the checkpoint can make them equal
    torch.manual_seed(dist.get_rank())
    net = Net()
    mesh = init_device_mesh("cpu", (shard, tp), mesh_dim_names=("dp_shard", "tp"))
    if tp > 1:
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if shard > 1:
        fully_shard(net, mesh=mesh["dp_shard"])
    return net


def expected() -> dict[str, torch.Tensor]:
    """Whole values of every key, known without a checkpoint."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in Net().named_parameters()}
    values = {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values |= {
        f"optim.{name}.exp_avg": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    return values | {"optim.up.weight.step": torch.tensor(7.0), "scaler.scale": torch.tensor(65536.0)}


def tensors_of(net: Net) -> dict[str, torch.Tensor]:
    """The flat mapping of this rank: parameters, an optimizer state laid out like them, plain tensors."""
    tensors: dict[str, torch.Tensor] = {f"model.{name}": p.data for name, p in net.named_parameters()}
    tensors |= {f"optim.{name}.exp_avg": torch.zeros_like(p) for name, p in net.named_parameters()}
    return tensors | {"optim.up.weight.step": torch.tensor(0.0), "scaler.scale": torch.tensor(0.0)}


def fill(tensors: dict[str, torch.Tensor]) -> None:
    """Put the expected values into this rank's parts without using a checkpoint."""
    for key, value in expected().items():
        if isinstance(tensors[key], DTensor):
            index = torch.arange(value.numel()).reshape(value.shape)
            mine = whole_like(tensors[key], index)
            tensors[key].to_local().copy_(value.flatten()[mine.long()])
        else:
            tensors[key].copy_(value)


def whole_like(part: DTensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, laid out like `part`: found by gathering the ranks' own
    numbering of their elements."""
    world = dist.get_world_size()
    marked = DTensor.from_local(
        torch.full_like(part.to_local(), float(dist.get_rank())),
        part.device_mesh,
        part.placements,
        shape=part.shape,
        stride=part.stride(),
        run_check=False,
    )
    owner = marked.full_tensor()
    assert set(owner.flatten().tolist()) <= set(map(float, range(world)))
    return whole[owner == dist.get_rank()].reshape(part.to_local().shape)


def save_and_wait(tensors: dict[str, torch.Tensor], path: Path, *, asynchronous: bool = True) -> None:
    sharded.save(
        tensors, path=path, progress=PROGRESS, group=dist.new_group(backend="gloo"), asynchronous=asynchronous
    ).result()


def rank_saves_layout(path: Path, shard: int, tp: int) -> str:
    tensors = tensors_of(build(shard, tp))
    fill(tensors)
    save_and_wait(tensors, path)
    return str(
        {
            type(placement).__name__
            for tensor in tensors.values()
            if isinstance(tensor, DTensor)
            for placement in tensor.placements
        }
    )


def rank_loads_layout(path: Path, shard: int, tp: int) -> None:
    tensors = tensors_of(build(shard, tp))
    assert sharded.load(tensors, path=path, group=dist.new_group(backend="gloo")) == PROGRESS
    for key, value in expected().items():
        got = tensors[key]
        assert torch.equal(got.full_tensor() if isinstance(got, DTensor) else got, value), key


def test_a_checkpoint_of_one_layout_loads_bit_for_bit_under_others(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    placements = run_ranks(4, rank_saves_layout, path, 2, 2)
    assert "_StridedShard" in placements[0]
    run_ranks(4, rank_loads_layout, path, 2, 2)
    run_ranks(4, rank_loads_layout, path, 4, 1)
    run_ranks(2, rank_loads_layout, path, 1, 2)
    alone = {key: torch.zeros_like(value) for key, value in expected().items()}
    sharded.load(alone, path=path, group=None)
    assert all(torch.equal(alone[key], value) for key, value in expected().items())


def test_one_process_writes_what_many_read(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    sharded.save(expected(), path=path, progress=PROGRESS, group=None, asynchronous=False).result()
    run_ranks(4, rank_loads_layout, path, 2, 2)


def rank_with_own_keys(path: Path) -> None:
    rank, group = dist.get_rank(), dist.new_group(backend="gloo")
    mine = {f"model.layers.{rank}.weight": torch.full((3,), float(rank)), "scaler.scale": torch.tensor(8.0)}
    sharded.save(mine, path=path, progress=PROGRESS, group=group, asynchronous=True).result()
    other = {f"model.layers.{1 - rank}.weight": torch.zeros(3), "scaler.scale": torch.tensor(0.0)}
    sharded.load(other, path=path, group=group)
    assert other[f"model.layers.{1 - rank}.weight"].tolist() == [1.0 - rank] * 3
    assert other["scaler.scale"] == 8


def test_ranks_with_different_keys_make_one_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    run_ranks(2, rank_with_own_keys, path)
    assert sharded.stored_keys(path) == {"model.layers.0.weight", "model.layers.1.weight", "scaler.scale"}


def rank_loads_less(path: Path) -> str:
    key = f"model.layers.{dist.get_rank()}.weight"
    with pytest.raises(UserError) as refused:
        sharded.load({key: torch.zeros(3)}, path=path, group=dist.new_group(backend="gloo"))
    return str(refused.value)


def test_a_checkpoint_with_more_layers_than_all_ranks_have_is_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    sharded.save(
        {f"model.layers.{i}.weight": torch.ones(3) for i in range(3)},
        path=path,
        progress=PROGRESS,
        group=None,
        asynchronous=False,
    ).result()
    messages = run_ranks(2, rank_loads_less, path)
    assert messages[0] == messages[1]
    assert "another model" in messages[0]
    assert "layers.2" in messages[0]


def rank_mutates_meanwhile(path: Path) -> bool:
    tensors = tensors_of(build(2, 1))
    fill(tensors)
    big = torch.arange(4_000_000.0)  # long enough on its way to disk that the changes below meet it there
    saving = sharded.save(
        {**tensors, "optim.big": big},
        path=path,
        progress=PROGRESS,
        group=dist.new_group(backend="gloo"),
        asynchronous=True,
    )
    for tensor in [*tensors.values(), big]:
        tensor.add_(1.0)
    met = not saving.poll()
    for _ in range(20):
        dist.all_reduce(torch.ones(1))  # training's own collectives go on meanwhile
    saving.result()
    return met


def test_an_asynchronous_save_holds_the_values_of_its_call(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    assert any(run_ranks(2, rank_mutates_meanwhile, path)), "the save was over before anything changed"
    loaded = {
        **{key: torch.zeros_like(value) for key, value in expected().items()},
        "optim.big": torch.zeros(4_000_000),
    }
    sharded.load(loaded, path=path, group=None)
    assert all(torch.equal(loaded[key], value) for key, value in expected().items())
    assert torch.equal(loaded["optim.big"], torch.arange(4_000_000.0))


def rank_with_full_disk(folder: Path, limited: int) -> tuple[str, str]:
    group = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    small = {f"model.{rank}": torch.ones(10)}
    sharded.save(small, path=folder / "step-1", progress=PROGRESS, group=group, asynchronous=True).result()
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    saving = sharded.save(
        {f"model.{rank}": torch.ones(100_000)},
        path=folder / "step-2",
        progress=PROGRESS,
        group=group,
        asynchronous=True,
    )
    with pytest.raises(UserError) as by_result:
        saving.result()
    with pytest.raises(UserError) as by_poll:
        saving.poll()
    dist.barrier()
    sharded.load(small, path=folder / "step-1", group=group)
    return str(by_result.value), str(by_poll.value)


@pytest.mark.parametrize("limited", [0, 1])
def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_the_last_checkpoint(
    tmp_path: Path, limited: int
) -> None:
    messages = run_ranks(2, rank_with_full_disk, tmp_path, limited)
    assert len({message for pair in messages for message in pair}) == 1
    assert f"rank {limited} could not write it" in messages[0][0]
    assert "File too large" in messages[0][0]
    assert sorted(os.listdir(tmp_path)) == ["step-1"]


def rank_meets_damage(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        sharded.load(
            {f"model.{dist.get_rank()}": torch.zeros(5)}, path=path, group=dist.new_group(backend="gloo")
        )
    return str(refused.value)


def test_damage_found_by_one_rank_is_told_on_all(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    run_ranks(2, rank_with_own_keys, path)
    file = path / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    messages = run_ranks(2, rank_meets_damage, path)
    assert messages[0] == messages[1]
    assert "damaged: __1_0.distcp" in messages[0]


SAVES_FOREVER = """
import sys, torch
from pathlib import Path
from hybridtrain.checkpoint import sharded
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.schema import CheckpointConfig
from hybridtrain.types import Progress
folder, step = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    tensors = {f"model.{i}": torch.full((200_000,), float(step)) for i in range(8)}
    path = folder / f"step-{step:08d}"
    progress = Progress(step, step, {})
    sharded.save(tensors, path=path, progress=progress, group=None, asynchronous=True).result()
    print(step, flush=True)
    step += 1
"""


def test_kill_9_during_a_save_leaves_the_last_complete_checkpoint(tmp_path: Path) -> None:
    manager = Manager(tmp_path, settings=CheckpointConfig(keep_last=1))
    told, hit = 0, 0
    for attempt in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOREVER, str(tmp_path), str(told + 1)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        told = int(process.stdout.readline())
        _wait_for_partial(tmp_path, delay=0.008 * attempt)
        process.send_signal(signal.SIGKILL)
        told = max([told, *map(int, process.stdout.read().split())])
        process.wait()
        hit += any(tmp_path.glob("*.partial"))
        latest = manager.latest()
        assert latest is not None
        step = int(latest.name.removeprefix("step-"))
        assert step in (told, told + 1)  # it may have been completed and not told yet
        loaded = {f"model.{i}": torch.zeros(200_000) for i in range(8)}
        assert sharded.load(loaded, path=latest, group=None).step == step
        assert all((tensor == step).all() for tensor in loaded.values())
        told = step
        manager.prune()
        assert manager.latest() == latest
    assert hit, "no kill met a save; the test did not test anything"


def _wait_for_partial(folder: Path, *, delay: float) -> None:
    deadline = time.monotonic() + 20
    while not any(folder.glob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
