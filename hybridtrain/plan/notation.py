"""The written form of a layout: `pp2-dp_shard2-tp2-zero3`, `pp2-zbv_zero_bubble`, `single`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybridtrain.errors import refusal
from hybridtrain.plan.layout import AXES, ParallelLayout
from hybridtrain.plan.schedules import SCHEDULES

if TYPE_CHECKING:
    from hybridtrain.config import schema

_NUMBERED = {axis: axis for axis in AXES} | {"zero": "zero_stage", "v": "virtual_stages"}
_CUT = "cut"


def parse(text: str) -> dict[str, Any]:
    """Parse the written form into options of the section `parallel`. Raises UserError."""
    fields: dict[str, Any] = {"dp_replicate": 1, "zero_stage": None}
    for part in filter(None, text.strip().split("-")):
        name = part.rstrip("0123456789")
        number = part[len(name) :]
        if part in SCHEDULES:
            fields["schedule"] = part
        elif part == "nosp":
            fields["sequence_parallel"] = "false"
        elif part.startswith(_CUT) and all(text.isdecimal() for text in part.removeprefix(_CUT).split(".")):
            fields["cut"] = [int(text) for text in part.removeprefix(_CUT).split(".")]
        elif name in _NUMBERED and number:
            fields[_NUMBERED[name]] = int(number)
        elif part != "single":
            raise refusal(
                "layout",
                text,
                f"'{part}' is no part of a layout",
                allowed="an axis and its degree ("
                + ", ".join(AXES)
                + "), zero0 to zero3, a schedule, v2 (virtual stages), cut9.17 (layers at which stages "
                "begin), nosp, or single",
                instead="pp2-dp_shard2-tp2-zero3",
            )
    sharded = fields.get("dp_shard", 1) > 1
    if fields["zero_stage"] is None:
        fields["zero_stage"] = int(sharded)
    if fields["zero_stage"] and not sharded:
        problem, allowed = "it has no dp_shard to shard over", "zero1 to zero3 beside dp_shard2 or more"
        raise refusal("layout", text, problem, allowed=allowed, instead=f"dp_shard2-{text.strip()}")
    return fields


def write(parallel: schema.ParallelConfig, layout: ParallelLayout) -> str:
    """The written form of a layout, with schedule and other options that differ from the defaults."""
    parts = [str(layout)]
    if layout.dp_shard > 1:
        parts.append(f"zero{parallel.zero_stage}")
    if layout.pp > 1 and parallel.schedule != "1f1b":
        parts.append(parallel.schedule)
    if layout.pp > 1 and parallel.virtual_stages > 2:
        parts.append(f"v{parallel.virtual_stages}")
    if layout.pp > 1 and parallel.cut:
        parts.append(_CUT + ".".join(map(str, parallel.cut)))
    if layout.tp > 1 and parallel.sequence_parallel == "false":
        parts.append("nosp")
    return "-".join(parts)
