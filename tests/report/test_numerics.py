"""Heat maps of the numerics monitor, of small and of large models."""

import json
import math

import numpy as np
import pytest

from hybridtrain import report
from hybridtrain.config.schema import PrecisionConfig
from hybridtrain.precision.numerics import Sample, Statistics, Update, formats_of
from hybridtrain.report import heat_map, history, numerics, plots, single
from tests.report.folders import finished
from tests.report.test_report import drawn_in

INSIDE = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)


def statistics(top: int, lost: float, **changes) -> Statistics:
    """1000 numbers, of which a share is below what e4m3 can hold beside the others."""
    counts = [0] * 256
    counts[top], counts[top - 30] = 1000 - round(1000 * lost), round(1000 * lost)
    values = {"histogram": tuple(counts), "amax": 2.0 ** (top - 127), "rms": 2.0 ** (top - 129), "snr": 31.5}
    return Statistics(**values | changes)


def write(folder, *, layers: int, steps: int):
    """Samples of a model whose layer 1 underflows from half of the run on; at the end its head breaks."""
    modules = ["model.embed_tokens", *(f"model.layers.{n}.{name}" for n in range(layers) for name in INSIDE)]
    modules += ["model.norm", "lm_head"]
    with (folder / "numerics.jsonl").open("w") as stream:
        for number in range(steps):
            roles = {}
            for row, name in enumerate(modules):
                lost = 0.9 if name.startswith("model.layers.1.mlp") and number >= steps // 2 else 0.004
                x = statistics(120 + row % 9, lost)
                if name == "lm_head" and number == steps - 1:
                    x = statistics(120, 0.0, amax=math.inf, rms=None, histogram=(*[4] * 255, 3))
                roles[name] = {"x": x, "w": statistics(122, 0.0), "g": statistics(90, 0.001)}
            sample = Sample(
                50 * number + 1,
                1.0,
                False,
                formats_of(PrecisionConfig()),
                roles,
                {
                    "lm_head.weight": Update(1.0, 1e-3, 0.9, 0.1),
                    "lm_head.bias": Update(1.0, 1e-2, 0.5, 0.1),
                },
            )
            stream.write(json.dumps(sample.line()) + "\n")
        stream.write('{"step": 99')
    return folder


@pytest.mark.parametrize(("layers", "modules"), [(3, 30), pytest.param(33, 300, marks=pytest.mark.slow)])
def test_heat_maps(tmp_path, layers, modules):
    folder = write(finished(tmp_path / "demo"), layers=layers, steps=12)
    read = history.read(folder)
    assert read.numerics is not None
    assert len(read.numerics.modules) == modules
    assert not read.unread
    drawn = report.of_run(read)
    maps = {plot.name: plot for plot in drawn if plot.name in plots.MAPS}
    assert list(maps) == list(plots.MAPS)
    labels = [text.get_text() for text in maps["numerics"].figure.axes[0].get_yticklabels()]
    assert len(labels) <= heat_map.MOST_NAMES
    assert ("1.mlp.up_proj" in labels) == (modules == 30)
    assert ("layer 1" in labels) == (modules == 300)
    document = single.document(read, list(maps.values()))
    assert "model.layers.1.mlp.down_proj: underflow at most 90.00% (x, step 301)" in document
    assert "lm_head: underflow at most" in document
    assert "not finite or all zeros at step 551" in document
    assert document.count('name="numerics"') == len(plots.MAPS)  # tabs
    files = report.write(list(maps.values()), document, name="demo", out=tmp_path / "report")
    picture = next(file for file in files if file.name == "numerics.png")
    assert drawn_in(picture, plots.ALARM) > 5  # the broken cell


def test_what_is_lost_and_what_is_broken(tmp_path):
    found = history.read(write(finished(tmp_path / "demo"), layers=2, steps=4)).numerics
    row = found.modules.index("model.layers.1.mlp.up_proj")
    assert found.underflow[row].tolist() == pytest.approx([0.004, 0.004, 0.9, 0.9])
    assert found.broken.sum() == 1
    assert found.broken[found.modules.index("lm_head"), -1]
    head = found.modules.index("lm_head")
    assert (found.snr[head, 0], found.ratio[head, 0], found.realised[head, 0]) == (31.5, 1e-2, 0.5)
    assert np.isnan(found.ratio[row]).all()
    assert np.isinf(found.amax[found.modules.index("lm_head"), -1])


def test_many_samples_are_thinned_and_damaged_lines_counted(tmp_path):
    folder = write(finished(tmp_path / "demo"), layers=0, steps=500)
    found = history.read(folder).numerics
    assert len(found.steps) <= numerics.MOST_SAMPLES
    with (folder / "numerics.jsonl").open("w") as stream:
        stream.write('{"step": 1}\n[]\nnull\n{"step": 2, "modules": 7}\n')
    read = history.read(folder)
    assert read.numerics is None
    assert dict(read.unread) == {"numerics.jsonl": 4}
