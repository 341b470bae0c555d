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


def test_a_degree_that_train_refuses_is_refused_in_its_words(capsys) -> None:
    lines = printed(capsys, "inspect.tp=3")
    assert lines["tensor parallelism"] == (
        "refused: 4 attention heads, 2 key/value heads and an MLP of 160 cannot be shared out evenly; "
        "possible: 1, 2, 4"
    )
    assert list(lines)[-2:] == ["tensor parallelism", "took"]
