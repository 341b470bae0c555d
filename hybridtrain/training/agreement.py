"""Ranks compare what they are about to do, right after they have met: options, code, and data. A difference is refused on all of them.

Options count as they are written. `${oc.env:NAME}` may stand for another value on each host in the options of PER_HOST, which name
places; in all others its value counts too, by a digest, for it may be a secret.
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

PER_HOST = ("data.path", "data.eval_path", "data.source", "data.tokenizer", "model.from_pretrained", "run.dir")
"""Options whose environment references may have another value on each host."""
_NAMED = 3


def agree(config: Config, *, fingerprints: Mapping[str, str]) -> None:
    """Refuse ranks that would not do the same (collective over all ranks). `fingerprints`: of what each rank reads.

    Raises UserError on rank 0, which names rank, host and option, and ReportedElsewhere on the others.
    """
    mine = {"option": options(config), "code": code(), "read": dict(fingerprints)}
    found = mesh.gathered(_digest(mine))
    odd = mesh.from_rank0([rank for rank, digest in enumerate(found) if digest != found[0]])
    if not odd:
        return
    first = mesh.from_rank0(mine)
    differences = mesh.gathered((failure.node(), _differences(first, mine)) if log.rank() in odd else None)

    def refuse() -> None:
        raise _refused({rank: differences[rank] for rank in odd})

    mesh.on_rank0(refuse)


def options(config: Config) -> dict[str, list[str]]:
    """section.option -> what may be shown of it, and a digest of its value (empty where that may differ between hosts)."""
    shown, whole = compose.public(config), dataclasses.asdict(config)
    result = {}
    for section, fields in shown.items():
        for option, value in fields.items():
            key, text = f"{section}.{option}", str(value)
            result[key] = [text, "" if key in PER_HOST and "${" in text else _digest(whole[section][option])]
    return result


def code() -> dict[str, str]:
    """File of this package, module of run.plugins -> a digest of its text; library -> its version."""
    files = {f"hybridtrain/{file.relative_to(host.PACKAGE)}": hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(host.PACKAGE.rglob("*.py"))}
    return {**files, **registry.sources(), **{name: version for name, version in host.versions().items() if name != "hybridtrain"}}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _differences(first: dict[str, Any], mine: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, on rank 0, here) of all that differs."""
    result: list[tuple[str, str, str]] = []
    for key in sorted(first["option"].keys() | mine["option"].keys()):
        there, here = first["option"].get(key), mine["option"].get(key)
        if there != here:
            there, here = there or ["(unknown)", ""], here or ["(unknown)", ""]
            same = there[0] == here[0]
            result.append((key, there[0], f"{here[0]}, whose value differs" if same else here[0]))
    for kind in ("code", "read"):
        for key in sorted(first[kind].keys() | mine[kind].keys()):
            there, here = first[kind].get(key, "(missing)"), mine[kind].get(key, "(missing)")
            if there != here and not (kind == "read" and result):  # what is read follows from the options
                result.append((key if kind == "code" else f"{key} (fingerprint)", there, here))
    return result


def _refused(differences: dict[int, tuple[str, list[tuple[str, str, str]]]]) -> UserError:
    rank, (node, entries) = next(iter(differences.items()))
    (what, value, _), others = entries[0], ", ".join(map(str, list(differences)[1:]))
    words = "; ".join(f"{key}={there} here and {here} there" for key, there, here in entries[:_NAMED])
    more = f" and {len(entries) - _NAMED} more" if entries[_NAMED:] else ""
    also = f"; so {'do' if len(differences) > 2 else 'does'} {'ranks' if len(differences) > 2 else 'rank'} {others}" if others else ""
    return refusal(
        what,
        value,
        f"rank {rank} on {node} differs from rank 0 on {failure.node()}: {words}{more}{also}",
        allowed="the same options, code and data on all ranks; places may be ${oc.env:NAME} of each host",
        instead="the same command and the same checkout on every machine; another MASTER_PORT, if these are two trainings",
    )
