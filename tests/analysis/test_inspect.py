"""What `hybridtrain inspect` prints."""

from __future__ import annotations

import pytest

from hybridtrain.cli.main import main


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """{label: value}, as the columns of the output have it."""
    assert main(["inspect", "model=tiny", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("analysis")]
    width = len("data parallelism, ZeRO") + 2
    return {line[:width].strip(): line[width:] for line in lines}


def test_labels_and_values_are_two_columns(capsys) -> None:
    lines = printed(capsys)
    assert lines["data parallelism, ZeRO"] == lines["along the sequence"] == "exact"
    assert lines["tensor parallelism"] == "exact, 2 ranks cut 100% of the layers' matrix products"
