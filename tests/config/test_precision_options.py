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
    ],
)
def test_refused(words, refusal):
    with pytest.raises(UserError, match=f"(?s){refusal}"):
        checks.check(compose("train", [*ENOUGH, *words]))


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
