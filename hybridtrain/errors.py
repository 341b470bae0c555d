"""What a user can put right, and the one form in which it is refused."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right. Printed once, by rank 0, without a traceback."""


class LocalError(UserError):
    """A mistake that this rank alone can know of, and so prints whatever its number."""


class PossiblyLocalError(UserError):
    """A mistake that each rank finds for itself, where others may not: said again by those that nobody has ended after rank 0 has spoken."""


class ReportedElsewhere(Exception):
    """Another rank has said why the run ends: this one leaves without words, with the exit code `code`."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def refusal(field: str, value: object, problem: str, *, allowed: str, instead: str) -> UserError:
    """Build the one form every refusal has: section.field, the value, what is allowed, what to try.

    A value that came from the environment (config.compose.Interpolated) is shown as the reference that was written: refusals stand in logs.
    """
    return UserError(f"{field}={getattr(value, 'source', value) if isinstance(value, str) else value}: {problem}\n  allowed: {allowed}\n  try:     {instead}")


def install(extra: str) -> str:
    """The command that installs the packages of an optional part (`project.optional-dependencies` in pyproject.toml)."""
    return f'pip install "hybridtrain[{extra}]"'
