"""Described machines: budgets by hand, sizes the user names, saved files that anybody may have written."""

import json
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspect_fakes import GIB, MIB, FakeNvml, FakeSystem, card

from planner.errors import BadMachine, BadOption
from planner.inspect import inspect_machine
from planner.machine import budget, load_machine_file, machine_from_gpus, override
from planner.types import Machine
from profiles.hardware import all_gpus, gpu_ids, load_gpu


def of(*names: str, **sizes) -> Machine:
    return machine_from_gpus([(load_gpu(name), 1) for name in names], **sizes)


def budget_of(name: str, **sizes) -> int:
    return budget(of(name, **sizes).gpus[0])[0]


# nvidia-smi total, 98 % of nominal, or the GPU's share of a unified memory; 512 MiB less with a display.
BUDGETS = {
    "rtx-4090-24gb": 24564 * MIB - 512 * MIB,
    "rtx-3090-24gb": 24576 * MIB - 512 * MIB,
    "rtx-3060-8gb": int(8 * GIB * 0.98) - 512 * MIB,
    "h200-sxm-141gb": 143771 * MIB,
    "a30-pcie-24gb": int(24 * GIB * 0.98),
    "rtx-a5000-24gb": int(24 * GIB * 0.98) - 512 * MIB,
    "amd-mi300x-192gb": int(192 * GIB * 0.98),
    "apple-m3-max-64gb": 48 * GIB - 512 * MIB,
    "apple-m3-max-36gb": 27 * GIB - 512 * MIB,
    "apple-m1-16gb": int(16 * GIB * 2 / 3) - 512 * MIB,
    "amd-ryzen-ai-max-395-128gb": 64 * GIB - 512 * MIB,
    "gb10-128gb": int(128 * GIB * 0.9) - 512 * MIB,
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budget_of_a_catalogue_card(name: str):
    assert budget_of(name) == BUDGETS[name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rtx-4090", "nvidia-smi total 24.0 GiB, minus 512 MiB for the display"),
        ("h200", "nvidia-smi total 140 GiB"),
        ("amd-mi300x-192gb", "98 % of the nominal 192 GiB"),
        (
            "apple-m1-16gb",
            "10.7 GiB of 16 GiB unified memory (macOS lets the GPU use two thirds of it), "
            "minus 512 MiB for the display",
        ),
    ],
)
def test_budget_says_why(name: str, text: str):
    assert budget(of(name).gpus[0])[1] == text


def test_every_card_has_a_budget_below_its_memory():
    for profile in all_gpus():
        gpu = machine_from_gpus([(profile, 1)]).gpus[0]
        assert 0.4 * profile.memory_bytes < budget(gpu)[0] <= profile.memory_bytes


def test_budget_of_a_live_card_is_what_is_free():
    gpu = inspect_machine(FakeSystem(nvml=FakeNvml(card()))).gpus[0]
    assert budget(gpu) == (
        23 * GIB - 512 * MIB,
        "23 GiB free of 24 GiB when read, minus 512 MiB for the display",
    )


def test_reserve_replaces_the_default():
    assert budget_of("rtx-3090", reserve_bytes=2 * GIB) == 22 * GIB
    assert budget_of("rtx-3090", reserve_bytes=0) == 24 * GIB
    assert budget_of("h200", reserve_bytes=GIB) == 143771 * MIB - GIB
    assert budget(of("h200", reserve_bytes=GIB).gpus[0])[1] == "nvidia-smi total 140 GiB, minus 1 GiB reserve"


def test_reserve_that_leaves_nothing():
    with pytest.raises(BadOption, match=r"--reserve 24 GiB leaves nothing of the 24 GiB of rtx-3090-24gb"):
        of("rtx-3090", reserve_bytes=24 * GIB)


def test_reserve_above_what_is_free_leaves_nothing_but_is_no_error():
    gpu = override(inspect_machine(FakeSystem(nvml=FakeNvml(card()))), reserve_bytes=23 * GIB + 1).gpus[0]
    assert budget(gpu)[0] == 0


def test_vram_replaces_the_total_and_keeps_the_cards_reserve_and_speed():
    gpu = of("rtx-3090", vram_bytes=10 * GIB).gpus[0]
    assert (gpu.total_bytes, gpu.profile.id) == (10 * GIB, "rtx-3090-24gb")
    assert gpu.profile.bandwidth_bytes_per_s == load_gpu("rtx-3090").bandwidth_bytes_per_s
    assert budget(gpu) == (10 * GIB - 512 * MIB, "10 GiB given by --vram, minus 512 MiB for the display")
    assert budget_of("mi300x", vram_bytes=192 * GIB) == 192 * GIB, "given, so not taken for nominal"


def test_vram_alone_is_a_card_without_speed():
    gpu = machine_from_gpus([], vram_bytes=16 * GIB).gpus[0]
    assert budget(gpu) == (16 * GIB, "16 GiB given by --vram")
    assert gpu.profile.id == "vram" and gpu.profile.bandwidth_bytes_per_s is None
    assert gpu.profile.bf16 is None and gpu.profile.fp32_flops_per_s is None
    assert budget(machine_from_gpus([], vram_bytes=16 * GIB, reserve_bytes=GIB).gpus[0])[0] == 15 * GIB


def test_vram_on_a_live_card_no_longer_looks_at_what_is_free():
    live = inspect_machine(FakeSystem(nvml=FakeNvml(card())))
    gpu = override(live, vram_bytes=8 * GIB).gpus[0]
    assert gpu.free_bytes is None and budget(gpu)[0] == 8 * GIB - 512 * MIB
    assert gpu.uuid == live.gpus[0].uuid


def test_counts_number_the_cards():
    machine = machine_from_gpus([(load_gpu("rtx-3090"), 2), (load_gpu("h200"), 1)])
    assert [(gpu.index, gpu.profile.id) for gpu in machine.gpus] == [
        (0, "rtx-3090-24gb"),
        (1, "rtx-3090-24gb"),
        (2, "h200-sxm-141gb"),
    ]
    with pytest.raises(BadOption, match="more than 64 cards"):
        machine_from_gpus([(load_gpu("rtx-3090"), 40), (load_gpu("h200"), 10**12)])


def test_ram_and_disk_are_unknown_unless_named():
    assert of("rtx-3090").host.ram_total_bytes is None and of("rtx-3090").disks == ()
    machine = of("rtx-3090", ram_bytes=32 * GIB, disk_bytes=100 * GIB)
    assert (machine.host.ram_total_bytes, machine.host.ram_available_bytes) == (32 * GIB, 32 * GIB)
    assert [disk.free_bytes for disk in machine.disks] == [100 * GIB]


def test_named_sizes_replace_those_of_a_live_machine():
    live = inspect_machine(FakeSystem())
    changed = override(live, ram_bytes=GIB, disk_bytes=2 * GIB)
    assert changed.host.ram_available_bytes == GIB and changed.host.cpu == live.host.cpu
    assert [disk.free_bytes for disk in changed.disks] == [2 * GIB]
    assert override(live) == live


def test_unified_memory_leaves_the_rest_to_the_host():
    host = of("apple-m3-max-64gb").host
    assert (host.ram_total_bytes, host.ram_available_bytes) == (64 * GIB, 16 * GIB)


def test_link_of_a_catalogue_card():
    gpu = of("rtx-4060").gpus[0]
    assert (gpu.pcie_generation_max, gpu.pcie_lanes_max, gpu.pcie_generation) == (4, 8, None)


@given(st.sampled_from(gpu_ids()), st.integers(1, 2**40), st.integers(0, 2**40))
def test_budget_is_never_negative_and_never_grows_with_the_reserve(name: str, vram: int, reserve: int):
    gpus = [(load_gpu(name), 1)]
    if reserve >= vram:
        with pytest.raises(BadOption):
            machine_from_gpus(gpus, vram_bytes=vram, reserve_bytes=reserve)
        return
    less = budget(machine_from_gpus(gpus, vram_bytes=vram, reserve_bytes=reserve).gpus[0])[0]
    assert less == vram - reserve
    assert 0 <= budget(machine_from_gpus(gpus, vram_bytes=vram).gpus[0])[0] <= vram


# ----------------------------------------------------------------------------- saved machines


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    nvml = FakeNvml(card("NVIDIA Nova 1", total=20 * GIB), card())
    path = tmp_path / "machine.json"
    path.write_bytes(msgspec.json.encode(inspect_machine(FakeSystem(nvml=nvml))))
    return path


def test_saved_machine_reads_back(saved: Path):
    read = load_machine_file(saved)
    assert read.origin == "file"
    assert msgspec.structs.replace(read, origin="live") == msgspec.json.decode(
        saved.read_bytes(), type=Machine
    )
    assert budget(read.gpus[1])[0] == 23 * GIB - 512 * MIB


def test_machines_of_the_catalogue_read_back(tmp_path: Path):
    for name in gpu_ids():
        machine = of(name, ram_bytes=GIB)
        path = tmp_path / "machine.json"
        path.write_bytes(msgspec.json.encode(machine))
        assert load_machine_file(path).gpus == machine.gpus


def changed(path: Path, *keys: str | int, value: object) -> Path:
    """The saved machine with one value replaced."""
    tree = json.loads(path.read_text())
    inner = tree
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(tree))
    return path


def refused(path: Path | str) -> str:
    start = time.perf_counter()
    with pytest.raises(BadMachine) as caught:
        load_machine_file(path)
    assert time.perf_counter() - start < 1
    text = str(caught.value)
    assert text.isprintable() and len(text) < 300 and caught.value.hint
    return text


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("schema",), "fitwright.machine/9", "schema is 'fitwright.machine/9'"),
        (("schema",), 5, "schema is 5"),
        (("gpus",), "none", "Expected `array`"),
        (("gpus", 0, "total_bytes"), -1, "gpus[0].total_bytes cannot be -1"),
        (("gpus", 0, "total_bytes"), 0, "gpus[0].total_bytes cannot be 0"),
        (("gpus", 0, "total_bytes"), 1.5, "Expected `int`"),
        (("gpus", 0, "total_bytes"), 10**30, "total_bytes cannot be 1000"),
        (("gpus", 0, "total_bytes"), None, "Expected `int`"),
        (("gpus", 0, "free_bytes"), -5, "gpus[0].free_bytes cannot be -5"),
        (("gpus", 1, "profile", "bandwidth_bytes_per_s"), 0, "bandwidth_bytes_per_s cannot be 0"),
        (("gpus", 1, "profile", "memory_bytes"), 0, "memory_bytes cannot be 0"),
        (("gpus", 1, "profile", "vendor"), "acme", "Invalid enum value"),
        (("gpus", 1, "index"), 0, "not numbered"),
        (("gpus", 0, "pcie_lanes"), 0, "pcie_lanes cannot be 0"),
        (("host", "ram_total_bytes"), 2**63 - 1, "ram_total_bytes cannot be"),
        (("host", "cores"), "two", "Expected `int | null`"),
        (("disks",), [{"path": "/"}], "missing required field"),
        (("probe",), {"date": "x", "launch_seconds": -1.0}, "launch_seconds cannot be -1.0"),
        (("origin",), "elsewhere", "Invalid enum value"),
    ],
)
def test_wrong_values_are_named(saved: Path, keys: tuple[str | int, ...], value: object, told: str):
    assert told in refused(changed(saved, *keys, value=value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        "5",
        "\x00\x01",
        "{}",
        '{"schema": null}',
        "NaN",
        '{"a":' * 50_000,
        "[" * 10**6,
    ],
)
def test_what_is_no_saved_machine(tmp_path: Path, text: str):
    path = tmp_path / "machine.json"
    path.write_text(text)
    refused(path)


def test_broken_text(tmp_path: Path):
    path = tmp_path / "machine.json"
    path.write_bytes(b'{"schema": "fitwright.machine/1", "notes": ["\xff\xfe"]}')
    refused(path)


def test_deep_and_valid_at_the_top(saved: Path):
    text = saved.read_text().replace('"probe":null', '"probe":' + '{"date":' * 30_000)
    saved.write_text(text)
    refused(saved)


def test_too_many_cards_and_too_large_a_file(saved: Path):
    tree = json.loads(saved.read_text())
    tree["gpus"] *= 33
    saved.write_text(json.dumps(tree))
    assert "more than 64 cards" in refused(saved)
    saved.write_bytes(b" " * (5 * MIB))
    assert "over 4 MiB" in refused(saved)


def test_files_that_cannot_be_opened(tmp_path: Path):
    assert "No such file" in refused(tmp_path / "missing.json")
    assert "directory" in refused(tmp_path)
    assert "not a file name" in refused("\0")
    refused("x" * 5000)


@given(st.data())
def test_truncated_files_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    text = msgspec.json.encode(of("rtx-3090", "h200", ram_bytes=GIB))
    path = tmp_path_factory.mktemp("cut") / "machine.json"
    path.write_bytes(text[: data.draw(st.integers(0, len(text) - 1))])
    refused(path)
