"""The job script: slurm/train.sbatch with generated #SBATCH lines and exports at the top.

Pure: text in, text out. The user's values occur in two places: in #SBATCH lines, which allow only harmless
characters because sbatch has its own quoting rules; and in exported variables, quoted for the shell. Training
options are in the run's submitted.yaml.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from hybridtrain.config import keys
from hybridtrain.config.compose import Interpolated
from hybridtrain.config.schema import ClusterConfig
from hybridtrain.errors import refusal

_HARMLESS = re.compile(r"[\w@%+=:,./\[\]()|&*^~-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_RESERVED = (
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "time",
    "signal",
    "requeue",
    "no-requeue",
    "open-mode",
    "output",
    "array",
    "chdir",
    "job-name",
    "wrap",
)
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)\s*\}")
_BEGIN = "# --- job ---\n"
RUNS = "runs.txt"
"""File beside the script of an array: its run directories, one per line."""


def plugins_word(plugins: list[str]) -> str:
    """run.plugins as a command-line argument, since a file of a run must not import
    code; empty without plugins.
    """
    return f"run.plugins=[{','.join(getattr(name, 'source', name) for name in plugins)}]" if plugins else ""


def render(
    cluster: ClusterConfig,
    *,
    name: str,
    folder: Path,
    work_dir: Path,
    python: str,
    stop_signal: str,
    plugins: list[str],
    runs: list[Path],
) -> str:
    """The script for `sbatch`.

    `folder`: of Slurm's output; `runs`: run directories, several make an array.
    """
    options = _options(
        cluster, name=name, folder=folder, work_dir=work_dir, stop_signal=stop_signal, runs=runs
    )
    body = (keys.data_folder("slurm") / "train.sbatch").read_text().partition(_BEGIN)[2]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in options.items()),
    ]
    lines += [f"module load {shlex.join(cluster.modules)}"] if cluster.modules else []
    exported = _environment(
        cluster, folder=folder, python=python, stop_signal=stop_signal, plugins=plugins, runs=runs
    )
    for field, value in {
        **{f"cluster.environment.{key}": value for key, value in exported.items()},
        "cluster.modules": " ".join(cluster.modules),
    }.items():
        _check_letters(field, value)
    lines += [f"export {key}={_word(key, value)}" for key, value in exported.items()]
    return "\n".join(lines) + "\n" + _BEGIN + body


def _word(key: str, value: str) -> str:
    """A value quoted for the shell.

    `${oc.env:NAME}` becomes `$NAME`, since Slurm passes the user's environment to the job.
    """
    if not isinstance(value, Interpolated):
        return shlex.quote(value)
    variable = _FROM_ENVIRONMENT.fullmatch(value.source)
    if variable is None:
        raise refusal(
            f"cluster.environment.{key}",
            value,
            "its value comes from the environment, may be a secret, and would be written into the job script",
            allowed="text, or one variable: ${oc.env:NAME}",
            instead=f"cluster.environment={{{key}: '${{oc.env:NAME}}'}}",
        )
    return f'"${{{variable[1]}:?{variable[1]} is not set in the environment of the job}}"'


def _check_letters(field: str, value: str) -> None:
    """Refuse lone surrogates, which no file can hold; those that represent bytes of a
    non-Unicode path are allowed.
    """
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        shown = ascii(value[max(0, error.start - 10) : error.end + 10])
        raise refusal(
            field,
            shown,
            "it has half a letter in it (a lone surrogate)",
            allowed="Unicode text",
            instead="the text typed anew",
        ) from error


def encode(text: str) -> bytes:
    """The script as bytes, with the original bytes of non-Unicode paths (`render` has refused
    what cannot be encoded).
    """
    return text.encode("utf-8", "surrogateescape")


def run_list(runs: list[Path]) -> bytes:
    """Content of the file RUNS."""
    return b"".join(os.fsencode(path) + b"\n" for path in runs)


def ranks_per_node(cluster: ClusterConfig) -> int:
    """Processes on each node."""
    return cluster.ranks_per_node or cluster.gpus_per_node or 1


def _options(
    cluster: ClusterConfig, *, name: str, folder: Path, work_dir: Path, stop_signal: str, runs: list[Path]
) -> dict[str, str]:
    """sbatch options without their dashes: name -> value. Raises UserError for one that is not allowed."""
    array = len(runs) > 1
    at_once = f"%{cluster.array_at_once}" if cluster.array_at_once else ""
    given = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "mem": cluster.mem,
        "cpus-per-task": str(cluster.cpus_per_node or ""),
        "gpus-per-node": str(cluster.gpus_per_node or ""),
    }
    options = {
        "job-name": re.sub(r"[^\w.-]", "_", name),
        "nodes": str(cluster.nodes),
        "ntasks-per-node": "1",
        "time": cluster.time,
        "signal": f"B:{stop_signal}@{cluster.signal_before_s}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{folder}/slurm-{'%A_%a' if array else '%j'}.out",
        "chdir": str(work_dir),
        **{key: value for key, value in given.items() if value},
        **({"array": f"0-{len(runs) - 1}{at_once}"} if array else {}),
    }
    for key, value in cluster.sbatch.items():
        if not _OPTION.fullmatch(key) or key in _RESERVED or key in options:
            raise refusal(
                f"cluster.sbatch.{key}",
                value,
                "not an option for here",
                allowed="long options of sbatch that no other option sets",
                instead="that option",
            )
        options[key] = str(value or "")
    for key, value in options.items():
        if not _HARMLESS.fullmatch(value):
            field = {"chdir": "(working directory)", "output": "run.dir"}.get(
                key, f"cluster.{key.replace('-', '_')}"
            )
            raise refusal(
                field,
                value,
                "it has characters that sbatch would change",
                allowed="letters, digits and @%+=:,./[]()|&*^~-",
                instead="another name",
            )
    return options


def _environment(
    cluster: ClusterConfig,
    *,
    folder: Path,
    python: str,
    stop_signal: str,
    plugins: list[str],
    runs: list[Path],
) -> Mapping[str, str]:
    for key, value in cluster.environment.items():
        if not _NAME.fullmatch(key) or "\0" in str(value):
            raise refusal(
                f"cluster.environment.{key}",
                value,
                "not an environment variable",
                allowed="NAME: value",
                instead="NCCL_DEBUG: INFO",
            )
    for module in cluster.modules:
        if module.startswith("-") or not module:
            raise refusal(
                "cluster.modules",
                cluster.modules,
                "not a module's name",
                allowed="names such as cuda/13.0",
                instead="[]",
            )
    ours = {
        "HYBRIDTRAIN_PYTHON": python,
        "HYBRIDTRAIN_RANKS": str(ranks_per_node(cluster)),
        "HYBRIDTRAIN_GPUS": str(cluster.gpus_per_node),
        "HYBRIDTRAIN_MAX_RESTARTS": str(cluster.max_restarts),
        "HYBRIDTRAIN_HEALTH_S": str(cluster.health_timeout_s),
        "HYBRIDTRAIN_SIGNAL": stop_signal,
        "HYBRIDTRAIN_PLUGINS": plugins_word(plugins),
        "HYBRIDTRAIN_IMAGE": cluster.container_image,
        "HYBRIDTRAIN_MOUNTS": cluster.container_mounts,
    }
    which = {"HYBRIDTRAIN_RUN": str(runs[0])} if len(runs) == 1 else {"HYBRIDTRAIN_RUNS": str(folder / RUNS)}
    given = {
        key: value if isinstance(value, str) else str(value) for key, value in cluster.environment.items()
    }
    return {**given, **{key: value for key, value in ours.items() if value}, **which}
