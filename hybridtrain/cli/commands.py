"""What every command has in common: command line -> config -> checks -> the function of the command.

`python -m hybridtrain.train` and `hybridtrain train` both call `run_command`. The functions are named by
strings and imported last, so that a mistake is reported before torch is imported.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hybridtrain.errors import LocalError, PossiblyLocalError, ReportedElsewhere, UserError, install, refusal
from hybridtrain.runtime import launch, log, spawn

if TYPE_CHECKING:
    from hybridtrain.config import schema

COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": (
        "hybridtrain.training.trainer",
        "run",
        "train a model under any parallel layout; resumes the run if its directory exists",
    ),
    "inspect": (
        "hybridtrain.analysis.inspect",
        "run",
        "show what a model is made of, and which parallelism it has been shown to work with",
    ),
    "prepare": ("hybridtrain.data.prepare.tokenize", "run", "turn text into token files"),
    "parity": (
        "hybridtrain.parity",
        "run",
        "check that layouts give the gradients and parameters of one plain process, on your own config",
    ),
    "bench": (
        "hybridtrain.bench",
        "run",
        "time training steps, and those of a plain PyTorch loop for comparison",
    ),
    "export": ("hybridtrain.export.hf", "run", "write a checkpoint as a Hugging Face folder"),
    "evaluate": ("hybridtrain.evaluate.perplexity", "run", "perplexity of an export on held-out rows"),
    "quantize": (
        "hybridtrain.quantize.write",
        "run",
        "write a model with quantised linear layers, which transformers and vLLM load",
    ),
    "compare": (
        "hybridtrain.quantize.compare",
        "run",
        "compare models, dtypes and quantisation schemes with a reference, on held-out rows",
    ),
    "generate": ("hybridtrain.evaluate.generate", "run", "sample from an export or a checkpoint"),
    "submit": (
        "hybridtrain.submit",
        "run",
        "queue a training run on a Slurm cluster; --dry-run shows the job, --multirun makes an array of runs",
    ),
    "runs": (
        "hybridtrain.submit.listing",
        "runs",
        "list runs: status, step, loss, speed, last checkpoint, job",
    ),
    "logs": ("hybridtrain.submit.listing", "logs", "print the log of a run and follow it"),
    "verify": (
        "hybridtrain.verify",
        "run",
        "read every byte of the checkpoints of a run, or of a corpus, and list what is damaged",
    ),
    "report": (
        "hybridtrain.report",
        "run",
        "write an HTML page and plots of a run; --compare RUN RUN ... plots several runs together",
    ),
}
TAKES_RUN = ("export", "evaluate", "compare", "quantize", "generate", "report", "logs", "verify")
LISTS = ("runs", "logs", "report")
"""Commands whose reader may close the pipe (`| head`)."""
_FLAGS = ("-h", "--help", "-m", "--multirun", "-c", "--cfg", "--compare", "--dry-run")
SEVERAL = ("train", "bench")
"""Commands that run in several processes: `python -m hybridtrain.<command>` on each."""
COLLECT_AFTER = 50_000
"""New objects between two garbage collections. With Python's default of 700, scanning the many objects that
imports create takes a fifth of the start time."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells: 128 + SIGINT."""


def run_command(command: str, argv: list[str]) -> int:
    """Run `command` with `argv` (overrides and flags) and return its exit code; 2 for a UserError,
    which rank 0 prints.
    """
    gc.set_threshold(COLLECT_AFTER)
    running = False
    try:
        if (refused := _check_launch(command)) is not None:
            return refused
        processes, argv = _take_nproc(command, launch.arguments(argv))
        config = _parse(command, argv)
        if isinstance(config, int):
            return config
        if processes:
            return spawn.start(f"hybridtrain.{command}", argv, processes=_process_count(processes, config))
        running = True
        log.setup(None)
        module, function, _ = COMMANDS[command]
        return getattr(
            importlib.import_module(module), "run_several" if isinstance(config, list) else function
        )(config)
    except UserError as error:
        known_everywhere = not running and not isinstance(error, PossiblyLocalError)
        return _report_error(
            f"hybridtrain {command}: {error}",
            known_everywhere=known_everywhere,
            at_once=isinstance(error, LocalError),
        )
    except BrokenPipeError:
        if command not in LISTS:
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the reader has gone: drop what is still buffered
        return 0
    except ReportedElsewhere as reported:
        time.sleep(launch.AFTER_RANK_0_S)
        return reported.code
    except KeyboardInterrupt:
        if log.rank() == 0:
            print(f"hybridtrain {command}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def _check_launch(command: str) -> int | None:
    """Check the working directory and the launcher's variables; returns an exit code, or
    None if they are right."""
    try:
        if command in SEVERAL:
            launch.begin()
        else:
            launch.check_directory()
            launch.adopt_srun()
    except UserError as error:
        return _report_error(
            f"hybridtrain {command}: {error}",
            known_everywhere=False,
            at_once=os.environ.get("SLURM_PROCID", "0") == "0",
        )
    return None


def _parse(command: str, argv: list[str]) -> schema.Root | list[schema.Root] | int:
    """The checked config (`submit --multirun`: a list), or an exit code if there is nothing left to do
    (--help, --cfg, a sweep).
    """
    if any(flag in argv for flag in ("-h", "--help")):
        from hybridtrain.cli import help as help_page

        return _print(help_page.text(command, does=COMMANDS[command][2], takes_run=command in TAKES_RUN))
    show, rest = _take_cfg(argv)
    rest = _with_runs(
        command,
        ["cluster.dry_run=true" if text == "--dry-run" and command == "submit" else text for text in rest],
    )
    from hybridtrain.config.compose import compose, to_yaml

    if any(flag in rest for flag in ("-m", "--multirun")):
        rest = [text for text in rest if text not in ("-m", "--multirun")]
        if command != "submit":
            return _multirun(command, rest)
        from hybridtrain.config import checks
        from hybridtrain.config.sweep import sweep

        configs = [compose(command, job) for job in sweep(command, rest)]
        checks.distinct_folders(configs)
        for config in configs:
            checks.check(config)
        return configs
    config = compose(command, rest)
    if show:
        return _print(to_yaml(config))
    from hybridtrain.config import checks

    checks.check(config)
    return config


def _report_error(text: str, *, known_everywhere: bool, at_once: bool) -> int:
    """Print an error once: rank 0 at once, another rank only if it is still alive later.

    Returns exit code 2.
    """
    launch.report_to_launcher(text)
    if log.rank() == 0:
        print(text, file=sys.stderr, flush=True)
        return 2
    if not at_once:
        time.sleep(launch.RANK_0_FIRST_S)
    if at_once or not known_everywhere:
        print(f"[rank {log.rank()}] {text}", file=sys.stderr, flush=True)
    return 2


def _print(text: str) -> int:
    if log.rank() == 0:
        print(text, end="")
    return 0


def _with_runs(command: str, argv: list[str]) -> list[str]:
    """`argv` with run directories written as options: run.dir=RUN, or report.compare=[RUN,...]."""
    from hybridtrain.config import words

    bare = [_is_run(command, text, before) for before, text in zip(["", *argv], argv, strict=False)]
    runs = [text for text, is_run in zip(argv, bare, strict=True) if is_run]
    rest = [text for text, is_run in zip(argv, bare, strict=True) if not is_run]
    if command == "report" and "--compare" in rest:
        if not runs:
            raise refusal(
                "--compare",
                "(nothing)",
                "no runs to compare",
                allowed="two run directories or more",
                instead="--compare runs/a runs/b",
            )
        return [
            f"report.compare=[{','.join(map(words.literal, runs))}]",
            *(text for text in rest if text != "--compare"),
        ]
    if command == "compare":
        first = [f"run.dir={words.literal(run)}" for run in runs[:1]]
        return [*first, *([f"compare.sources=[{','.join(map(words.literal, runs))}]"] if runs else []), *rest]
    if len(runs) > 1:
        several = (
            "hybridtrain report --compare " + " ".join(runs)
            if command == "report"
            else f"hybridtrain {command} {runs[0]}"
        )
        raise refusal(
            "argument",
            runs[1],
            f"a second run beside {runs[0]}",
            allowed="one run directory",
            instead=several,
        )
    return [f"run.dir={words.literal(run)}" for run in runs] + rest


def _is_run(command: str, text: str, before: str) -> bool:
    """Whether an argument is a run directory: a path, or any existing folder, unless the
    argument sets an option.
    """
    from hybridtrain.config import keys

    if (
        command not in TAKES_RUN
        or before == "--config-dir"
        or text in _FLAGS
        or text.startswith("--config-dir=")
    ):
        return False
    head, equals, _ = text.lstrip("+~").partition("=")
    if equals and ("." in head and head.partition(".")[0] in keys.sections(command)) and "/" not in head:
        return False
    if os.path.isdir(os.path.expanduser(text)):
        return True
    return "/" in head if equals or text.startswith("~") else not text.startswith("-")


def _take_nproc(command: str, argv: list[str]) -> tuple[str, list[str]]:
    """The value of `--nproc` (empty without it), and the other arguments.

    A sweep keeps `--nproc` for its runs.
    """
    for index, text in enumerate(argv):
        flag, _, value = text.partition("=")
        if flag != "--nproc":
            continue
        rest = argv[:index] + argv[index + (1 if value else 2) :]
        value = value or (argv[index + 1] if index + 1 < len(argv) else "")
        allowed = "a number from 1 on, or auto: as many as the layout needs"
        if command not in SEVERAL:
            raise refusal(
                "--nproc",
                value,
                f"{command} runs in one process",
                allowed=f"--nproc with {', '.join(SEVERAL)}",
                instead=f"hybridtrain {command}",
            )
        if value != "auto" and not (value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 65536):
            raise refusal(
                "--nproc",
                value or "(nothing)",
                "not a number of processes",
                allowed=allowed,
                instead="--nproc 2",
            )
        if launch.is_launched():
            problem = f"this is rank {log.rank()} of a launcher already"
            raise refusal(
                "--nproc",
                value,
                problem,
                allowed="one launcher",
                instead="either --nproc, or torchrun and its like",
            )
        if any(flag in rest for flag in ("-m", "--multirun")):
            return "", ["--nproc", value, *rest]
        return value, rest
    return "", argv


def _process_count(given: str, config: schema.Root | list[schema.Root]) -> int:
    """Number of processes for `--nproc`.

    auto: the product of the parallel degrees; with a degree of -1 the largest multiple of it that has GPUs.
    """
    if given != "auto":
        return int(given)
    from hybridtrain.config import schema

    assert isinstance(config, schema.Config)
    degrees = [getattr(config.parallel, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]
    fixed = math.prod(degree for degree in degrees if degree > 0)
    if all(degree > 0 for degree in degrees):
        return fixed
    return max(1, spawn.gpus() // fixed) * fixed


def _take_cfg(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether `--cfg job` (or `-c job`) is given, and the other arguments."""
    for index, text in enumerate(argv):
        flag, _, value = text.partition("=")
        if flag in ("--cfg", "-c"):
            what = value or (argv[index + 1] if index + 1 < len(argv) else "")
            if what != "job":
                raise refusal(
                    "--cfg", what or "(nothing)", "not something to show", allowed="job", instead="--cfg job"
                )
            return True, argv[:index] + argv[index + (1 if value else 2) :]
    return False, argv


def _multirun(command: str, argv: list[str]) -> int:
    """Run the combinations one after the other, each in a new process.

    Returns the first exit code that is not 0, else 0.
    """
    if "WORLD_SIZE" in os.environ:
        raise refusal(
            "--multirun",
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            "every rank of torchrun would start the sweep for itself",
            allowed="sweeps outside torchrun",
            instead=(
                "a loop in the shell: for lr in 1e-3 3e-4; do torchrun ... optim.lr=$lr run.name=lr-$lr; done"
            ),
        )
    from hybridtrain.config import checks, command_checks
    from hybridtrain.config.compose import train_config
    from hybridtrain.config.sweep import sweep

    flags, argv = (argv[:2], argv[2:]) if argv[:1] == ["--nproc"] else ([], argv)
    jobs = sweep(command, argv)
    checks.distinct_folders([train_config(job) for job in jobs] if command == "train" else [])
    codes, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        run_dir_file = Path(folder) / "run"
        for number, job in enumerate(jobs):
            print(f"[{number + 1}/{len(jobs)}] hybridtrain {command} {shlex.join(job)}", flush=True)
            words = [sys.executable, "-m", "hybridtrain.cli", command, *flags, *job]
            codes.append(
                subprocess.run(
                    words, check=False, env={**os.environ, launch.RUN_DIR_FILE: str(run_dir_file)}
                ).returncode
            )
            runs += [run_dir_file.read_text()] if run_dir_file.exists() else []
            run_dir_file.unlink(missing_ok=True)
    if command == "train" and len(runs) > 1 and not any(codes):
        if not command_checks.has_matplotlib():
            print(f"the runs are not compared: matplotlib is not installed; {install('report')}")
            return 0
        codes.append(
            subprocess.run(
                [sys.executable, "-m", "hybridtrain.cli", "report", "--compare", *runs], check=False
            ).returncode
        )
    return next((code for code in codes if code), 0)
