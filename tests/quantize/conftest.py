"""The trained run of tests/evaluate."""

from tests.evaluate.conftest import trained  # noqa: F401 - a fixture
