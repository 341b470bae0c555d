"""What `hybridtrain train` answers to command lines, from one process that is told rank and world size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

ANSWER = """
import contextlib, io, json, sys, time
began = time.monotonic()
from hybridtrain.cli import commands
from hybridtrain.runtime import launch
launch.RANK_0_FIRST_S = 0.0
import os
answers, rank = {}, os.environ["RANK"]
for name, world_size, argv in json.load(sys.stdin):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if world_size == 1:
            os.environ.pop(key, None)  # one process needs no launcher
    if world_size > 1:
        os.environ.update(WORLD_SIZE=str(world_size), RANK=rank, LOCAL_RANK=rank)
    start = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = commands.run_command("train", argv)
        except Exception as error:
            code = repr(error)
    answers[name] = dict(code=code, err=err.getvalue(), out=out.getvalue(), seconds=time.monotonic() - start)
    if "torch" in sys.modules:
        answers[name]["err"] += "IMPORTED TORCH"
        break
json.dump(answers, sys.stdout)
"""


def answers(cases: list[tuple[str, int, list[str]]], *, rank: int = 0) -> dict[str, dict[str, Any]]:
    """What `hybridtrain train` answers to each (name, world size, argv), by name, from one process that
    must not import torch."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-c", ANSWER],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def answer(argv: list[str], *, world_size: int = 1) -> str:
    """The refusal of one command line, in its four parts."""
    given = answers([("it", world_size, argv)])["it"]
    assert given["code"] == 2, given
    assert given["out"] == "", given
    return given["err"]
