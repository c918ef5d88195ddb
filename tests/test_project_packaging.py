"""Every data file of the packages is installed with them."""

from __future__ import annotations

import tomllib
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent


def test_every_data_file_is_packaged() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    forgotten = []
    for package, globs in setuptools["package-data"].items():
        packaged = {found for glob in globs for found in (ROOT / package).glob(glob)}
        for path in (ROOT / package).rglob("*"):
            generated = path.suffix == ".pyc" or path.is_dir()
            if not generated and path.suffix != ".py" and path not in packaged:
                forgotten.append(str(PurePosixPath(path.relative_to(ROOT))))
    assert not forgotten


def test_every_folder_with_code_is_a_package() -> None:
    for package in ("planner", "executor", "profiles"):
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"
