"""Host RAM and disk of a run, page cache not counted.

RAM: the process itself, offloaded weights, managed (paged) optimizer state, and what loading and saving
hold for a moment. Disk: download, offload folder, checkpoints, the final adapter or model.
"""

from __future__ import annotations

from planner.memory.moments import line
from planner.memory.optimizer import StateBytes
from planner.memory.overheads import process_ram
from planner.memory.weights import WIDTH
from planner.types import DiskEstimate, HostEstimate, MemoryLine, Strategy, Workload
from profiles.schema import Architecture

CHECKPOINTS_KEPT = 2
"""The last finished checkpoint stays until the next one is complete."""

_STORED = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
_STORED_BITS = {
    "fp8": 8.1,
    "mxfp4": 4.25,
    "bitsandbytes-nf4": 4.6,
    "bitsandbytes-fp4": 4.6,
    "bitsandbytes-int8": 8.3,
    "awq": 4.3,
    "gptq": 4.3,
    "compressed-tensors": 4.5,
}


def host_memory(
    *,
    on_card: bool,
    managed_bytes: int,
    pinned_bytes: int,
    in_ram_bytes: int = 0,
    streamed: tuple[MemoryLine, ...] = (),
    largest_tensor_bytes: int = 0,
    saved_bytes: int = 0,
    run_bytes: int = 0,
) -> HostEstimate:
    """Peak RAM. `streamed`: page-locked memory of engine stream; `run_bytes`: allocated peak of a run on the
    CPU itself."""
    lines = (
        line("process", process_ram(on_card), "Python, torch and libraries", "measured"),
        line("offloaded weights", in_ram_bytes, "layers kept in RAM, unquantized under accelerate"),
        *streamed,
        line("run", run_bytes, "weights, activations and cache on the CPU", "modelled"),
        line("offloaded cache or checkpoints", pinned_bytes, "pinned, copied to the card and back"),
        line("paged optimizer state", managed_bytes, "managed memory: RAM stands behind it"),
        line(
            "loading or saving",
            max(largest_tensor_bytes, saved_bytes),
            "the larger of one tensor in flight and a checkpoint being written",
            "modelled",
        ),
    )
    kept = tuple(item for item in lines if item.bytes)
    return HostEstimate(
        ram_bytes=sum(item.bytes for item in kept),
        pinned_bytes=pinned_bytes + sum(item.bytes for item in streamed),
        components=kept,
    )


def checkpoint_bytes(
    arch_parameters: int, trained: int, work: Workload, how: Strategy, state: StateBytes | None
) -> int:
    """One training checkpoint: trained weights and their optimizer state."""
    width = WIDTH[how.dtype] if work.method == "full" else WIDTH[work.adapter_dtype]
    weights = arch_parameters * width if work.method == "full" else trained * width
    return weights + (state.device + state.managed if state else 0)


def download_bytes(arch: Architecture, parameters: int) -> int:
    """Bytes of the published checkpoint."""
    bits = _STORED_BITS.get(arch.pretrained_quantization or "")
    if bits is not None:
        return int(parameters * bits / 8)
    return parameters * _STORED.get(arch.dtype, 2)


def disk_space(
    arch: Architecture, parameters: int, work: Workload, on_disk_bytes: int, checkpoint: int, final: int
) -> DiskEstimate:
    """Everything a job writes, with the download."""
    lines: list[MemoryLine] = [
        line(
            "download",
            download_bytes(arch, parameters),
            f"{parameters:,} parameters as published ({arch.dtype})",
        ),
        line(
            "offload folder",
            on_disk_bytes,
            "layers that stream from disk, or experts that accelerate's offload puts together",
        ),
    ]
    if work.task == "train":
        lines.append(
            line(
                "checkpoints",
                CHECKPOINTS_KEPT * checkpoint,
                f"{CHECKPOINTS_KEPT} at a time: weights trained and optimizer state",
            )
        )
        what = "model" if work.method == "full" else "adapter"
        lines.append(line(f"final {what}", final, f"the {what} a finished run leaves"))
    return DiskEstimate(components=tuple(item for item in lines if item.bytes))
