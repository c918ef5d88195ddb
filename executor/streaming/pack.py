"""From weights to a slab file: read, quantize and write, one layer at a time.

transformers' loader does the reading, converting and quantizing, so the bytes are those of a load without
the file. Host memory holds the writer's and the reader's buffers, never the model.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor import ui
from executor.disk_errors import FULL, way_out, writing_failed
from executor.errors import CannotWrite
from executor.load import load_model
from executor.source import ModelSource
from executor.streaming.checkpoint_reader import reading_ahead
from executor.streaming.direct_io import switching_fast
from executor.streaming.loader_hooks import standing_in
from executor.streaming.loading import handing_over
from executor.streaming.slab_file import HEADER_BYTES
from executor.streaming.slab_packer import SlabPacker
from executor.streaming.slab_writer import SlabWriter
from planner.memory.stream import slabs
from planner.memory.weights import weight_bytes
from planner.types import Strategy
from planner.units import format_bytes
from profiles.architecture import architecture

_ELSEWHERE = "pack to another place: `executor pack -o FILE`"


@dataclass(frozen=True)
class PackJob:
    """What to pack, how, and where to."""

    name: str
    """To show."""
    source: ModelSource
    strategy: Strategy
    """Its precision counts."""
    device: torch.device
    """Quantizes."""
    recipe: dict[str, Any]
    path: Path
    seed: int = 0
    remote_code: bool = False


@dataclass(frozen=True)
class Packed:
    """What packing did."""

    path: Path
    bytes: int
    kept_bytes: int
    """Of the file, left by an earlier process."""
    seconds: float


def predicted_bytes(source: ModelSource, strategy: Strategy) -> int:
    """Size of the slab file, from the model's config."""
    arch = architecture(source.config)
    beside = weight_bytes(arch, strategy.quant, strategy.quant_experts, strategy.dtype)
    rest = beside.embeddings + beside.head + beside.other
    return sum(slabs(arch, strategy.quant, strategy.dtype, strategy.quant_experts)) + rest


def pack(job: PackJob, shown: bool = True) -> Packed:
    """Write the slab file, going on with what an interrupted call has left.

    `shown`: with a view of its own; else whoever shows the loading shows this.

    Errors: `CannotWrite` when the disk is full or refuses, or a folder is in the file's place;
    `DirectoryInUse` when another process is writing it; those of loading.
    """
    began = time.monotonic()
    writer = _writer(job)
    kept = writer.bytes if writer.done else 0
    title = f"packing {job.name} ({job.strategy.quant}, {job.device})"
    try:
        _show_size(job, kept)
        with ui.Steps(title) if shown else nullcontext() as steps:
            _write(job, writer, steps)
        return Packed(job.path, writer.finish(), kept, time.monotonic() - began)
    except Exception as error:
        shown_error = _as_shown(error, job, writer)
        if shown_error is error:
            raise
        raise shown_error from error
    finally:
        writer.close()


def _writer(job: PackJob) -> SlabWriter:
    if job.path.is_dir():  # found out at the end, it would cost the whole packing
        raise CannotWrite(f"cannot write {job.path}: it is a folder", f"move it away, or {_ELSEWHERE}")
    try:
        return SlabWriter(job.path, job.recipe, job.device)
    except OSError as error:
        hint = way_out(error) if error.errno in FULL else _ELSEWHERE
        raise CannotWrite(f"cannot write {error.filename or job.path}: {error.strerror}", hint) from None


def _as_shown(error: Exception, job: PackJob, writer: SlabWriter) -> Exception:
    """What says in a line that the disk takes no more; other errors as they are."""
    failure = writing_failed(error, job.path.parent, goes_on=False)
    if failure is None:
        return error
    if writer.whole_bytes <= HEADER_BYTES:
        return CannotWrite(str(failure), way_out(error))
    kept = f"{format_bytes(writer.whole_bytes)} are packed and kept: the same command goes on from there"
    return CannotWrite(str(failure), f"{way_out(error)}; {kept}")


def _show_size(job: PackJob, kept: int) -> None:
    """Say how large the file will be. Errors: `CannotWrite` when the disk has no room for it."""
    needed, free = predicted_bytes(job.source, job.strategy), shutil.disk_usage(job.path.parent).free
    if needed - kept > free:
        raise CannotWrite(
            f"{job.path} takes {format_bytes(needed)} and {job.path.parent} has {format_bytes(free)} free",
            f"free some space, or {_ELSEWHERE}",
        )
    have = f", {format_bytes(kept)} of it packed before" if kept else ""
    ui.say(f"packing {job.name} into {job.path}: {format_bytes(needed)}{have} ({format_bytes(free)} free)")


def _write(job: PackJob, writer: SlabWriter, steps: ui.Steps | None) -> None:
    def packed(done: int, total: int) -> None:
        if steps is not None:
            if steps.total is None:
                steps.count(total, "layers")
            steps.update(done, format_bytes(writer.bytes))

    packer = SlabPacker(writer, packed)
    with ExitStack() as stack:
        stack.enter_context(switching_fast())
        stack.enter_context(handing_over(packer))
        stack.enter_context(standing_in(packer.has, packer.skip))
        stack.enter_context(reading_ahead(job.source, job.device, writer.done))
        place = {"": str(job.device)}
        load_model(job.source, job.strategy, place, job.device, job.seed, job.remote_code)
        packer.finish()
