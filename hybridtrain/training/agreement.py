"""Checks, after the rendezvous, that all ranks have the same options, code and data.

Options are compared as written. In the options of PER_HOST, which are paths, `${oc.env:NAME}` may have
another value on each host; in all others the value is compared too, by a digest, because it may be a secret.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hybridtrain import registry
from hybridtrain.config import compose
from hybridtrain.config.schema import Config
from hybridtrain.errors import UserError, refusal
from hybridtrain.parallel import mesh
from hybridtrain.runtime import failure, host, log

PER_HOST = (
    "data.path",
    "data.eval_path",
    "data.source",
    "data.tokenizer",
    "model.from_pretrained",
    "run.dir",
)
"""Options whose environment references may have another value on each host."""
_SHOWN = 3
"""Differences that the error shows."""


def agree(config: Config, *, fingerprints: Mapping[str, str]) -> None:
    """Check that all ranks have the same options, code and data (collective).

    `fingerprints`: of the data of this rank. Raises UserError on rank 0, naming rank, host and option, and
    ReportedElsewhere on the other ranks.
    """
    mine = {"option": options(config), "code": code(), "read": dict(fingerprints)}
    digests = mesh.gather_on_rank0(_digest(mine))
    differing = mesh.from_rank0([rank for rank, digest in enumerate(digests) if digest != digests[0]])
    if not differing:
        return
    of_rank0 = mesh.from_rank0(mine)
    differences = mesh.gather_on_rank0(
        (failure.node(), _differences(of_rank0, mine)) if log.rank() in differing else None
    )

    def refuse() -> None:
        raise _refusal({rank: differences[rank] for rank in differing})

    mesh.on_rank0(refuse)


def options(config: Config) -> dict[str, list[str]]:
    """section.option -> [its value without secrets, a digest of its value, "" if that
    may differ between hosts].
    """
    public, values = compose.public(config), dataclasses.asdict(config)
    result = {}
    for section, fields in public.items():
        for option, value in fields.items():
            key, text = f"{section}.{option}", str(value)
            result[key] = [text, "" if key in PER_HOST and "${" in text else _digest(values[section][option])]
    return result


def code() -> dict[str, str]:
    """Digests of the files of this package and of the modules of run.plugins, and the versions
    of libraries, by name.
    """
    files = {
        f"hybridtrain/{file.relative_to(host.PACKAGE)}": hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(host.PACKAGE.rglob("*.py"))
    }
    return {
        **files,
        **registry.sources(),
        **{name: version for name, version in host.versions().items() if name != "hybridtrain"},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _differences(of_rank0: dict[str, Any], mine: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, on rank 0, on this rank) for all differences."""
    result: list[tuple[str, str, str]] = []
    for key in sorted(of_rank0["option"].keys() | mine["option"].keys()):
        first, here = of_rank0["option"].get(key), mine["option"].get(key)
        if first != here:
            first, here = first or ["(unknown)", ""], here or ["(unknown)", ""]
            same = first[0] == here[0]
            result.append((key, first[0], f"{here[0]}, whose value differs" if same else here[0]))
    for kind in ("code", "read"):
        for key in sorted(of_rank0[kind].keys() | mine[kind].keys()):
            first, here = of_rank0[kind].get(key, "(missing)"), mine[kind].get(key, "(missing)")
            if first != here and not (kind == "read" and result):  # other options make the data differ
                result.append((key if kind == "code" else f"{key} (fingerprint)", first, here))
    return result


def _refusal(differences: dict[int, tuple[str, list[tuple[str, str, str]]]]) -> UserError:
    """`differences`: rank -> (its node, `_differences`)."""
    rank, (node, entries) = next(iter(differences.items()))
    (name, value, _), others = entries[0], ", ".join(map(str, list(differences)[1:]))
    examples = "; ".join(f"{key}={first} here and {there} there" for key, first, there in entries[:_SHOWN])
    more = f" and {len(entries) - _SHOWN} more" if entries[_SHOWN:] else ""
    also = f"; so {'do ranks' if len(differences) > 2 else 'does rank'} {others}" if others else ""
    return refusal(
        name,
        value,
        f"rank {rank} on {node} differs from rank 0 on {failure.node()}: {examples}{more}{also}",
        allowed=(
            "the same options, code and data on all ranks; paths may be ${oc.env:NAME}, which each host sets"
        ),
        instead=(
            "the same command and the same checkout on every machine; "
            "another MASTER_PORT, if these are two runs"
        ),
    )
