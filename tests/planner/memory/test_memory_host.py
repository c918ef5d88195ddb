"""RAM and disk, line by line."""

from __future__ import annotations

import pytest
from memory_cases import known, tiny
from msgspec.structs import replace

from planner.memory.host import CHECKPOINTS_KEPT, checkpoint_bytes, disk_space, download_bytes, host_memory
from planner.memory.optimizer import StateBytes
from planner.memory.overheads import process_ram
from planner.types import Strategy, Workload

MIB = 2**20
NOTHING = {
    "in_ram_bytes": 0,
    "managed_bytes": 0,
    "pinned_bytes": 0,
    "largest_tensor_bytes": 0,
    "saved_bytes": 0,
}


def amounts(host) -> dict[str, int]:
    return {line.name: line.bytes for line in host.components}


def test_a_process_alone() -> None:
    for on_card in (True, False):
        host = host_memory(on_card=on_card, **NOTHING)
        assert amounts(host) == {"process": process_ram(on_card)} and host.ram_bytes == process_ram(on_card)
    assert process_ram(True) > process_ram(False) > 200 * MIB


def test_every_line_adds_up() -> None:
    host = host_memory(
        on_card=True, in_ram_bytes=10 * MIB, managed_bytes=20 * MIB, pinned_bytes=30 * MIB,
        largest_tensor_bytes=40 * MIB, saved_bytes=5 * MIB, run_bytes=50 * MIB,
    )  # fmt: skip
    assert host.ram_bytes == process_ram(True) + (10 + 20 + 30 + 40 + 50) * MIB
    assert host.pinned_bytes == 30 * MIB
    assert amounts(host)["loading or saving"] == 40 * MIB  # not both: one happens after the other


def test_saving_a_whole_model_outweighs_one_tensor() -> None:
    host = host_memory(on_card=True, **{**NOTHING, "largest_tensor_bytes": MIB, "saved_bytes": 9 * MIB})
    assert amounts(host)["loading or saving"] == 9 * MIB


STATE = StateBytes(device=300, managed=700, temporary=5_000)


@pytest.mark.parametrize(
    ("method", "dtype", "adapter", "expected"),
    [
        ("full", "bf16", "fp32", 2 * 10_000 + 1_000),
        ("full", "fp32", "fp32", 4 * 10_000 + 1_000),
        ("lora", "bf16", "fp32", 4 * 40 + 1_000),
        ("qlora", "bf16", "bf16", 2 * 40 + 1_000),
    ],
)
def test_a_checkpoint_is_what_is_trained_and_its_state(
    method: str, dtype: str, adapter: str, expected: int
) -> None:
    work = Workload(task="train", method=method, adapter_dtype=adapter)
    assert checkpoint_bytes(10_000, 40, work, Strategy(dtype=dtype), STATE) == expected


@pytest.mark.parametrize(
    ("stored", "quantized", "expected"),
    [
        ("bfloat16", None, 2_000),
        ("float32", None, 4_000),
        ("bfloat16", "mxfp4", 531),
        ("bfloat16", "fp8", 1_012),
    ],
)
def test_downloads_follow_the_published_checkpoint(stored: str, quantized: str | None, expected: int) -> None:
    arch = replace(tiny(), dtype=stored, pretrained_quantization=quantized)
    assert download_bytes(arch, 1_000) == expected


def test_qwen_downloads_15_gb() -> None:
    assert download_bytes(known("qwen2.5-7b"), 7_615_616_512) == 15_231_233_024


def test_disk_of_generation_is_the_download_and_the_offload_folder() -> None:
    disk = disk_space(tiny(), 1_000, Workload(task="infer"), 500, 999, 999)
    assert amounts(disk) == {"download": 2_000, "offload folder": 500} and disk.bytes == 2_500


@pytest.mark.parametrize(("method", "what"), [("full", "final model"), ("qlora", "final adapter")])
def test_disk_of_training_adds_two_checkpoints_and_the_result(method: str, what: str) -> None:
    disk = disk_space(tiny(), 1_000, Workload(task="train", method=method), 0, 300, 40)
    assert amounts(disk) == {"download": 2_000, "checkpoints": CHECKPOINTS_KEPT * 300, what: 40}
