"""The arithmetic that finds the first non-finite number, on tensors by hand. Whole runs: tests/training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridtrain.parallel.watch import Call
from hybridtrain.plan.formats import FORMATS
from hybridtrain.precision.provenance import Found, Origin, Recorder, Row, Sign, origin
from hybridtrain.precision.qlinear import Product, convert

GOOD = torch.ones(2, 3, 4)
BAD = GOOD.clone()
BAD[1, 2, 0] = torch.inf
WHOLE = nn.Linear(4, 4)
BROKEN = nn.Linear(4, 4)
BROKEN.weight.data[0, 0] = torch.nan


def recorder() -> Recorder:
    """Of micro-batches of 2 rows of 3 positions."""
    return Recorder([(2, 3)] * 4)


def call(name: str, *, order: int, stage: int = 0, micro_batch: int = 0, module: nn.Module = WHOLE) -> Call:
    return Call(stage, micro_batch, order, name, module)


def sign_of(steps: list[tuple[Call, Tensor, Tensor]]) -> Sign:
    """The sign of calls with their inputs and outputs."""
    record = recorder()
    for place, given, result in steps:
        record.forward(place, [given], [result])
    sign = record.sign()
    assert sign is not None
    return sign


def test_the_first_call_of_the_first_micro_batch_is_named() -> None:
    """Not the first that was recorded: schedules interleave micro-batches and stages."""
    sign = sign_of(
        [
            (call("c", order=0, stage=1, micro_batch=1), GOOD, BAD),
            (call("b", order=0, stage=1), BAD, BAD),
            (call("a1", order=1), GOOD, BAD),
            (call("a0", order=0), GOOD, GOOD),
        ]
    )
    assert (sign.module, sign.kind, sign.before, sign.rows, sign.size) == ("a1", "output", "a0", (1,), 2)
    assert sign.amax == 1.0


def test_a_weight_and_what_lies_between_modules_are_told_apart() -> None:
    sign = sign_of([(call("a", order=0, module=BROKEN), GOOD, BAD)])
    assert sign.kind == "weight"
    sign = sign_of([(call("a", order=0), GOOD, GOOD), (call("b", order=1), BAD, BAD)])
    assert (sign.kind, sign.module, sign.before) == ("input", "b", "a")


def test_in_the_backward_pass_the_last_call_comes_first() -> None:
    record, a, b = recorder(), call("a", order=0), call("b", order=1)
    for each in (a, b):
        record.forward(each, [GOOD], [GOOD])
    record.output_gradient(b, GOOD)
    record.input_gradient(b, BAD)
    record.output_gradient(a, BAD)
    record.input_gradient(a, BAD)
    sign = record.sign()
    assert sign is not None
    assert (sign.kind, sign.module, sign.rows, sign.order) == ("gradient", "b", (1,), (1, 0, 0, -1))


def test_a_parameter_alone_may_have_a_bad_gradient() -> None:
    record, a = recorder(), call("a", order=0)
    record.forward(a, [GOOD], [GOOD])
    record.output_gradient(a, GOOD)
    record.input_gradient(a, GOOD)
    record.parameter_gradient(a, torch.full((4, 4), torch.nan))
    sign = record.sign()
    assert sign is not None
    assert (sign.kind, sign.rows) == ("parameter", ())


def test_rows_are_found_in_tokens_of_all_rows_too() -> None:
    sign = sign_of([(call("expert", order=0), GOOD.flatten(0, 1), BAD.flatten(0, 1))])
    assert sign.rows == (1,)
    sign = sign_of([(call("expert", order=0), GOOD.flatten(0, 1)[:5], BAD.flatten(0, 1)[1:])])
    assert sign.rows == ()


def test_the_loss_names_the_rows_whose_own_loss_is_bad() -> None:
    record, head = recorder(), call("lm_head", order=0)
    record.forward(head, [GOOD], [torch.tensor([torch.nan])])
    record.row_losses(head, torch.tensor([[1.0], [torch.nan]]))
    sign = record.sign()
    assert sign is not None
    assert (sign.kind, sign.rows) == ("loss", (1,))


def test_without_a_bad_number_there_is_no_sign() -> None:
    record = recorder()
    assert record.sign() is None
    record.forward(call("a", order=0, module=BROKEN), [GOOD], [GOOD])  # a weight that nothing used
    assert record.sign() is None


def found(kind: str, rank: int, *, micro_batch: int = 0, stage: int = 0, order: int = 0) -> Found:
    sign = Sign(kind, micro_batch, stage, order, f"m{order}", "m", (0,), 2, 1.0, torch.float16, "")
    return Found(sign, rank, {"tp": rank}, (Row("corpus", 7, (3, 4)),))


def where(*signs: Found) -> list[int]:
    return [each.rank for each in origin(signs, again=True, exact=True).found]


def test_of_all_ranks_the_earliest_is_the_origin_and_ties_are_all_named() -> None:
    assert where(found("output", 0, order=2), found("output", 1, order=1)) == [1]
    assert where(found("output", 0, stage=1), found("output", 1, order=9)) == [1]
    assert where(found("output", 0, micro_batch=1), found("output", 1, stage=1)) == [1]
    assert where(found("gradient", 0), found("output", 1, micro_batch=3, stage=1)) == [1]
    assert where(found("gradient", 0, stage=0), found("gradient", 1, stage=1)) == [1]
    assert where(found("gradient", 0, order=1), found("gradient", 1, order=2)) == [1]
    assert where(found("output", 0), found("output", 1)) == [0, 1]
    assert where(found("output", 0), found("weight", 1)) == [1]


def test_the_words_of_a_finding() -> None:
    text = Origin((found("output", 0), found("output", 1)), again=True, exact=True).text
    assert text == (
        "m0: its output is not finite, its inputs are; micro-batch 0, rank 0 (tp 0), rank 1 (tp 1); "
        "row 7 of corpus (documents 3 to 4); last finite m; largest finite input 1, float16 ends at 65504"
    )
    assert Origin((), again=True, exact=True).text.startswith("no module shows it")
    assert Origin((), again=False, exact=False).text == (
        "it did not come again when the step was repeated (in a replay one update later)"
    )


def test_the_advice_fits_the_finding() -> None:
    def advice(kind: str) -> str:
        return Origin((found(kind, 0),), again=True, exact=True).advice

    assert "an earlier checkpoint" in advice("weight")
    assert advice("output").startswith("look at these rows")
    assert "bf16_mixed" in advice("output")
    assert "of a static one a lower precision.static_scale, or precision.static_scale=null" in advice(
        "gradient"
    )
    assert "else a lower precision.min_scale" in advice("gradient")


def test_a_product_in_fp16_that_overflows_is_told_from_its_bf16_output() -> None:
    layer = nn.Linear(4, 4)
    convert(layer, Product(FORMATS["fp16"], cut="", ranks=None, native=False))
    sign = sign_of([(call("model.layers.0.up_proj", order=0, module=layer), GOOD.bfloat16(), BAD.bfloat16())])
    assert (sign.dtype, sign.format) == (torch.float16, "fp16")
    found = origin([Found(sign, 0, {}, ())], again=True, exact=True)
    assert "float16 ends at 65504" in found.text
    assert "{match: 'model.layers.0.up_proj', compute: high}" in found.advice
    assert "bf16_mixed" not in found.advice
