"""Errors that a user can fix, and the one format of their messages."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can fix. Printed once, by rank 0, without a traceback."""


class LocalError(UserError):
    """An error that only this rank knows of. The rank prints it itself, whatever its number."""


class PossiblyLocalError(UserError):
    """An error that other ranks may not have.

    A rank that is still alive after rank 0 has printed its error prints it, too.
    """


class ReportedElsewhere(Exception):
    """Another rank has printed why the run ends. This one exits silently, with `code`."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def refusal(field: str, value: object, problem: str, *, allowed: str, instead: str) -> UserError:
    """A UserError with section.option, its value, the problem, what is allowed, and what to try.

    A value from the environment (config.interpolations.Interpolated) is shown as its reference: it may be a
    secret, and logs must not hold secrets.
    """
    shown = getattr(value, "source", value) if isinstance(value, str) else value
    return UserError(f"{field}={shown}: {problem}\n  allowed: {allowed}\n  try:     {instead}")


def install(extra: str) -> str:
    """The command that installs an optional dependency group of pyproject.toml."""
    return f'pip install "hybridtrain[{extra}]"'
