"""No test sees or changes what Fitwright remembers of the machine it runs on."""

from __future__ import annotations

import os

# Several test processes share a few cores: torch's spinning thread pools would starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import site
from collections.abc import Iterator

import pytest

_number = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """HOME and the data folder in a temporary folder, also for fixtures that outlive a test and processes
    they start."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        # packages installed for the user stay where they are found
        patch.setenv("PYTHONUSERBASE", site.getuserbase())
        patch.setenv("HOME", os.fspath(home))
        patch.setenv("FITWRIGHT_HOME", os.fspath(home / "fitwright"))
        patch.delenv("XDG_DATA_HOME", raising=False)
        yield


@pytest.fixture(autouse=True)
def data_folder_of_the_test(
    home_of_the_tests: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data folder of each test's own; made by whoever writes to it."""
    folder = tmp_path_factory.getbasetemp() / "data" / str(next(_number))
    monkeypatch.setenv("FITWRIGHT_HOME", os.fspath(folder))
