"""Dropout by the keys of rows: which elements are dropped, and that a layer is recomputed with the rows of
its own forward pass."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridtrain.analysis.facts import facts_of, places
from hybridtrain.config import schema
from hybridtrain.errors import UserError
from hybridtrain.models import dropout
from hybridtrain.models.build import hf_config
from hybridtrain.models.dropout import CannotKey, Dropouts, Rows, Site, Slot
from hybridtrain.models.init import draw, fill, reset_buffers
from hybridtrain.models.stage import Stage
from hybridtrain.parallel import recompute
from hybridtrain.reference import Reference
from hybridtrain.tasks.causal_lm import CausalLM
from hybridtrain.tasks.head import Head
from hybridtrain.types import IGNORE_INDEX
from tests.cases import GPT2, Case
from tests.sabotage.composition import rows_stay

KEYS_B = torch.tensor([3, -5])


def site(*, start: int = 0, length: int = 64, rank: int = 0, cut: bool = False, path: str = "mlp") -> Site:
    slot = Slot()
    slot.rows, slot.rank, slot.cut = Rows(KEYS_B, start, length), rank, (path,) if cut else ()
    return Site(path, slot)


def kept(found: Site, *shape: int, p: float = 0.25) -> Tensor:
    return found.drop(torch.ones(shape), p) != 0


def test_the_share_that_is_dropped_and_the_scale() -> None:
    for shape in ((2, 64, 512), (2, 8, 64, 64)):
        result = site().drop(torch.ones(shape, dtype=torch.float64), 0.25)
        assert set(result.unique().tolist()) == {0.0, 1 / 0.75}
        error = (0.25 * 0.75 / result.numel()) ** 0.5
        assert abs((result == 0).double().mean() - 0.25) < 4 * error
    with pytest.raises(CannotKey, match=r"mlp has the rate 1\.0"):
        kept(site(), 2, 64, 8, p=1.0)


def test_masks_of_other_rows_positions_channels_and_sites_have_nothing_in_common() -> None:
    one = kept(site(), 2, 64, 512, p=0.5).double() - 0.5
    others = {
        "rows": one.roll(1, 0),
        "positions": one.roll(1, 1),
        "channels": one.roll(1, 2),
        "a position for a channel": one[..., :64].transpose(1, 2).repeat(1, 1, 8),
        "sites": kept(site(path="attn"), 2, 64, 512, p=0.5).double() - 0.5,
    }
    for name, other in others.items():
        assert abs(float((one * other).mean()) * 4) < 5 / one.numel() ** 0.5, name


def test_a_part_of_rows_positions_channels_or_heads_has_its_part_of_the_mask() -> None:
    hidden, weights = kept(site(), 2, 64, 48), kept(site(), 2, 6, 64, 64)
    assert torch.equal(kept(site(start=16, length=8), 2, 8, 48), hidden[:, 16:24])
    assert torch.equal(kept(site(rank=1), 2, 32, 48), hidden[:, 32:])  # sequence parallelism
    assert torch.equal(kept(site(rank=1, cut=True), 2, 64, 24), hidden[..., 24:])
    assert torch.equal(kept(site(rank=1, cut=True), 2, 3, 64, 64), weights[:, 3:])
    assert torch.equal(kept(site(start=16, length=8), 2, 6, 8, 8), weights[:, :, 16:24, 16:24])
    assert torch.equal(kept(site(), 2, 64, 6, 8), hidden.view(2, 64, 6, 8))


def test_the_hash_is_that_of_splitmix64() -> None:
    """Runs that go on with a later version drop the same elements."""

    def mixed(x: int) -> int:
        x = (x * 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    def expected(row: int, position: int, channel: int) -> bool:
        of_position = mixed(int(KEYS_B[row]) + site().number + position)
        return (mixed(of_position + channel) + 2**63) % 2**64 >= round(0.25 * 2**64)

    found = kept(site(), 2, 64, 8)
    chosen = [(0, 0, 0), (0, 1, 5), (1, 0, 7), (1, 63, 3), (0, 40, 2), (1, 17, 1)]
    assert [bool(found[place]) for place in chosen] == [expected(*place) for place in chosen]
    assert {expected(1, place, 0) for place in range(8)} == {True, False}


@pytest.mark.parametrize("shape", [(3, 64, 8), (2, 60, 8), (128, 8), (2, 6, 60, 64)])
def test_a_tensor_without_rows_and_positions_is_not_dropped(shape: tuple[int, ...]) -> None:
    with pytest.raises(CannotKey, match="mlp has no rows and positions in"):
        kept(site(), *shape)


# -- a stage -------------------------------------------------------------------------------------------------


def stage_of(fields: dict[str, Any], *, kind: str, backend: str = "") -> Stage:
    config = hf_config(fields, chosen={}, attention="eager")
    head = partial(Head, task=CausalLM(), loss_chunk=0)
    stage = Stage(config, layers=range(2), first=True, last=True, head=head)
    recompute.apply_recompute(stage, kind=kind, split_backward=False, compiled=bool(backend))
    if backend:
        recompute.apply_compile(stage, backend=backend)
    stage.to_empty(device="cpu")
    stage.tie()
    reset_buffers(stage, device=torch.device("cpu"))
    fill([stage], draw(config, seed=0))
    return stage


def gradients(*, kind: str, backend: str = "") -> Tensor:
    """Of two micro-batches, the second of which is in its forward pass before the first is in its backward
    pass, as in a pipeline."""
    stage = stage_of({**GPT2, "n_layer": 2}, kind=kind, backend=backend)
    batches = Case(fields=GPT2).batches(0, dp_rank=0, dp=1)[:2]
    for loss in [stage(batch.input_ids_BT, batch=batch).sum() for batch in batches]:
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in stage.parameters()])


@pytest.fixture(scope="module")
def whole() -> Tensor:
    """Without recomputation."""
    return gradients(kind="none")


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_a_layer_is_recomputed_with_its_own_rows(kind: str, whole: Tensor) -> None:
    torch.testing.assert_close(gradients(kind=kind), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("full", "aot_eager"),
        pytest.param(
            *("selective", "inductor"),
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU"),
        ),
    ],
)
def test_compiled_layers_drop_the_same(kind: str, backend: str, whole: Tensor) -> None:
    torch.testing.assert_close(gradients(kind=kind, backend=backend), whole, rtol=1e-4, atol=1e-5)


def test_recomputation_with_the_rows_in_the_forward_pass_is_noticed(
    whole: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: nothing remembers a layer's rows."""
    monkeypatch.setattr(dropout.Recomputation, "__enter__", lambda self: None)  # noqa: ARG005
    monkeypatch.setattr(dropout.Recomputation, "__exit__", lambda self, *error: None)  # noqa: ARG005
    with pytest.raises(CannotKey, match="outside of a forward pass"):
        gradients(kind="full")

    monkeypatch.setattr(Dropouts, "of", rows_stay(Dropouts.of))
    off = (gradients(kind="full") - whole).norm() / whole.norm()
    assert off > 0.01, "what would be silently wrong if rows stayed after the forward pass"


def test_it_acts_in_training_alone() -> None:
    batch = Case(fields=GPT2).batches(0, dp_rank=0, dp=1)[0]
    stage = stage_of({**GPT2, "n_layer": 2}, kind="none")
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    without = stage_of({**GPT2, "n_layer": 2, **off}, kind="none")
    with torch.no_grad():
        trained, expected = (each(batch.input_ids_BT, batch=batch) for each in (stage, without))
        assert torch.equal(stage.eval()(batch.input_ids_BT, batch=batch), expected)
        assert not torch.equal(trained, expected)
        assert torch.equal(stage.train()(batch.input_ids_BT, batch=batch), trained)
    assert without.dropouts.slots == []


def test_packed_documents_drop_by_their_place_in_the_row() -> None:
    """In the plain process, too, in which each of them is a row."""
    fields, case = {**GPT2, "n_layer": 2}, Case(fields=GPT2)
    places = torch.cat([torch.arange(7), torch.arange(9)]).repeat(2, 1)
    batch = dataclasses.replace(case.batches(0, dp_rank=0, dp=1)[0], position_ids_BT=places, packed=True)
    config = hf_config(fields, chosen={}, attention="eager")
    options = case.config()
    plain = Reference(
        config,
        source=draw(config, seed=0),
        settings=options.optim,
        precision=options.precision,
        seed=0,
        adapters=schema.AdaptersConfig(),
        freeze=(),
        task=CausalLM(),
    )
    with torch.no_grad():
        loss = stage_of(fields, kind="none")(batch.input_ids_BT, batch=batch).sum()
    count = int((batch.labels_BT != IGNORE_INDEX).sum())
    assert plain.step([batch], lr=0.0).loss == pytest.approx(float(loss) / count, rel=1e-6)


def test_rows_without_keys_are_not_trained_on() -> None:
    batch = dataclasses.replace(Case(fields=GPT2).batches(0, dp_rank=0, dp=1)[0], keys_B=None)
    with pytest.raises(CannotKey, match=r"transformer\.drop is called outside of a forward pass of rows"):
        stage_of({**GPT2, "n_layer": 2}, kind="none")(batch.input_ids_BT, batch=batch)


# -- what is said of it --------------------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
KERNEL = "random numbers of an attention kernel would differ between layouts"
OWN = "random numbers that the model's own code draws would differ between layouts"


def model_config(attention: str, **fields: Any) -> schema.ModelConfig:
    return schema.ModelConfig(config=fields, attention=attention)


def test_what_is_in_force() -> None:
    found = facts_of(model_config("eager", **GPT2, summary_first_dropout=0.1)).dropped
    assert found == {"transformer.drop": 0.1, "attn": 0.1, "attn.resid_dropout": 0.1, "mlp.dropout": 0.1}
    assert places({"a": 0.1, "b": 0.2, "c": 0.1}) == "0.1 in a, c; 0.2 in b"
    llama = {"model_type": "llama", **SMALL, "intermediate_size": 96, "attention_dropout": 0.2}
    assert facts_of(model_config("eager", **llama)).dropped == {"self_attn": 0.2}


@pytest.mark.parametrize(
    ("attention", "fields", "words", "instead"),
    [
        ("sdpa", GPT2, f"attn_pdrop=0.1: {KERNEL}", "model.attention=eager"),
        (
            "sdpa",
            {"model_type": "llama", **SMALL, "intermediate_size": 96, "attention_dropout": 0.1},
            f"attention_dropout=0.1: {KERNEL}",
            "model.attention=eager",
        ),
        (
            "eager",
            {"model_type": "opt", **SMALL, "ffn_dim": 96, "dropout": 0.0, "layerdrop": 0.1},
            f"layerdrop=0.1: {OWN}",
            "model.config.layerdrop=0",
        ),
        pytest.param(
            "eager",
            {"model_type": "opt", **SMALL, "ffn_dim": 96, "dropout": 0.1},
            f"dropout=0.1: {OWN}",
            "model.config.dropout=0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "eager",
            {"model_type": "mixtral", **SMALL, "intermediate_size": 96, "router_jitter_noise": 0.1},
            f"router_jitter_noise=0.1: {OWN}",
            "model.config.router_jitter_noise=0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "eager",
            {"model_type": "xlnet", "n_layer": 2, "d_model": 64, "n_head": 4, "vocab_size": 256},
            "transformer.dropout has no rows and positions",
            "model.config.dropout=0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_would_depend_on_the_layout_is_refused_by_name(
    attention: str, fields: dict[str, Any], words: str, instead: str
) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as refused:
        facts_of(model_config(attention, **fields))
    assert instead in str(refused.value)
