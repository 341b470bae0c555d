"""`hybridtrain <command> [overrides]`: the console script. Imports torch only once the config is checked."""

from __future__ import annotations

import difflib
import io
import sys
from typing import NoReturn

from hybridtrain import __version__
from hybridtrain.cli.commands import COMMANDS, TAKES_RUN, run_command
from hybridtrain.runtime.launch import leave


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 success, 1 a failed check (parity,
    verify), 2 a UserError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8, and ASCII terminals
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"hybridtrain {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.3)
        problem = f"no command {command!r}\n  allowed: {', '.join(COMMANDS)}"
        suggestion = f"  try:     hybridtrain {near[0] if near else '--help'}"
        print(f"hybridtrain: {problem}\n{suggestion}", file=sys.stderr)
        return 2
    return run_command(command, rest)


def _help() -> str:
    lines = [
        "hybridtrain: hybrid-parallel training of Hugging Face language models",
        "",
        "usage: hybridtrain <command> [key=value ...]",
        "",
    ]
    for name, (_, _, does) in COMMANDS.items():
        lines.append(f"  {name + (' RUN' if name in TAKES_RUN else ''):<14}{does}")
    lines += [
        "",
        (
            "In several processes:  hybridtrain train --nproc N [key=value ...]   "
            "(or torchrun, srun, accelerate, deepspeed: -m hybridtrain.train)"
        ),
        "Options of a command:  hybridtrain <command> --help",
        "Show the full config:  hybridtrain <command> [key=value ...] --cfg job",
    ]
    return "\n".join(lines) + "\n"


def program() -> NoReturn:
    """`hybridtrain` in a shell."""
    leave(main())
