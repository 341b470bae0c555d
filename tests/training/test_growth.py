"""A batch that grows with the step: rows of the global batch (ramp) and their length (warm-up), under
every kind of layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hybridtrain as ht
from hybridtrain.data.rows import Block
from hybridtrain.tasks.causal_lm import CausalLM
from tests.ranks import run_ranks
from tests.runs import assert_equal_state, rows

VOCAB, SEQ = 64, 32
GROWING = [
    "batch.ramp_start=4",
    "batch.ramp_increment=4",
    "batch.ramp_steps=4",
    "batch.seq_len_start=8",
    "batch.seq_len_steps=6",
]
SIZES, LENGTHS = [4, 4, 8, 8, 12, 12, 12, 12], [8, 8, 8, 16, 16, 16, 32, 32]


class Numbers:
    """Rows that count on, each from another number and in another stride."""

    fingerprint = "numbers"

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int) -> np.ndarray:
        return (np.arange(SEQ + 1) * (1 + index % 5) + index * index) % VOCAB


def trained(run: Path, words: list[str]) -> str:
    """On each rank: eight steps, or a refusal."""
    given = [
        f"run.dir={run}",
        "model=tiny",
        f"model.config.vocab_size={VOCAB}",
        f"data.seq_len={SEQ}",
        "batch.global_batch_size=12",
        "batch.micro_batch_size=1",
    ]
    config = ht.compose(
        *given,
        "train.steps=8",
        "train.log_every=1",
        "train.eval_every=3",
        "schedule=constant",
        "optim.lr=0.001",  # at 0.01 the eighth norm of one process is 1.8e-3 from that in fp64
        *words,
    )
    try:
        return ht.Trainer(config, data=Numbers(500), eval_data=Numbers(12)).fit().status
    except ht.UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(1, trained, run, GROWING) == ["finished"]
    return run


def test_tokens_are_counted_as_the_batch_grows(alone: Path) -> None:
    assert [line["tokens_seen"] for line in rows(alone)] == [
        SEQ * sum(SIZES[: step + 1]) for step in range(8)
    ]
    assert rows(alone)[-1]["loss"] < rows(alone)[0]["loss"]


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel=pp2"],
        pytest.param(["parallel=tp2", "parallel.sequence_parallel=true"], marks=pytest.mark.slow),
        pytest.param(["parallel=zero3"], marks=pytest.mark.slow),
        pytest.param(
            ["parallel=pp2", "parallel.schedule=interleaved_1f1b", "model.config.num_hidden_layers=4"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["parallel=pp2", "parallel.schedule=zbv_zero_bubble", "model.config.num_hidden_layers=4"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_layout_sees_the_same_growing_batch(alone: Path, tmp_path: Path, layout: list[str]) -> None:
    control = alone
    if "model.config" in layout[-1]:
        control = tmp_path / "control"
        assert run_ranks(1, trained, control, [*GROWING, layout[-1]]) == ["finished"]
    assert run_ranks(2, trained, tmp_path / "run", [*GROWING, *layout]) == ["finished"] * 2
    for here, there in zip(rows(tmp_path / "run"), rows(control), strict=True):
        assert (here["step"], here["tokens_seen"]) == (there["step"], there["tokens_seen"])
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
        assert here.get("eval_loss", 0.0) == pytest.approx(there.get("eval_loss", 0.0), rel=1e-5)


@pytest.mark.slow
def test_a_run_that_stops_on_the_way_goes_on_bit_for_bit(alone: Path, tmp_path: Path) -> None:
    for steps in (3, 8):
        assert run_ranks(1, trained, tmp_path / "run", [*GROWING, f"train.steps={steps}"]) == ["finished"]
    assert [line["loss"] for line in rows(tmp_path / "run")] == [line["loss"] for line in rows(alone)]
    assert_equal_state(tmp_path / "run/checkpoints/step-00000008", alone / "checkpoints/step-00000008")
    [refused] = run_ranks(1, trained, tmp_path / "run", ["train.steps=10"])
    assert "it holds another run: batch.ramp_increment was 4 and is 0" in refused


@pytest.mark.slow
def test_the_plain_process_sees_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ht.compose(
        "model=tiny",
        f"data.seq_len={SEQ}",
        "batch.global_batch_size=12",
        "batch.micro_batch_size=1",
        *GROWING,
    )
    done = ht.parity(config, layouts=["tp2", "pp2", "dp_shard2-zero3"], steps=7)
    assert done.passed, capsys.readouterr().out


def test_pieces_of_a_row_have_all_its_targets_and_restart_positions() -> None:
    tokens = np.arange(2 * 9).reshape(2, 9)
    begins = np.zeros((2, 9), dtype=bool)
    begins[0, [0, 3]] = begins[1, [0, 4]] = True
    whole, cut = (
        CausalLM().collate(block, valid=len(block.tokens))
        for block in (Block(tokens, begins, None), Block(tokens, begins, None).cut(2))
    )
    assert cut.input_ids_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [9, 10, 11, 12], [13, 14, 15, 16]]
    assert cut.labels_BT.flatten().tolist() == whole.labels_BT.flatten().tolist()
    assert cut.position_ids_BT.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert whole.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["engine=deepspeed", "parallel=single"],
            "batch.ramp_start=4: engine=deepspeed has one size of batch",
        ),
        (
            [
                "engine=deepspeed",
                "parallel=single",
                *(f"batch.ramp_{name}=0" for name in ("start", "increment", "steps")),
            ],
            "batch.seq_len_start=8: engine=deepspeed has one size of batch",
        ),
        (
            ["task=classification", "model.labels=[a,b]"],
            "batch.seq_len_start=8: task=classification: a piece of a row lacks what comes before it",
        ),
    ],
)
def test_what_a_growing_batch_does_not_go_with_is_refused(
    tmp_path: Path, words: list[str], message: str
) -> None:
    [refused] = run_ranks(1, trained, tmp_path / "run", [*GROWING, *words])
    assert message in refused
    assert not (tmp_path / "run").exists()
