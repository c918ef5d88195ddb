"""`executor probe`: what this machine's link, memory, arithmetic and disk really do, measured once.

Every rate is the best of a few repetitions on buffers large enough to leave caches behind, on random data
(zeros run faster). Rates are bytes or operations per second. The result is kept where `inspect`, `check`
and `plan` find it (`planner.inspect.probes`).
"""

from __future__ import annotations

import datetime
import errno
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from planner.types import ProbeResult
from planner.units import GIB

COPY_BYTES = GIB
DISK_BYTES = GIB
DISK_BLOCK = 8 * 2**20
DISK_THREADS = 4
DISK_BLOCKS_AT_ONCE = 8
DISK_SECONDS = 4.0
LEAST_DISK_BYTES = DISK_BLOCKS_AT_ONCE * DISK_BLOCK
"""The whole probe takes under half a minute: on a slow disk, writing ends early, with at least this much."""
REPEATS = 5
MATRIX = 8192
LAUNCHES = 2000

Step = tuple[str, Callable[[ProbeResult], ProbeResult]]


def probe_steps(device: Any, folder: Path) -> Iterator[Step]:
    """The measurements one by one, each with its name and what it fills in.

    `device`: a CUDA device or None. `folder`: on the disk that is measured.
    """
    if device is not None:
        yield "link, pinned", lambda r: replace(r, **_pinned(device))
        yield "link, pageable", lambda r: replace(r, pageable_bytes_per_s=_pageable(device))
        yield "link, both ways", lambda r: replace(r, duplex_bytes_per_s=_duplex(device))
        yield "card memory", lambda r: replace(r, device_bandwidth_bytes_per_s=_device_memory(device))
        for name in ("bf16", "fp16", "fp32"):
            yield (
                f"matrix products, {name}",
                lambda r, name=name: replace(r, **{f"{name}_flops_per_s": _matmul(device, name)}),
            )
        yield "matrix products, int8", lambda r: replace(r, int8_ops_per_s=_int8_matmul(device))
        yield "kernel launches", lambda r: replace(r, launch_seconds=_launch(device))
    else:
        yield "matrix products on the CPU", lambda r: replace(r, fp32_flops_per_s=_cpu_matmul())
    yield "disk", lambda r: replace(r, **_disk(folder))


def empty_result(driver: str | None) -> ProbeResult:
    """A result of today with nothing measured yet."""
    return ProbeResult(date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), driver=driver)


# --------------------------------------------------------------------------- the link and the card


def _best(device: Any, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Least seconds of `work` on the card's own clock."""
    import torch

    work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


def _room(device: Any, wanted: int, share: float = 0.25) -> int:
    """Bytes a buffer may take: no more than a share of what is free, in whole MiB."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return max(2**20, min(wanted, int(free * share)) // 2**20 * 2**20)


def _buffers(device: Any, pinned: bool) -> tuple[Any, Any]:
    import torch

    n = _room(device, COPY_BYTES)
    host = torch.empty(n, dtype=torch.uint8, pin_memory=pinned)
    host.random_()
    return host, torch.empty(n, dtype=torch.uint8, device=device)


def _pinned(device: Any) -> dict[str, int]:
    host, card = _buffers(device, pinned=True)
    up = _best(device, lambda: card.copy_(host, non_blocking=True))
    down = _best(device, lambda: host.copy_(card, non_blocking=True))
    n = host.numel()
    return {"host_to_device_bytes_per_s": int(n / up), "device_to_host_bytes_per_s": int(n / down)}


def _pageable(device: Any) -> int:
    host, card = _buffers(device, pinned=False)
    return int(host.numel() / _best(device, lambda: card.copy_(host), 3))


def _duplex(device: Any) -> int:
    import torch

    host, card = _buffers(device, pinned=True)
    back, source = torch.empty_like(host, pin_memory=True), torch.empty_like(card)
    source.random_()
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def work() -> None:
        now = torch.cuda.current_stream(device)
        up.wait_stream(now)
        down.wait_stream(now)
        with torch.cuda.stream(up):
            card.copy_(host, non_blocking=True)
        with torch.cuda.stream(down):
            back.copy_(source, non_blocking=True)
        now.wait_stream(up)
        now.wait_stream(down)

    return int(2 * host.numel() / _best(device, work))


def _device_memory(device: Any) -> int:
    """Bytes read plus bytes written of a large copy inside the card."""
    import torch

    n = _room(device, 4 * GIB)
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    source.random_()
    return int(2 * n / _best(device, lambda: target.copy_(source)))


def _matmul(device: Any, name: str) -> int | None:
    """Operations per second of a square product, float32 without TF32; None where the card lacks the
    dtype."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if name == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    side = MATRIX if name != "fp32" else MATRIX // 2
    while 3 * side * side * dtype.itemsize > _room(device, 4 * GIB):
        side //= 2
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return int(2 * side**3 / _best(device, lambda: torch.mm(a, b, out=out), 3))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept


def _int8_matmul(device: Any) -> int | None:
    import torch

    side = MATRIX // 2
    a, b = (torch.randint(-127, 127, (side, side), device=device, dtype=torch.int8) for _ in range(2))
    try:
        return int(2 * side**3 / _best(device, lambda: torch._int_mm(a, b.t()), 3))
    except RuntimeError:  # cards without int8 tensor cores refuse
        return None


def _launch(device: Any) -> float:
    """Seconds of one tiny kernel launched from Python, one after the other."""
    import torch

    x = torch.zeros(1, device=device)
    for _ in range(100):
        x.add_(1)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        x.add_(1)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / LAUNCHES


def _cpu_matmul() -> int:
    import torch

    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return int(2 * side**3 / min(times))


# --------------------------------------------------------------------------- disk


def _disk(folder: Path) -> dict[str, int | None]:
    """Sequential reads of a file the page cache has forgotten: buffered, and past the cache with threads."""
    free = os.statvfs(folder)
    size = min(DISK_BYTES, free.f_bavail * free.f_frsize // 4) // DISK_BLOCK * DISK_BLOCK
    if size < LEAST_DISK_BYTES:
        return {}
    with _scratch(folder, size) as (path, size):
        buffered = size / _seconds(lambda: _read_buffered(path))
        try:
            direct: int | None = int(size / _seconds(lambda: _read_direct(path, size)))
        except OSError:  # file systems in memory and some network ones have no direct reads
            direct = None
    return {"disk_read_bytes_per_s": int(buffered), "disk_direct_bytes_per_s": direct}


@contextmanager
def _scratch(folder: Path, size: int) -> Iterator[tuple[Path, int]]:
    """A file of random bytes, on disk and out of the page cache, and its size; gone afterwards. A slow disk
    gets a smaller file."""
    descriptor, name = tempfile.mkstemp(prefix=".fitwright-probe-", dir=folder)
    try:
        block = os.urandom(DISK_BLOCK)
        written, end = 0, time.monotonic() + DISK_SECONDS
        while written < size and (written < LEAST_DISK_BYTES or time.monotonic() < end):
            for _ in range(DISK_BLOCKS_AT_ONCE):
                written += os.write(descriptor, block)
            os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(name), written
    finally:
        os.close(descriptor)
        os.unlink(name)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _read_buffered(path: Path) -> None:
    buffer = bytearray(DISK_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_direct(path: Path, size: int) -> None:
    """Threads read their own stretches with O_DIRECT into page-aligned memory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    errors: list[OSError] = []

    def stretch(first: int) -> None:
        buffer = mmap.mmap(-1, DISK_BLOCK)
        try:
            for offset in range(first * DISK_BLOCK, size, DISK_THREADS * DISK_BLOCK):
                if os.preadv(descriptor, [buffer], offset) != DISK_BLOCK:
                    raise OSError(errno.EIO, "a read came back short")  # its rate would count what is missing
        except OSError as error:
            errors.append(error)

    try:
        threads = [threading.Thread(target=stretch, args=(i,)) for i in range(DISK_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(descriptor)
    if errors:
        raise errors[0]
