"""Energy counters, read from folders as the kernel writes them."""

from pathlib import Path

import pytest

from hybridtrain.runtime import energy


def zone(folder: Path, name: str, count: int, *, most: int = 999_999) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{count}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_begin_again(tmp_path: Path) -> None:
    one, two = (zone(tmp_path / f"intel-rapl:{n}", f"package-{n}", 100_000) for n in (0, 1))
    inner = zone(tmp_path / "intel-rapl:0:0", "core", 5)
    whole = zone(tmp_path / "intel-rapl:2", "psys", 7)
    found = energy.counter(tmp_path, gpus=[])
    assert found is not None
    assert found.name == "RAPL, 2 CPU packages"
    before = found.read()
    one.write_text("600000\n")
    two.write_text("50000\n")  # past its range, 1 J
    for counted_by_a_package in (inner, whole):
        counted_by_a_package.write_text("900000\n")
    assert found.joules(before, found.read()) == pytest.approx(0.5 + 0.95)


def test_a_machine_without_a_counter(tmp_path: Path) -> None:
    assert energy.counter(tmp_path / "none", gpus=[]) is None
    zone(tmp_path / "intel-rapl:0", "package-0", 0).write_text("")  # as for users who may not read it
    assert energy.counter(tmp_path, gpus=[]) is None
    assert energy.counter(tmp_path, gpus=["0-0"]) is None  # no GPU has this UUID, or there is no pynvml
