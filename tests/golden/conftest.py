"""`pytest tests/golden --update-golden` writes the tables anew."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known when this folder is named on the command line; otherwise tables are only compared."""
    parser.addoption("--update-golden", action="store_true", help="write the golden tables anew")


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether tables are to be written."""
    return bool(request.config.getoption("--update-golden", default=False))
