"""The page of `hybridtrain <command> --help`, generated from the docstrings of the schema and
the files in conf/.
"""

from __future__ import annotations

import textwrap

from hybridtrain.config import keys

EXAMPLES = {
    "train": "hybridtrain train --nproc 4 experiment=quickstart parallel=tp2_pp2 train.steps=100",
    "inspect": "hybridtrain inspect model=gemma2_2b",
    "prepare": "hybridtrain prepare data.source=[books/] data.path=data/books data.vocab_size=8192",
    "parity": "hybridtrain parity experiment=smoke parity.layouts=[tp2,pp2-dp_shard2-zero1]",
    "bench": "hybridtrain bench --nproc 2 experiment=smoke parallel=tp2 bench.rounds=15 bench.out=bench.json",
    "export": "hybridtrain export runs/quickstart export.dtype=bfloat16",
    "evaluate": "hybridtrain evaluate runs/quickstart",
    "quantize": "hybridtrain quantize runs/quickstart quantize.scheme=int4-g32-gptq",
    "compare": "hybridtrain compare runs/quickstart compare.schemes=[int8,int4-g32,int4-g32-gptq]",
    "generate": "hybridtrain generate runs/quickstart generate.prompt='import os'",
    "report": "hybridtrain report runs/quickstart",
    "submit": (
        "hybridtrain submit experiment=quickstart cluster=gpu8 "
        "cluster.nodes=2 parallel=zero3_tp2 batch.global_batch_size=16"
    ),
    "runs": "hybridtrain runs",
    "logs": "hybridtrain logs runs/quickstart",
    "verify": "hybridtrain verify runs/quickstart",
}
WIDTH = 118


def text(command: str, *, does: str, takes_run: bool) -> str:
    """The help page of `command`.

    `does`: its description; `takes_run`: whether a run directory may be an argument.
    """
    run = "RUN " if takes_run else ""
    lines = [
        f"hybridtrain {command}: {does}",
        "",
        f"usage:   hybridtrain {command} {run}[group=file ...] [section.option=value ...] [flags]",
        f"example: {EXAMPLES[command]}",
    ]
    if takes_run:
        lines.append("RUN is a run directory; `RUN` is short for `run.dir=RUN`.")
    if command == "report":
        lines.append("hybridtrain report --compare RUN RUN ... plots several runs together.")
    lines += [
        "",
        "flags",
        *_entry("--help", "this page"),
        *_entry("--cfg job", "print the composed config and stop"),
    ]
    lines += _entry("--config-dir DIR", "add your own folder of groups and experiments, laid out like conf/")
    if command in ("train", "bench"):
        lines += _entry(
            "--nproc N",
            (
                "run in N processes on this machine; "
                "auto: the product of the parallel degrees; a degree of -1 uses all GPUs"
            ),
        )
    how = "as one job array" if command == "submit" else "one after the other (not under torchrun)"
    lines += _entry("--multirun, -m", f"run every combination of comma-separated values, {how}")
    lines += ["", f"groups (group=file selects a file; those of hybridtrain are in {keys.conf_folder()})"]
    for group, names in keys.groups_of(command, keys.groups([keys.conf_folder()])).items():
        lines += _entry(group, ", ".join(names))
    for section, fields in keys.sections(command).items():
        lines += ["", f"{section}.*"]
        for field in fields:
            lines += _entry(field.key, f"{field.doc} [{field.type}, default {_default(field.default)}]")
    return "\n".join(lines) + "\n"


def _default(default: object) -> str:
    return {"": "''", "True": "true", "False": "false", "None": "null"}.get(str(default), str(default))


def _entry(name: str, words: str) -> list[str]:
    lines = textwrap.wrap(words, WIDTH - 30, break_on_hyphens=False)
    head = [f"  {name:<28}{lines[0]}"] if len(name) < 28 else [f"  {name}", " " * 30 + lines[0]]
    return head + [" " * 30 + line for line in lines[1:]]
