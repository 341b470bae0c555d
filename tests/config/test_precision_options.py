"""Options of precision that do not go together, and those of runs of earlier versions."""

import pytest

from hybridtrain.config import checks
from hybridtrain.config.compose import compose, read_run, to_yaml
from hybridtrain.errors import UserError
from hybridtrain.run import identity

ENOUGH = ["data.path=x", "model=tiny", "train.steps=100"]


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["precision.state=4bit"], r"precision\.state=4bit.*allowed: auto, fp32, bf16, 8bit"),
        (
            ["precision=bf16_pure", "precision.rounding=up"],
            r"rounding=up.*kahan, stochastic, nearest",
        ),
        (
            ["precision.rounding=nearest"],
            r"rounding=nearest: precision\.kind=fp32 has master weights",
        ),
        (["precision=bf16_mixed", "precision.rounding=stochastic"], r"try:     precision=bf16_pure"),
        (["engine=deepspeed", "precision.state=8bit"], r"precision\.state=8bit: engine=deepspeed keeps"),
        (
            ["engine=deepspeed", "precision=qat_int4"],
            r"precision\.compute=qat_int4: not with engine=deepspeed",
        ),
        (
            ["adapters=lora", "model.from_pretrained=x", "precision=qat_int8"],
            r"precision\.compute=qat_int8: adapters are merged into the weights before these are quantised",
        ),
        (
            ["precision=qat_int4", "precision.adaptive=true", "precision.ladder=[qat_int4,bf16]"],
            r"precision\.ladder=.*qat_int4 is what the weights are to be stored in",
        ),
    ],
)
def test_refused(words, refusal):
    with pytest.raises(UserError, match=f"(?s){refusal}"):
        checks.check(compose("train", [*ENOUGH, *words]))


ADAPTIVE = ["precision.adaptive=true", "precision.monitor_every=10"]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["precision.ladder=[bf16,fp8_tensorwise]"], "precision.ladder=[fp8_tensorwise,bf16]"),
        (
            ["precision.compute=bf16", "precision.ladder=[bf16,fp8_tensorwise]"],
            "precision.ladder=[fp8_tensorwise,bf16] precision.compute=fp8_tensorwise",
        ),
        (["precision.ladder=[bf16,mxfp8]"], "precision.ladder=[fp8_tensorwise,bf16]"),
        (
            ["precision=fp16_mixed", "precision.ladder=[fp8_tensorwise]"],
            "precision.ladder=[fp8_tensorwise,fp16]",
        ),
        (["precision.ladder=[fp8,bf16]"], "precision.ladder=[fp8_tensorwise,bf16]"),
        (["precision.ladder=[fp8_tensorwise,bf16,fp32]"], "precision.kind=fp32"),
        (["precision=fp32", "precision.ladder=[tf32,fp32]", "precision.kind=tf32"], "precision.kind=fp32"),
    ],
)
def test_a_ladder_that_is_advised_is_taken(words, advice):
    lowest = "tf32" if "tf32" in words[-1] else "fp8_tensorwise"
    command = [*ENOUGH, "precision=bf16_mixed", *ADAPTIVE, f"precision.compute={lowest}", *words]
    with pytest.raises(UserError) as error:
        checks.check(compose("train", command))
    assert str(error.value).endswith(f"try:     {advice}")
    checks.check(compose("train", [*command, *advice.split()]))


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["precision.compute=fp8"], "precision.compute=fp8_tensorwise"),
        (["precision.compute=fp32"], "precision.kind=fp32"),
        (["precision.rules=[{match: '*', compute: fp8}]"], "compute: fp8_tensorwise inside the rule"),
        (
            ["precision.rules=[{match: '*', compute: fp32}]"],
            "precision.kind=fp32 precision.compute=bf16, with this rule",
        ),
    ],
)
def test_a_format_that_does_not_fit_is_answered_where_it_is_written(words, advice):
    with pytest.raises(UserError) as error:
        checks.check(compose("train", [*ENOUGH, "precision=bf16_mixed", *words]))
    assert str(error.value).endswith(f"try:     {advice}")


@pytest.mark.parametrize("state", ["auto", "fp32", "bf16", "8bit"])
@pytest.mark.parametrize("kind", ["fp32", "bf16_mixed", "bf16_pure", "fp16_mixed"])
def test_every_format_goes_with_every_recipe(kind, state):
    checks.check(compose("train", [*ENOUGH, f"precision={kind}", f"precision.state={state}"]))


@pytest.mark.parametrize(("kind", "rounding"), [("bf16_pure", "nearest"), ("bf16_mixed", "kahan")])
def test_a_run_of_an_earlier_version_rounded_to_nearest(kind, rounding, tmp_path):
    text = to_yaml(compose("train", [*ENOUGH, f"precision={kind}"]))
    earlier = "".join(
        line for line in text.splitlines(keepends=True) if not line.startswith(("  rounding:", "  state:"))
    )
    assert earlier != text
    (tmp_path / "config.yaml").write_text(earlier)
    read = read_run(tmp_path / "config.yaml")
    assert (read.precision.rounding, read.precision.state) == (rounding, "auto")
    checks.check(read)


@pytest.mark.parametrize(
    ("words", "rounding"),
    [
        ([], "nearest"),
        (["precision.rounding=kahan"], "kahan"),
        (["precision.rounding=stochastic"], "stochastic"),
        (["precision=bf16_mixed"], "kahan"),
        (["optim.lr=1"], "kahan"),  # another run
    ],
)
def test_such_a_run_goes_on_as_before_unless_the_command_says_otherwise(words, rounding, tmp_path):
    command = [*ENOUGH, "precision=bf16_pure", f"run.dir={tmp_path}"]
    lines = to_yaml(compose("train", command)).splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(line for line in lines if "  rounding:" not in line))
    config = identity.with_earlier_values(compose("train", [*command, *words]))
    assert config.precision.rounding == rounding
