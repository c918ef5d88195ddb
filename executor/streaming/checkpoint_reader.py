"""Reading a checkpoint ahead of transformers' loader, straight to the card.

The loader asks for one tensor after the other, in the natural order of their names. Threads read ahead of it
in that order, past the page cache, into a few page-locked buffers, so that the disk works while the card
quantizes. A tensor asked for out of turn (experts are) is read when it is asked for, and one that the loader
has passed by, as it does where the model lacks a key of its checkpoint, is let go.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor.errors import BadWeights
from executor.merge_write import Stored, read_shards
from executor.source import ModelSource
from executor.streaming.direct_io import (
    ALIGNMENT,
    STRETCH_BYTES,
    THREADS,
    Copied,
    DirectFile,
    Staging,
    copied,
)
from executor.streaming.loader_hooks import reading_instead

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


_BUFFERS = 4 * THREADS
"""256 MiB: as far as the disk may be ahead of the card."""


@contextmanager
def reading_ahead(source: ModelSource, device: torch.device, skip: Collection[str]) -> Iterator[None]:
    """Within, transformers' loader gets the tensors of the checkpoint from threads that read ahead.

    `skip`: names that it will not ask for. On the CPU the files are mapped, as ever: what is copied from
    there to a file takes no memory of its own.
    """
    if source.folder is None or _maps(device):
        yield
        return
    reader = CheckpointReader(source.folder, device)
    try:
        with reading_instead(lambda unread: reader.begin(unread, skip)):
            yield
    finally:
        reader.close()


def _maps(device: torch.device) -> bool:
    return device.type != "cuda"


@dataclass(frozen=True)
class _Part:
    """A piece of a file that goes through one buffer: `first` and `last` are multiples of 4096."""

    name: str
    first: int
    last: int


class CheckpointReader:
    """The tensors of the checkpoint in `folder`, on `device`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device = device
        self._files: dict[Path, DirectFile] = {}
        self._places: dict[str, tuple[DirectFile, Stored]] = {}
        for shard in read_shards(folder):
            file = self._files[shard.path] = DirectFile(shard.path)
            self._places |= {name: (file, stored) for name, stored in shard.tensors.items()}
        self._staging = Staging(device, _BUFFERS, STRETCH_BYTES)
        self._own = Staging(device, 1, STRETCH_BYTES)
        self._pool = ThreadPoolExecutor(2 * THREADS, thread_name_prefix="checkpoint-reader")
        self._ahead: deque[tuple[str, list[Future[torch.Tensor]]]] = deque()
        self._to_read: deque[tuple[_Part, Future[torch.Tensor]]] = deque()
        self._turn, self._ending = threading.Lock(), threading.Lock()
        self._copying: list[tuple[Copied, torch.Tensor, Staging]] = []
        self._out_of_turn: set[str] = set()
        self._misses = 0
        self._stopped = False

    def begin(self, unread: dict[str, Any], skip: Collection[str]) -> dict[str, Any]:
        """Begin to read; returns an entry that waits for its tensor for each of `unread`."""
        known = {name for name in unread if name in self._places and self._stored(name).dtype in _DTYPES}
        for name in sorted(known.difference(skip), key=_natural):
            coming = [(part, Future[torch.Tensor]()) for part in _parts(name, self._stored(name))]
            self._to_read.extend(coming)
            self._ahead.append((name, [future for _, future in coming]))
        for _ in range(len(self._to_read)):
            self._pool.submit(self._fetch_next)
        return {
            name: _Unread(self, name, entry) if name in known else entry for name, entry in unread.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the device. Errors: `BadWeights` where its file ends early, `OSError`."""
        stored = self._stored(name)
        flat = torch.empty(stored.bytes, dtype=torch.uint8, device=self._device)
        self._catch_up(name)
        if self._ahead and self._ahead[0][0] == name:
            for part, buffer in zip(_parts(name, stored), self._next(), strict=True):
                self._copy(part, buffer, flat, self._staging)
            self._misses = 0
        else:
            self._out_of_turn.add(name)
            for part in _parts(name, stored):
                self._release(wait=True)
                self._copy(part, self._fetch(part, self._own.take()), flat, self._own)
        return flat.view(_DTYPES[stored.dtype]).view(stored.shape)

    def _catch_up(self, name: str) -> None:
        """Let go of tensors that stand before `name` and are not to come.

        They would keep all buffers for good. Some have been read out of turn. Others belong to a layer or
        module before that of `name`, and the loader, whose order is not wholly known, has passed them by: of
        these one is let go, and with every further miss in a row twice as many. One that is asked for after
        all is read again.
        """
        while self._ahead and self._ahead[0][0] in self._out_of_turn:
            self._let_go()
        if not self._ahead or self._ahead[0][0] == name:
            return
        for _ in range(2**self._misses):
            if not self._ahead or _group(self._ahead[0][0]) >= _group(name):
                return
            self._let_go()
        self._misses += 1

    def _let_go(self) -> None:
        for buffer in self._next():
            self._staging.give(buffer)

    def _next(self) -> Iterator[torch.Tensor]:
        """Buffers with the parts of the tensor that is next in order."""
        futures = self._ahead[0][1]
        while futures:
            if not futures[0].done():
                self._release(wait=True)  # its thread may wait for a buffer
            buffer = futures[0].result()
            del futures[0]  # what an error leaves is given back by `close`
            yield buffer
        self._ahead.popleft()

    def _copy(self, part: _Part, buffer: torch.Tensor, flat: torch.Tensor, origin: Staging) -> None:
        start, size = self._stored(part.name).start, len(flat)
        begin, end = max(part.first - start, 0), min(part.last - start, size)
        lead = start + begin - part.first
        flat[begin:end].copy_(buffer[lead : lead + end - begin], non_blocking=True)
        self._copying.append((copied(self._device), buffer, origin))
        self._release(wait=False)

    def _release(self, wait: bool) -> None:
        """Give back the buffers whose copies have ended."""
        while self._copying and (wait or self._copying[0][0].query()):
            end, buffer, origin = self._copying.pop(0)
            end.synchronize()
            origin.give(buffer)

    def _fetch_next(self) -> None:
        with self._turn:  # a part gets its buffer before all later ones: the loader waits for the first
            buffer = self._staging.take()
            if self._stopped:
                self._staging.give(buffer)
                return
            part, future = self._to_read.popleft()
        try:
            self._fetch(part, buffer)
        except BaseException as error:
            self._staging.give(buffer)
            future.set_exception(error)
            return
        with self._ending:
            if self._stopped:
                self._staging.give(buffer)
            else:
                future.set_result(buffer)

    def _fetch(self, part: _Part, buffer: torch.Tensor) -> torch.Tensor:
        file, stored = self._places[part.name]
        read = file.read(buffer[: part.last - part.first], part.first)
        if part.first + read < min(part.last, stored.start + stored.bytes):
            raise BadWeights(f"{file.path} ends early: it was changed while it was read")
        return buffer

    def _stored(self, name: str) -> Stored:
        return self._places[name][1]

    def close(self) -> None:
        """Stop reading and let go of everything."""
        with self._ending:
            self._stopped = True
        self._release(wait=True)
        for _, futures in self._ahead:
            for future in futures:
                if future.done() and future.exception() is None:
                    self._staging.give(future.result())
        self._pool.shutdown(cancel_futures=True)
        self._staging.close()
        self._own.close()
        for file in self._files.values():
            file.close()


class _Unread:
    """Looks to the loader like an unread slice of a safetensors file."""

    def __init__(self, reader: CheckpointReader, name: str, entry: Any) -> None:
        self._reader, self._name, self._entry = reader, name, entry

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._reader.read(self._name)[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)


def _parts(name: str, stored: Stored) -> list[_Part]:
    """The pages that hold a tensor, cut to buffers."""
    end = -(-(stored.start + stored.bytes) // ALIGNMENT) * ALIGNMENT
    first = stored.start // ALIGNMENT * ALIGNMENT
    return [_Part(name, at, min(at + STRETCH_BYTES, end)) for at in range(first, end, STRETCH_BYTES)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Layer 2 before layer 10, as the loader has it."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _group(name: str) -> list[tuple[int, int | str]]:
    """What `name` is read with: its layer's name, or all of its own where it is in no layer."""
    key = _natural(name)
    numbers = [place for place, (kind, _) in enumerate(key) if kind == 0]
    return key[: numbers[0] + 1] if numbers else key
