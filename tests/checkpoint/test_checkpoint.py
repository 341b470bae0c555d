"""Checkpoints in one process: what is noticed, what is refused, what is kept."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from hybridtrain.checkpoint import marker, metadata, sharded
from hybridtrain.checkpoint.manager import Manager
from hybridtrain.config.schema import CheckpointConfig
from hybridtrain.errors import UserError
from hybridtrain.types import Progress

# pytest puts back what the module turns off
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PROGRESS = Progress(3, 300, {"model": "abc"})


def values() -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.arange(24.0).reshape(4, 6),
        "model.half": torch.arange(5).to(torch.bfloat16),
        "model.empty": torch.zeros(0, 3),
        "optim.weight.step": torch.tensor(3.0),
        "optim.count": torch.tensor([2**40 + 1]),
    }


def zeros() -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(value) for key, value in values().items()}


def written(path: Path, *, progress: Progress = PROGRESS) -> Path:
    sharded.save(values(), path=path, progress=progress, group=None, asynchronous=False).result()
    return path


def reseal(path: Path) -> None:
    """Make the marker agree with the files again, as somebody who crafts a checkpoint would."""
    marker.write(
        path,
        progress=PROGRESS,
        files={name: marker.measure(path / name) for name in marker.read(path) if name.endswith(".distcp")},
    )


def refusal_of_load(path: Path, tensors: dict[str, torch.Tensor] | None = None) -> str:
    with pytest.raises(UserError) as refused:
        sharded.load(zeros() if tensors is None else tensors, path=path, group=None)
    return str(refused.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    path = tmp_path / "new" / "step-3"
    sharded.save(values(), path=path, progress=PROGRESS, group=None, asynchronous=asynchronous).result()
    loaded = zeros()
    assert sharded.load(loaded, path=path, group=None) == PROGRESS
    for key, value in values().items():
        assert torch.equal(loaded[key], value), key
    assert os.listdir(tmp_path / "new") == ["step-3"]
    assert sharded.stored_keys(path) == set(values())


def test_the_marker_lists_every_file(tmp_path: Path) -> None:
    path = written(tmp_path / "step-3")
    assert sorted([*marker.read(path), marker.MARKER]) == sorted(os.listdir(path))
    assert not re.search(rb"/tmp|" + re.escape(str(tmp_path).encode()), (path / ".metadata").read_bytes()), (
        "a path of this machine in the checkpoint"
    )


def test_a_stale_partial_folder_is_replaced(tmp_path: Path) -> None:
    stale = tmp_path / "step-3.partial"
    stale.mkdir()
    (stale / "__9_0.distcp").write_bytes(b"left by a crash")
    path = written(tmp_path / "step-3")
    assert "__9_0.distcp" not in os.listdir(path)
    assert os.listdir(tmp_path) == ["step-3"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    path = written(tmp_path / "step-3")
    sharded.save(
        {"model.weight": torch.ones(2)}, path=path, progress=PROGRESS, group=None, asynchronous=True
    ).result()
    assert sharded.stored_keys(path) == {"model.weight"}
    assert os.listdir(tmp_path) == ["step-3"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saving = sharded.save(
        values(), path=tmp_path / "file" / "step-3", progress=PROGRESS, group=None, asynchronous=True
    )
    with pytest.raises(UserError, match="rank 0 could not write it"):
        saving.result()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "progress.json"])
def test_damage_to_any_file_is_noticed_and_named(tmp_path: Path, name: str) -> None:
    def damage(path: Path, change: str) -> None:
        content = (path / name).read_bytes()
        if change == "missing":
            (path / name).unlink()
        elif change == "truncated":
            (path / name).write_bytes(content[:-1])
        else:
            (path / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])

    for change, words in (
        ("missing", "it is missing"),
        ("truncated", "bytes instead of"),
        ("flipped", "CRC32 differs"),
    ):
        path = written(tmp_path / change)
        damage(path, change)
        message = refusal_of_load(path)
        assert f"damaged: {name}: " in message
        assert words in message


def test_incomplete_and_absent_checkpoints_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "step-3")
    (path / marker.MARKER).unlink()
    assert "incomplete" in refusal_of_load(path)
    assert "no such folder" in refusal_of_load(tmp_path / "step-4")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 200_000,
        '{"format": 1, "files": {"x": {"size": 1e999, "crc32": "0"}}}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "files": {"../x": {"size": 1, "crc32": "0"}}}',
        '{"format": 9, "files": {}}',
    ],
)
def test_an_unreadable_marker_is_refused(tmp_path: Path, content: str) -> None:
    path = written(tmp_path / "step-3")
    (path / marker.MARKER).write_text(content)
    message = refusal_of_load(path)
    assert "complete.json" in message or "format 9" in message


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "step-3")
    assert "model.more" in refusal_of_load(path, {**zeros(), "model.more": torch.zeros(1)})
    assert "(4, 6) there and (6, 4) here" in refusal_of_load(
        path, {**zeros(), "model.weight": torch.zeros(6, 4)}
    )
    fewer = zeros()
    del fewer["model.half"]
    assert "also holds model.half" in refusal_of_load(path, fewer)
    weights_only = {key: value for key, value in zeros().items() if key.startswith("model.")}
    sharded.load(weights_only, path=path, group=None)
    assert torch.equal(weights_only["model.weight"], values()["model.weight"])


def test_anything_but_a_tensor_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="tensors only"):
        sharded.save({"step": 3}, path=tmp_path / "x", progress=PROGRESS, group=None, asynchronous=False)  # type: ignore[dict-item]


# --- nothing in a checkpoint runs ---------------------------------------------------------------------------


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_a_malicious_metadata_pickle_does_nothing(tmp_path: Path) -> None:
    path, victim = written(tmp_path / "step-3"), tmp_path / "victim"
    (path / ".metadata").write_bytes(pickle.dumps(Touch(victim)))
    reseal(path)
    assert "refused: it names posix.mkdir" in refusal_of_load(path)
    assert not victim.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert victim.exists(), "the pickle was harmless, so the test above showed nothing"


def test_a_pickle_hidden_deep_in_true_metadata_does_nothing(tmp_path: Path) -> None:
    path, victim = written(tmp_path / "step-3"), tmp_path / "victim"
    content = metadata.read(path)
    content.planner_data = [Touch(victim)]
    (path / ".metadata").write_bytes(pickle.dumps(content))
    reseal(path)
    assert "posix.mkdir" in refusal_of_load(path)
    assert not victim.exists()


def test_a_tensor_file_that_is_a_pickle_of_code_does_nothing(tmp_path: Path) -> None:
    path, victim = written(tmp_path / "step-3"), tmp_path / "victim"
    file = path / "__0_0.distcp"
    torch.save(Touch(victim), file)
    content = metadata.read(path)
    for info in content.storage_data.values():
        info.offset, info.length = 0, file.stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(content))
    reseal(path)
    assert "UnpicklingError" in refusal_of_load(path)
    assert not victim.exists()


def test_entries_of_bytes_are_refused_because_dcp_would_unpickle_them(tmp_path: Path) -> None:
    path = written(tmp_path / "step-3")
    dcp.save(
        {"model.weight": torch.ones(2), "extra": {"a": 1}},
        checkpoint_id=str(tmp_path / "plain"),
        no_dist=True,
    )
    assert isinstance(
        dcp.FileSystemReader(tmp_path / "plain").read_metadata().state_dict_metadata["extra.a"],
        BytesStorageMetadata,
    )
    for file in (tmp_path / "plain").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    reseal(path)
    assert "refused" in refusal_of_load(path, {"model.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    "case", ["outside", "bytes", "hole", "overlap", "nowhere", "transform", "lacking", "other"]
)
def test_metadata_that_is_well_formed_but_wrong_is_refused(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "step-3")
    content = metadata.read(path)
    if case == "outside":
        next(iter(content.storage_data.values())).relative_path = "../secret"
    elif case == "bytes":
        content.state_dict_metadata["model.weight"] = BytesStorageMetadata()
    elif case == "hole":
        content.state_dict_metadata["model.weight"].chunks[0].sizes = torch.Size([4, 5])  # type: ignore[union-attr]
    elif case == "overlap":  # the volumes add up: two rows twice, two rows never
        entry = content.state_dict_metadata["model.weight"]
        rows, columns = entry.size  # type: ignore[union-attr]
        half = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, columns])) for _ in range(rows)]
        entry.chunks = half  # type: ignore[union-attr]
    elif case == "nowhere":
        content.storage_data.clear()
    elif case == "transform":
        next(iter(content.storage_data.values())).transform_descriptors = ["zstd"]
    elif case == "lacking":
        del next(iter(content.storage_data.values())).relative_path
    else:
        content = torch.Size([1])  # type: ignore[assignment]
    (path / ".metadata").write_bytes(pickle.dumps(content))
    reseal(path)
    assert "damaged: .metadata: refused" in refusal_of_load(path)


def chunks(*boxes: tuple[tuple[int, ...], tuple[int, ...]], size: tuple[int, ...]) -> TensorStorageMetadata:
    parts = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    return TensorStorageMetadata(TensorProperties(), torch.Size(size), parts)


def test_chunks_cover_a_tensor_exactly_once_or_not() -> None:
    tiled = metadata._tiled
    assert tiled(chunks(((), ()), size=()))
    assert not tiled(chunks(((), ()), ((), ()), size=()))
    assert tiled(chunks(size=(0, 3)))
    assert tiled(chunks(((0, 0), (0, 3)), size=(0, 3)))
    assert tiled(chunks(((0, 0), (2, 3)), ((2, 0), (1, 2)), ((2, 2), (1, 1)), size=(3, 3)))
    assert not tiled(chunks(((0, 0), (2, 3)), ((1, 0), (1, 3)), size=(3, 3)))  # a row twice, a row never
    assert not tiled(chunks(((0, 0), (3, 2)), ((0, 2), (3, 2)), ((0, 1), (3, -1)), size=(3, 3)))
    assert not tiled(chunks(((-1, 0), (3, 3)), size=(3, 3)))
    assert not tiled(chunks(((0, 1), (3, 3)), size=(3, 3)))
    assert not tiled(chunks(((0,), (9,)), size=(3, 3)))
    generator = random.Random(0)
    for _ in range(200):  # a random tiling, and the same with one part moved onto another
        rows = sorted({0, 8, *generator.sample(range(1, 8), 3)})
        boxes = []
        for top, bottom in itertools.pairwise(rows):
            columns = sorted({0, 6, *generator.sample(range(1, 6), 2)})
            boxes += [
                ((top, left), (bottom - top, right - left)) for left, right in itertools.pairwise(columns)
            ]
        assert tiled(chunks(*boxes, size=(8, 6)))
        moved = generator.randrange(len(boxes))
        (top, left), sizes = boxes[moved]
        boxes[moved] = ((max(0, top - 1) if top else 1, left), sizes)
        assert not tiled(chunks(*boxes, size=(8, 6)))
    many = chunks(*(((row, 0), (1, 4)) for row in range(50_000)), size=(50_000, 4))
    began = time.process_time()
    assert tiled(many)
    assert time.process_time() - began < 5


def test_progress_that_is_no_position_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "step-3")
    for text in ('{"step": "soon"}', '{"step": 1e999, "tokens_seen": 0, "fingerprints": {}}', "[" * 200_000):
        (path / marker.PROGRESS).write_text(text)
        with pytest.raises(UserError, match=r"progress\.json"):
            marker.read_progress(path)


# --- which ones are kept ------------------------------------------------------------------------------------


def fake(manager: Manager, *steps: int) -> None:
    """Folders that count as complete; that real ones do is shown above."""
    for step in steps:
        manager.path(step).mkdir(parents=True)
        (manager.path(step) / marker.METADATA).write_bytes(b"")
        marker.write(manager.path(step), progress=Progress(step, 0, {}), files={})


def names(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_due_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    manager = Manager(tmp_path, settings=CheckpointConfig(every=10))
    assert [step for step in range(31) if manager.due(step, last=False)] == [10, 20, 30]
    assert manager.due(7, last=True)
    assert not any(
        Manager(tmp_path, settings=CheckpointConfig(every=0)).due(step, last=False) for step in range(5)
    )


def test_latest_passes_over_what_is_not_complete(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "none-yet", settings=CheckpointConfig())
    assert manager.latest() is None
    fake(manager, 9, 10, 100_000_000)
    assert manager.latest() == manager.path(100_000_000)
    (manager.path(100_000_000) / marker.MARKER).unlink()
    manager.path(200).mkdir()
    fake(manager, 300)
    manager.path(300).rename(manager.folder / "step-00000300.partial")
    assert manager.latest() == manager.path(10)
    assert manager.path(10).name == "step-00000010"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, 0, [40, 50]), (1, 20, [20, 40, 50]), (0, 0, [10, 20, 30, 40, 50]), (9, 0, [10, 20, 30, 40, 50])],
)
def test_pruning(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    manager = Manager(tmp_path, settings=CheckpointConfig(keep_last=keep_last, keep_every=keep_every))
    fake(manager, 10, 20, 30, 40, 50)
    manager.prune()
    assert names(tmp_path) == kept
    manager.prune()
    assert names(tmp_path) == kept


def test_an_incomplete_one_does_not_count_as_the_newest(tmp_path: Path) -> None:
    manager = Manager(tmp_path, settings=CheckpointConfig(keep_last=1))
    fake(manager, 10, 20)
    manager.path(30).mkdir()
    manager.prune()
    assert manager.latest() == manager.path(20)


def test_sweep_removes_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    manager = Manager(tmp_path, settings=CheckpointConfig())
    fake(manager, 10)
    for name in ("step-00000020.partial", "step-00000005.removed"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes").mkdir()
    manager.sweep()
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-00000010"]
