"""Converts config.yaml of other versions to today's options, so that no other code depends on the version.

An option that is missing in a file has the schema's default, unless `ABSENT` or `ABSENT_WITH` has its earlier
default. A run that began with such a default keeps it when it is resumed, unless the command sets the option.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridtrain import __version__
from hybridtrain.config.schema import Config
from hybridtrain.errors import UserError, refusal
from hybridtrain.runtime.files import read_object

RENAMED: dict[str, str] = {}
"""section.option of an earlier version -> today's name. Entries are never removed."""
ABSENT: dict[str, Any] = {"precision.hysteresis": 1}
"""section.option -> its value in files without it, if that is not today's default."""
ABSENT_WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("precision.kind", "bf16_pure"): {"precision.rounding": "nearest"}
}
"""(section.option, its value) -> what `ABSENT` is in files with that value."""


def migrated(content: dict[Any, Any]) -> dict[Any, Any]:
    """The sections of a config.yaml with today's option names; unknown options are kept."""
    sections = {
        name: dict(options) if isinstance(options, dict) else options for name, options in content.items()
    }
    for before, now in RENAMED.items():
        section, _, option = before.partition(".")
        if isinstance(sections.get(section), dict) and option in sections[section]:
            _set_default(sections, now, sections[section].pop(option))
            if not sections[section]:
                del sections[section]
    for key, value in ABSENT.items():
        _set_default(sections, key, value)
    for (key, wanted), values in ABSENT_WITH.items():
        section, _, option = key.partition(".")
        holder = sections.get(section)
        if isinstance(holder, dict) and holder.get(option) == wanted:
            for absent, value in values.items():
                _set_default(sections, absent, value)
    return sections


def kept(before: Config, now: Config) -> dict[str, Any]:
    """section.option -> value, of the earlier defaults with which a run began, whose config is `before`, and
    which `now`, the config of the command that resumes it, does not set.
    """
    return {
        key: value
        for key, value in ABSENT.items()
        if _value(before, key) == value and _value(now, key) == _value(Config(), key) and key not in now.given
    }


def keep(config: Config, values: Mapping[str, Any]) -> None:
    """Set options: section.option -> value."""
    for key, value in values.items():
        section, _, option = key.partition(".")
        setattr(getattr(config, section), option, value)


def _value(config: Config, key: str) -> Any:
    section, _, option = key.partition(".")
    return getattr(getattr(config, section), option)


def _set_default(sections: dict[Any, Any], key: str, value: Any) -> None:
    section, _, option = key.partition(".")
    holder = sections.setdefault(section, {})
    if isinstance(holder, dict):
        holder.setdefault(option, value)


def of_another_version(key: str, *, file: Path) -> UserError | None:
    """The refusal of an unknown key in a run's config.yaml, if another version wrote it; None if this or
    an unknown version did.
    """
    try:
        version = (read_object(file.parent / "summary.json", field="run.dir").get("versions") or {}).get(
            "hybridtrain"
        )
    except (UserError, AttributeError):
        return None
    if not isinstance(version, str) or version == __version__:
        return None
    problem = f"hybridtrain {__version__} has no such option; {file} was written by hybridtrain {version}"
    return refusal(
        key,
        "...",
        problem,
        allowed="runs of this version and of earlier ones",
        instead=f"hybridtrain {version}",
    )
