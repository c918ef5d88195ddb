"""Install the rivals, each into a virtual environment of its own, outside the repository.

    python -m benchmarks.peers.install --into DIR

Says which could not be installed, with the last line of what pip said; the others are used without them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from benchmarks.peers.rivals import RIVALS, Rival


def python_of(into: Path, rival: Rival) -> Path:
    """The python of a rival's environment."""
    return into / rival.name / "bin" / "python"


def install(rival: Rival, into: Path) -> str | None:
    """Make the environment; None, or why it could not be made."""
    folder = into / rival.name
    venv.create(folder, with_pip=True, clear=True)
    python = str(python_of(into, rival))
    if rival.lent:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        lent = folder / "lib" / version / "site-packages" / "lent.pth"
        lent.write_text(sysconfig.get_paths()["purelib"] + "\n")
    steps = [list(rival.needs)] if rival.needs else []
    if rival.package:
        steps.append([*(["--no-build-isolation"] if rival.lent else []), rival.package])
    for step in steps:
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *step],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "error"))]
            return said[-1] if said else done.stderr.strip()[-200:]
    return None


def main() -> int:
    """Command line; exit code 1 if one could not be installed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, required=True, help="folder for the environments")
    parser.add_argument("--only", default="", help="only rivals with this in their name")
    args = parser.parse_args()
    failed = False
    for rival in RIVALS:
        if args.only in rival.name:
            why = install(rival, args.into)
            failed |= why is not None
            what = rival.package or f"{rival.name} as installed here"
            print(f"{what}: {why or 'installed'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
