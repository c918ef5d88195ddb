"""What a disk reads and writes a second, past what the page cache holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PROBED = 4 * 2**30
STRETCH = 16 * 2**20
THREADS = (1, 4, 8)


def drop(paths: list[Path]) -> None:
    """Have nothing of these files in the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(paths: list[Path]) -> float:
    """Bytes per second of the best way to read these files in a row, cold: direct or not, 1 to 8 threads."""
    return max(_reading(paths, threads, direct) for threads in THREADS for direct in (True, False))


def _reading(paths: list[Path], threads: int, direct: bool) -> float:
    from executor.streaming.direct_io import DirectFile, aligned_memory

    drop(paths)
    files = [DirectFile(path) for path in paths]
    places = [(file, at) for file in files for at in range(0, file.size() - STRETCH, STRETCH)][
        : PROBED // STRETCH
    ]
    buffers = {number: aligned_memory(STRETCH + 1) for number in range(threads)}

    def work(number: int) -> None:
        target: torch.Tensor = buffers[number][:STRETCH] if direct else buffers[number][1:]
        for file, at in places[number::threads]:
            assert file.read(target, at) == STRETCH

    seconds = _together(work, threads)
    for file in files:
        file.close()
    return len(places) * STRETCH / seconds


def write_rate(folder: Path) -> float:
    """Bytes per second of direct writes of random bytes by four threads, fsync included."""
    from executor.streaming.direct_io import DirectFile, aligned_memory

    path = folder / "probe"
    source = aligned_memory(STRETCH)
    source.copy_(torch.randint(0, 256, (STRETCH,), dtype=torch.uint8))
    with DirectFile(path, writable=True) as file:

        def work(number: int) -> None:
            for at in range(number * STRETCH, PROBED, 4 * STRETCH):
                file.write(source, at)
            if number == 0:
                file.flush()

        began = time.perf_counter()
        _together(work, 4)
        file.flush()
        seconds = time.perf_counter() - began
    path.unlink()
    return PROBED / seconds


def _together(work: Callable[[int], None], threads: int) -> float:
    """Seconds until all threads are done."""
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return time.perf_counter() - began
