"""Packed documents do not see each other: under every layout, with either attention, inside windows too."""

import dataclasses

import pytest
import torch

from hybridtrain.models.build import hf_config, plain_model
from hybridtrain.models.init import draw
from hybridtrain.types import IGNORE_INDEX, Batch
from tests.cases import Case, assert_parity, at_the_head, model, start
from tests.ranks import run_ranks

WINDOWED = model("mistral", sliding_window=5)


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


@dataclasses.dataclass(frozen=True)
class Packed(Case):
    """A case whose rows hold documents of 1 to 8 tokens, cut elsewhere in every row."""

    def batches(self, step: int, *, dp_rank: int, dp: int) -> list[Batch]:
        plain = super().batches(step, dp_rank=dp_rank, dp=dp)
        share = self.global_batch_size // dp
        out = []
        for number, batch in enumerate(plain):
            rows = range(
                dp_rank * share + number * self.micro_batch_size,
                dp_rank * share + (number + 1) * self.micro_batch_size,
            )
            places = torch.stack([positions(self.lengths(step, row)) for row in rows])
            labels = batch.labels_BT.clone()
            labels[:, :-1][places[:, 1:] == 0] = IGNORE_INDEX
            out.append(Batch(batch.input_ids_BT, labels, places, packed=True))
        return out

    def lengths(self, step: int, row: int) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * step + row)
        lengths: list[int] = []
        while (left := self.seq_len - sum(lengths)) > 0:
            lengths.append(min(left, int(torch.randint(1, 9, (), generator=generator))))
        return lengths


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("single", {}),
        ("single", {"micro_batch_size": 2, "fields": WINDOWED}),
        ("single", {"overrides": (("model.attention", "eager"),), "fields": WINDOWED}),
        (
            "single",
            {
                "overrides": (
                    ("recompute.kind", "selective"),
                    ("engine.compile", True),
                    ("engine.compile_backend", "aot_eager"),
                )
            },
        ),
        ("tp2", {"micro_batch_size": 2, "fields": WINDOWED}),
        ("pp2", {"micro_batch_size": 2}),
        ("dp_shard2-zero3", {"overrides": (("recompute.kind", "full"),)}),
        ("pp2-zbv_zero_bubble", {"fields": WINDOWED}),
        ("pp2-tp2-interleaved_1f1b", {}),
    ],
)
def test_every_layout_trains_packed_rows_as_the_plain_process_does(layout, options):
    """transformers finds the documents in the positions by itself; it shares no code with our mask."""
    assert_parity(Packed(layout, **options))


ROWS = ([3, 5, 1, 4, 3], [5, 2, 9])


def packed_rows(vocab: int) -> Batch:
    ids = torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(5))
    labels = torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(6))
    return Batch(ids, labels, torch.stack([positions(lengths) for lengths in ROWS]), packed=True)


def loss_of_packed_rows(case: Case) -> float:
    engine = start(case)
    rows = packed_rows(256)
    one = [rows.rows(r, r + 1) for r in range(2)]
    mine = one if engine.layout.dp == 1 else [one[engine.mesh.dp_rank]]
    return engine.eval_step(mine).values["loss"]


def loss_of_documents_alone(case: Case) -> float:
    """Each document in a batch of its own, through transformers' own model."""
    config = hf_config(case.fields, chosen={}, attention="sdpa")
    source = draw(config, seed=case.config().run.seed)
    plain = plain_model(config).eval()
    rows, total = packed_rows(256), 0.0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(
                source(name, tuple(parameter.shape), tuple(slice(0, size) for size in parameter.shape))
            )
        for row, lengths in enumerate(ROWS):
            for ids, labels in zip(
                rows.input_ids_BT[row].split(lengths), rows.labels_BT[row].split(lengths), strict=True
            ):
                logits = plain(input_ids=ids[None]).logits[0]
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "dp_shard2-zero3"])
def test_the_loss_of_packed_rows_is_that_of_their_documents_alone(layout):
    case = Case(layout, global_batch_size=2, micro_batch_size=1)
    alone = loss_of_documents_alone(case)
    for packed in run_ranks(case.world_size, loss_of_packed_rows, case):
        assert abs(packed - alone) / alone < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("fields", "reach"), [(model("llama"), 99), (model("mistral", sliding_window=3, num_hidden_layers=1), 3)]
)
def test_a_token_changes_its_own_document_alone(fields, reach, attention):
    lengths = [6, 1, 7, 2]
    places = positions(lengths)[None]
    document = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    before = at_the_head(fields, ids, places, attention=attention, packed=True)[0]
    assert torch.isfinite(before).all()
    for at in range(16):
        other = ids.clone()
        other[0, at] = (ids[0, at] + 1) % 256
        changed = (before != at_the_head(fields, other, places, attention=attention, packed=True)[0]).any(-1)[
            0
        ]
        assert changed.tolist() == [
            bool(document[place] == document[at]) and at <= place < at + reach for place in range(16)
        ]
