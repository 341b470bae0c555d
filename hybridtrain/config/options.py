"""The base class of every section of options, and the decorator that makes a dataclass of one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

OptionsT = TypeVar("OptionsT")


class Options:
    """What every section is: options that are compared and printed one by one.

    Written once: a dataclass would compile these two methods for each of 38 classes, which takes a fiftieth
    of the start of a command.
    """

    def _values(self) -> dict[str, Any]:
        return {option.name: getattr(self, option.name) for option in fields(self)}  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return (
            self._values() == other._values()
            if isinstance(other, Options) and type(self) is type(other)
            else NotImplemented
        )

    __hash__ = None  # type: ignore[assignment]  # options change

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._values().items())
        return f"{type(self).__name__}({values})"


@dataclass_transform()
def options(section: type[OptionsT]) -> type[OptionsT]:
    """`dataclass` for sections."""
    return dataclass(section, repr=False, eq=False, match_args=False)
