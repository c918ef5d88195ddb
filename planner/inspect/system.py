"""Everything `planner.inspect` asks of the operating system, in one place that tests replace.

Each method reads one thing and lets errors through; the readers turn them into notes. Libraries that take
time to import (psutil, pynvml) are imported when first needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

_SLOW_SECONDS = 0.3


class Partition(NamedTuple):
    """A mounted file system as psutil lists it."""

    path: str
    device: str
    filesystem: str
    options: str


class System:
    """The computer this process runs on."""

    platform: str = sys.platform

    def environment(self, name: str) -> str | None:
        """An environment variable, None where it is not set (an empty one is set)."""
        return os.environ.get(name)

    def read(self, path: str, limit: int = 1 << 18) -> str | None:
        """The first `limit` bytes of a text file; None where it cannot be read."""
        try:
            with open(path, "rb") as file:
                return file.read(limit).decode(errors="replace")
        except OSError:
            return None

    def names(self, path: str) -> list[str]:
        """Names in a folder, sorted; none where it cannot be read."""
        try:
            return sorted(os.listdir(path))
        except OSError:
            return []

    def resolve(self, path: str) -> str:
        """The path with symbolic links followed."""
        return os.path.realpath(path)

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder."""
        return os.path.isdir(path)

    def memory(self) -> tuple[int, int]:
        """Physical RAM and what is available of it, in bytes, the container's limit not counted."""
        import psutil  # type: ignore[import-untyped, unused-ignore]

        found = psutil.virtual_memory()
        return int(found.total), int(found.available)

    def swap(self) -> tuple[int, int]:
        """Swap space and what is free of it, in bytes."""
        import psutil  # type: ignore[import-untyped, unused-ignore]

        found = psutil.swap_memory()
        return int(found.total), int(found.free)

    def locked_limit(self) -> int | None:
        """RLIMIT_MEMLOCK in bytes; None for unlimited and where the system has no such limit."""
        if self.platform == "win32":
            return None
        import resource

        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        return None if limit == resource.RLIM_INFINITY else limit

    def cores(self) -> int | None:
        """Logical processors this process may run on."""
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count()

    def processor(self) -> str | None:
        """The processor's name as Python knows it; often less than the system's own tables hold."""
        import platform

        return platform.processor() or platform.machine() or None

    def describe(self) -> str:
        """Operating system and release: `Linux 6.8.0`."""
        if hasattr(os, "uname"):
            return f"{os.uname().sysname} {os.uname().release}"
        import platform

        return platform.platform(terse=True)

    def space(self, path: str, patient: bool = True) -> tuple[int, int]:
        """Total and free bytes of the file system at a path. `patient=False` gives up after 0.3 s, for
        servers that no longer answer.

        Errors: `OSError`, `TimeoutError`.
        """
        import shutil

        if patient:
            found = shutil.disk_usage(path)
            return found.total, found.free
        answers: list[tuple[int, int]] = []
        # A thread of its own: a stat on a dead network mount cannot be interrupted.
        asking = Thread(target=lambda: answers.append(self.space(path)), daemon=True)
        asking.start()
        asking.join(_SLOW_SECONDS)
        if not answers:
            raise TimeoutError("no answer")
        return answers[0]

    def partitions(self) -> list[Partition]:
        """Mounted file systems where there is no /proc to read them from."""
        import psutil  # type: ignore[import-untyped, unused-ignore]

        return [
            Partition(found.mountpoint, found.device, found.fstype, found.opts)
            for found in psutil.disk_partitions()
        ]

    def places(self) -> list[str]:
        """Folders whose file systems matter: where we are, home, temporary files, the Hugging Face cache."""
        cache = self.environment("HF_HOME")
        return [os.getcwd(), str(Path.home()), tempfile.gettempdir(), *([cache] if cache else [])]

    def sysctl(self, name: str) -> str | None:
        """A value of macOS's sysctl; None where it has none of that name."""
        command = ["/usr/sbin/sysctl", "-n", name]
        found = subprocess.run(command, capture_output=True, text=True, timeout=2, check=False)
        return found.stdout.strip() or None

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def nvml(self) -> Any:
        """The pynvml module.

        Errors: `ImportError` where it is not installed.
        """
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        return pynvml
