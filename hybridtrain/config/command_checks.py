"""Checks of the sections of other commands than train."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from hybridtrain.config import quantize, schema
from hybridtrain.config.section_checks import in_range, one_of, require
from hybridtrain.errors import install


def has_matplotlib() -> bool:
    """Whether matplotlib, which draws reports, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _quantize(options: schema.QuantizeConfig) -> None:
    e5m2 = not options.plan and options.scheme.partition("-")[0] == "fp8_e5m2"
    package, extra = ("torchao", "torchao") if e5m2 else ("compressed-tensors", "quantize")
    require(
        bool(importlib.util.find_spec(package.replace("-", "_")))
        or (not options.plan and options.scheme in ("bf16", "fp16")),
        "quantize.scheme",
        options.scheme,
        f"the package {package}, in whose format quantised layers are stored, is not installed here",
        allowed="bf16 and fp16 without it",
        instead=install(extra),
    )
    in_range(
        "quantize.budget",
        options.budget,
        lambda budget: budget > 0,
        allowed="above 0, up to 1",
        instead="0.01 for 1 %",
    )


def _compare(compare: schema.CompareConfig) -> None:
    for dtype in compare.dtypes:
        one_of("compare.dtypes", dtype, ("bfloat16", "float16", "float32", *quantize.AUTOCAST))
    require(
        bool(len(compare.sources) > 1 or compare.dtypes or compare.schemes or compare.as_trained),
        "compare.sources",
        compare.sources,
        "there is nothing to compare with the reference",
        allowed="two folders or more, dtypes, schemes, or compare.as_trained=true",
        instead="compare.schemes=[int8,int4-g32]",
    )
    require(
        not compare.out or not compare.out.endswith(".html"),
        "compare.out",
        compare.out,
        "the page has this name, and lies beside the JSON file",
        allowed="a JSON file",
        instead="compare.json",
    )


def _report(report: schema.ReportConfig) -> None:
    problem = "the package matplotlib, which draws reports, is not installed here"
    require(
        has_matplotlib(),
        "report",
        "matplotlib",
        problem,
        allowed="every other command without it",
        instead=install("report"),
    )
    problem = "one run alone cannot be compared"
    require(
        len(report.compare) != 1,
        "report.compare",
        report.compare,
        problem,
        allowed="two runs or more",
        instead="hybridtrain report RUN",
    )


def _generate(generate: schema.GenerateConfig) -> None:
    in_range(
        "generate.top_p",
        generate.top_p,
        lambda mass: 0 < mass <= 1,
        allowed="above 0, up to 1",
        instead="0.95",
    )
    both, problem = generate.prompts and generate.prompts_file, "generate.prompts_file is set too"
    require(
        not both,
        "generate.prompts",
        generate.prompts,
        problem,
        allowed="one of prompts and prompts_file",
        instead="one",
    )
    holds, problem = generate.chat or not generate.system, "a system message belongs to a chat"
    require(
        holds,
        "generate.system",
        generate.system,
        problem,
        allowed="with generate.chat=true",
        instead="generate.chat=true",
    )
    require(
        all(generate.stop),
        "generate.stop",
        generate.stop,
        "an empty text stops everything",
        allowed="texts of a character or more",
        instead="without ''",
    )


def check_bench(config: schema.BenchRoot) -> None:
    """Raise UserError for what bench does not time."""
    problem, instead = "bench times next-token prediction only", "task=causal_lm"
    require(
        config.task.kind == "causal_lm" and not config.model.labels,
        "task.kind",
        config.task.kind,
        problem,
        allowed="causal_lm",
        instead=instead,
    )
    problem, instead = "the plain loop that bench compares with trains with AdamW", "bench.plain=false"
    require(
        config.optim.kind == "adamw" or not config.bench.plain,
        "optim.kind",
        config.optim.kind,
        problem,
        allowed="adamw",
        instead=instead,
    )
    require(
        not config.bench.corpus or bool(config.data.path),
        "bench.corpus",
        "true",
        "data.path is empty",
        allowed="true with a folder of token files",
        instead="data.path=FOLDER, or bench.corpus=false for random tokens",
    )


RULES: dict[str, Callable[[Any], None]] = {
    "generate": _generate,
    "report": _report,
    "quantize": _quantize,
    "compare": _compare,
}
"""Section -> its check."""
