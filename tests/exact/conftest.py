"""The tracer runs real modelling code: its tests need the [executor] extra, but no card."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the [executor] extra")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """There are no numbers to crunch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
