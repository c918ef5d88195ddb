"""A computer and a driver made of dictionaries, for tests of `planner.inspect`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from planner.inspect import System
from planner.inspect.system import Partition

GIB, MIB = 2**30, 2**20


class FakeSystem(System):
    """Files from a dictionary; everything else from attributes."""

    def __init__(
        self,
        files: dict[str, str] | None = None,
        *,
        platform: str = "linux",
        nvml: Any = None,
        environment: dict[str, str] | None = None,
        memory: tuple[int, int] = (64 * GIB, 60 * GIB),
        swap: tuple[int, int] = (8 * GIB, 8 * GIB),
        cores: int = 16,
        links: dict[str, str] | None = None,
        spaces: dict[str, tuple[int, int]] | None = None,
        places: list[str] | None = None,
        sysctl: dict[str, str] | None = None,
        partitions: list[Partition] | None = None,
    ) -> None:
        self.files = files or {}
        self.platform = platform
        self.library = nvml
        self.variables = environment or {}
        self.ram = memory
        self.swap_space = swap
        self.core_count = cores
        self.links = links or {}
        self.spaces = spaces or {}
        self.folders = places or ["/home/u"]
        self.sysctls = sysctl or {}
        self.parts = partitions or []
        self.patience: dict[str, bool] = {}

    def environment(self, name: str) -> str | None:
        return self.variables.get(name)

    def read(self, path: str, limit: int = 1 << 18) -> str | None:
        text = self.files.get(path)
        return None if text is None else text[:limit]

    def names(self, path: str) -> list[str]:
        inside = {file[len(path) + 1 :].split("/")[0] for file in self.files if file.startswith(path + "/")}
        return sorted(inside)

    def resolve(self, path: str) -> str:
        return self.links.get(path, path)

    def is_folder(self, path: str) -> bool:
        return path in self.spaces

    def memory(self) -> tuple[int, int]:
        return self.ram

    def swap(self) -> tuple[int, int]:
        return self.swap_space

    def locked_limit(self) -> int | None:
        return 8 * MIB

    def cores(self) -> int | None:
        return self.core_count

    def processor(self) -> str | None:
        return "x86_64"

    def describe(self) -> str:
        return "Fake 1"

    def space(self, path: str, patient: bool = True) -> tuple[int, int]:
        self.patience[path] = patient
        return self.spaces[path]

    def partitions(self) -> list[Partition]:
        return self.parts

    def places(self) -> list[str]:
        return self.folders

    def sysctl(self, name: str) -> str | None:
        return self.sysctls.get(name)

    def pid(self) -> int:
        return 4242

    def nvml(self) -> Any:
        if self.library is None:
            raise ImportError("No module named 'pynvml'")
        return self.library


class NVMLError(Exception):
    """Any failure of the driver."""


class NVMLError_NotSupported(NVMLError):
    """The card does not have the feature."""


def process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def card(name: str = "NVIDIA GeForce RTX 3090", total: int = 24 * GIB, **changes: Any) -> dict[str, Any]:
    """Answers of one card by NVML function; an exception is raised, what is missing is not supported."""
    answers: dict[str, Any] = {
        "nvmlDeviceGetName": name,
        "nvmlDeviceGetUUID": "GPU-11111111-aaaa",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=total, free=total - GIB, used=GIB),
        "nvmlDeviceGetCudaComputeCapability": (8, 6),
        "nvmlDeviceGetNumGpuCores": 10496,
        "nvmlDeviceGetMaxClockInfo": {1: 2100, 2: 9751},
        "nvmlDeviceGetMemoryBusWidth": 384,
        "nvmlDeviceGetCurrPcieLinkGeneration": 1,
        "nvmlDeviceGetMaxPcieLinkGeneration": 4,
        "nvmlDeviceGetCurrPcieLinkWidth": 8,
        "nvmlDeviceGetMaxPcieLinkWidth": 16,
        "nvmlDeviceGetPowerManagementLimit": 350_000,
        "nvmlDeviceGetDisplayMode": 1,
        "nvmlDeviceGetDisplayActive": 1,
        "nvmlDeviceGetComputeRunningProcesses": [],
        "nvmlDeviceGetGraphicsRunningProcesses": [],
        "instances": [],
    }
    return {**answers, **changes}


class FakeNvml:
    """pynvml over dictionaries; a handle is the dictionary itself."""

    def __init__(self, *cards: dict[str, Any], **functions: Callable[..., Any]) -> None:
        self.cards = cards
        self.functions = functions
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.cards[index]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        return f"/usr/bin/program{pid}"

    def nvmlDeviceGetMaxClockInfo(self, handle: dict[str, Any], clock: int) -> int:
        return int(handle["nvmlDeviceGetMaxClockInfo"][clock])

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> list[int]:
        if "mig" not in handle:
            raise NVMLError_NotSupported("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], index: int) -> dict[str, Any]:
        if index >= len(handle["mig"]):
            raise NVMLError_NotSupported("Not Found")
        found: dict[str, Any] = handle["mig"][index]
        return found

    def __getattribute__(self, name: str) -> Any:
        functions = object.__getattribute__(self, "__dict__").get("functions", {})
        return functions[name] if name in functions else object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def answer(handle: dict[str, Any]) -> Any:
            value = handle.get(name, NVMLError_NotSupported("Not Supported"))
            if isinstance(value, Exception):
                raise value
            return value

        return answer
