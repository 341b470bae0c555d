"""Names of schemes, and what a matrix takes."""

import pytest

from hybridtrain.errors import UserError
from hybridtrain.quantize import schemes
from tests.runs import four_parts


def parse(text: str) -> schemes.Scheme:
    return schemes.parse(text, field="quantize.scheme")


def test_what_a_name_says() -> None:
    scheme = parse("int4-gptq-g64-affine-bias-lr8")
    assert (scheme.codes, scheme.bits, scheme.share, scheme.group) == ("int", 4, "group", 64)
    assert (scheme.gptq, scheme.affine, scheme.bias, scheme.rank) == (True, True, True, 8)
    assert parse("int8").share == "row"
    assert parse("int8-tensor").share == "tensor"
    assert parse("int4-row").group == 0
    assert [parse(f"fp8_e4m3{word}").inputs for word in ("", "-a8", "-a8s", "-a8s_minmax")] == [
        "",
        "token",
        "mse",
        "minmax",
    ]
    assert [parse(text).calibrates for text in ("int8-a8", "int8-a8s", "int4-gptq", "int4-bias", "nf4")] == [
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5", "no codes are named 'int5'"),
        ("int4-wide", "no form is named 'wide'"),
        ("nf4-affine", "nf4 has no 'affine'"),
        ("bf16-gptq", "bf16 has no 'gptq'"),
        ("nvfp4-g32", "nvfp4 has no 'g32'"),
        ("int4-g32-row", "'row' sets group again"),
        ("int4-a8", "inputs of 4 bits"),
        ("", "no codes are named ''"),
    ],
)
def test_names_that_are_none(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert words in four_parts(str(caught.value), "quantize.scheme")


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("bf16", 16),
        ("int8", 8 + 16 / 64),
        ("int8-tensor", 8 + 16 / (32 * 64)),
        ("int4-g32", 4.5),
        ("int4-g32-affine", 4 + 20 / 32),
        ("int3-g64", 3.25),
        ("nvfp4", 4.5 + 32 / (32 * 64)),
        ("mxfp4", 4.25),
        ("nf4", 4.25),
        ("codebook3", 3 + 16 / 64 + 8 * 16 / (32 * 64)),
        ("int8-bias-lr2", 8 + 16 / 64 + (16 * 2 * 96 + 16 * 32) / (32 * 64)),
    ],
)
def test_bits_of_a_weight(text: str, bits: float) -> None:
    assert parse(text).stored_bits(32, 64) == pytest.approx(bits * 32 * 64)


def test_matrices_that_do_not_fit() -> None:
    sizes = {"outputs": 32, "inputs": 96, "path": "layers.0.up", "field": "quantize.scheme"}
    schemes.check_shape(parse("int4-g32"), **sizes)
    for text, words in (
        ("nf4", "layers.0.up has rows of 96 weights, which are not whole groups of 64"),
        ("int4-g64", "groups of 16, 32"),
        ("int8-lr40", "layers.0.up is 32 x 96"),
    ):
        with pytest.raises(UserError) as caught:
            schemes.check_shape(parse(text), **sizes)
        assert words in four_parts(str(caught.value), "quantize.scheme")
