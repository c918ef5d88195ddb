"""Cards through a driver that is absent, whole, or fails in the middle."""

from types import SimpleNamespace

import pytest
from inspect_fakes import GIB, MIB, FakeNvml, FakeSystem, NVMLError, card, process

from planner.inspect import inspect_machine
from planner.machine import budget
from planner.types import Machine
from profiles.hardware import load_gpu


def machine(*cards, environment=None, memory=(64 * GIB, 60 * GIB), **functions) -> Machine:
    nvml = FakeNvml(*cards, **functions)
    found = inspect_machine(FakeSystem(nvml=nvml, environment=environment, memory=memory))
    assert nvml.open == 0, "NVML is shut down again"
    return found


def raising(error: Exception):
    def fail(*arguments):
        raise error

    return fail


def test_no_library():
    found = inspect_machine(FakeSystem(nvml=None))
    assert found.gpus == () and found.host.ram_total_bytes == 64 * GIB
    assert any("pynvml cannot be loaded (No module named 'pynvml')" in note for note in found.notes)


def test_no_driver():
    nvml = FakeNvml(nvmlInit=raising(NVMLError("NVML Shared Library Not Found")))
    found = inspect_machine(FakeSystem(nvml=nvml))
    assert found.gpus == ()
    assert "no NVIDIA driver: NVML Shared Library Not Found" in found.notes


def test_driver_without_cards():
    assert "the NVIDIA driver sees no card" in machine().notes


def test_listed_card():
    found = machine(card(nvmlDeviceGetComputeRunningProcesses=[process(7, GIB), process(4242, 5)]))
    gpu = found.gpus[0]
    assert gpu.profile is load_gpu("rtx-3090")
    assert (gpu.index, gpu.total_bytes, gpu.free_bytes) == (0, 24 * GIB, 23 * GIB)
    assert (gpu.pcie_generation, gpu.pcie_generation_max, gpu.pcie_lanes, gpu.pcie_lanes_max) == (1, 4, 8, 16)
    assert (gpu.power_limit_watts, gpu.driver, gpu.uuid) == (350, "580.65.06", "GPU-11111111-aaaa")
    assert [(p.pid, p.name, p.used_bytes) for p in gpu.processes] == [(7, "program7", GIB)]
    assert found.notes == ()


def test_processes_whose_memory_the_driver_does_not_tell():
    graphics = [process(9, None), process(8, 2**64 - 1)]
    gpu = machine(card(nvmlDeviceGetGraphicsRunningProcesses=graphics)).gpus[0]
    assert [(p.pid, p.used_bytes) for p in gpu.processes] == [(8, None), (9, None)]


def test_process_names_that_are_refused():
    seen = card(nvmlDeviceGetComputeRunningProcesses=[process(7, GIB)])
    found = machine(seen, nvmlSystemGetProcessName=raising(NVMLError("Insufficient Permissions")))
    assert found.gpus[0].processes[0].name is None


def test_display_is_held_back_only_where_one_is_connected():
    with_display = machine(card()).gpus[0]
    without = machine(card(nvmlDeviceGetDisplayMode=0, nvmlDeviceGetDisplayActive=0)).gpus[0]
    not_told = machine(
        card(nvmlDeviceGetDisplayMode=NVMLError("?"), nvmlDeviceGetDisplayActive=NVMLError("?"))
    )
    assert budget(with_display)[0] == 23 * GIB - 512 * MIB
    assert budget(without)[0] == 23 * GIB
    assert budget(not_told.gpus[0])[0] == 23 * GIB - 512 * MIB


def test_data_centre_card_holds_nothing_back():
    h200 = card("NVIDIA H200", 143771 * MIB, nvmlDeviceGetCudaComputeCapability=(9, 0))
    gpu = machine(h200).gpus[0]
    assert gpu.profile.id == "h200-sxm-141gb" and gpu.reserve_bytes == 0


@pytest.mark.parametrize(
    ("name", "mib", "capability", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, (8, 6), "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060", 8192, (8, 6), "rtx-3060-8gb"),
        ("NVIDIA GeForce RTX 4090", 49140, (8, 9), "rtx-4090-48gb-modded"),
        ("NVIDIA GeForce RTX 4090", 24564, (8, 9), "rtx-4090-24gb"),
        ("NVIDIA RTX A6000", 46068, (8, 6), "rtx-a6000-48gb"),
        ("NVIDIA H100 80GB HBM3", 81559, (9, 0), "h100-sxm5-80gb"),
        ("NVIDIA H100 PCIe", 81559, (9, 0), "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, (8, 0), "a100-sxm4-40gb"),
        ("Tesla V100-SXM2-32GB", 32510, (7, 0), "v100-sxm2-32gb"),
        ("Tesla T4", 15360, (7, 5), "t4-16gb"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 8188, (8, 9), "rtx-4070-laptop-8gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, (12, 0), "rtx-pro-6000-96gb"),
    ],
)
def test_names_and_memory_find_the_card(name, mib, capability, expected):
    found = machine(card(name, mib * MIB, nvmlDeviceGetCudaComputeCapability=capability))
    assert found.gpus[0].profile.id == expected
    assert found.gpus[0].total_bytes == mib * MIB


def test_unlisted_card_gets_its_profile_from_nvml():
    unlisted = card(
        "NVIDIA GeForce RTX 9999",
        40 * GIB,
        nvmlDeviceGetCudaComputeCapability=(8, 9),
        nvmlDeviceGetNumGpuCores=16384,
        nvmlDeviceGetMaxClockInfo={1: 2520, 2: 10501},
    )
    found = machine(unlisted)
    profile = found.gpus[0].profile
    assert (profile.id, profile.memory_basis) == ("nvidia-geforce-rtx-9999", "live")
    assert profile.bandwidth_bytes_per_s == 10501 * 10**6 * 2 * 384 // 8  # 1008 GB/s
    assert profile.fp32_flops_per_s == 16384 * 2 * 2520 * 10**6  # 82.6 TFLOPS
    assert profile.bf16_flops_per_s == pytest.approx(2 * profile.fp32_flops_per_s, rel=0.01)
    assert (profile.bf16, profile.fp8, profile.fp4) == (True, True, False)
    assert any("RTX 9999 with 40 GiB is not in the catalogue" in note for note in found.notes)


def test_name_of_a_listed_card_with_other_memory_or_capability_is_unlisted():
    assert machine(card(total=30 * GIB)).gpus[0].profile.memory_basis == "live"
    assert machine(card(nvmlDeviceGetCudaComputeCapability=(9, 9))).gpus[0].profile.memory_basis == "live"


def test_card_that_tells_little_is_still_listed():
    silent = {"nvmlDeviceGetMemoryInfo": SimpleNamespace(total=10 * GIB, free=9 * GIB)}
    found = machine(silent)
    gpu = found.gpus[0]
    assert gpu.total_bytes == 10 * GIB and gpu.profile.name == "unnamed NVIDIA card"
    assert gpu.profile.bandwidth_bytes_per_s is None and gpu.profile.bf16 is None
    assert gpu.uuid is None and gpu.pcie_generation is None
    assert any("its speed is not known" in note for note in found.notes)


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetCurrPcieLinkGeneration",
        "nvmlDeviceGetPowerManagementLimit",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetDisplayMode",
        "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetMigMode",
        "nvmlShutdown",
    ],
)
def test_an_error_in_the_middle_costs_one_field_and_leaves_a_note(function):
    nvml = FakeNvml(card(), **{function: raising(NVMLError("GPU is lost"))})
    found = inspect_machine(FakeSystem(nvml=nvml))
    assert found.gpus[0].profile.id == "rtx-3090-24gb"
    assert f"NVML {function}: GPU is lost" in found.notes


def test_a_card_that_is_lost_leaves_the_others():
    lost = card("NVIDIA L4", nvmlDeviceGetMemoryInfo=NVMLError("GPU is lost"))
    found = machine(lost, card())
    assert [(gpu.index, gpu.profile.id) for gpu in found.gpus] == [(0, "rtx-3090-24gb")]
    assert "NVIDIA L4 is left out: its memory cannot be read" in found.notes


def test_a_handle_that_fails_leaves_the_others():
    cards = [card(), card(nvmlDeviceGetUUID="GPU-2")]

    def handle(index):
        if index == 0:
            raise NVMLError("Unknown Error")
        return cards[index]

    found = machine(*cards, nvmlDeviceGetHandleByIndex=handle)
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-2"]
    assert "card 0 cannot be read and is left out" in found.notes


def test_a_library_too_old_for_a_function():
    assert machine(card(), nvmlDeviceGetNumGpuCores=raising(AttributeError("no such function"))).gpus


def test_old_libraries_answer_in_bytes():
    gpu = machine(card(nvmlDeviceGetName=b"NVIDIA GeForce RTX 3090")).gpus[0]
    assert gpu.profile.id == "rtx-3090-24gb"


def test_unified_memory_is_the_hosts():
    spark = card(
        "NVIDIA GB10",
        nvmlDeviceGetMemoryInfo=NVMLError("Not Supported"),
        nvmlDeviceGetCudaComputeCapability=(12, 1),
    )
    gpu = machine(spark, memory=(120 * GIB, 100 * GIB)).gpus[0]
    assert gpu.profile.id == "gb10-128gb"
    assert (gpu.total_bytes, gpu.free_bytes) == (120 * GIB, 100 * GIB)


def two_cards():
    return card(nvmlDeviceGetUUID="GPU-aa11"), card("Tesla T4", 15360 * MIB, nvmlDeviceGetUUID="GPU-ab22")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("0,1", ["GPU-aa11", "GPU-ab22"]),
        ("1,0", ["GPU-ab22", "GPU-aa11"]),
        ("1", ["GPU-ab22"]),
        ("GPU-ab", ["GPU-ab22"]),
        ("GPU-a", []),
        ("", []),
        ("-1", []),
        ("0,7,1", ["GPU-aa11"]),
        ("0,-1,1", ["GPU-aa11"]),
        ("0,0", ["GPU-aa11"]),
        (" 1 ", ["GPU-ab22"]),
        ("rubbish", []),
        ("9" * 5000, []),
        ("²", []),
    ],
)
def test_cuda_visible_devices(setting, expected):
    found = machine(*two_cards(), environment={"CUDA_VISIBLE_DEVICES": setting})
    assert [gpu.uuid for gpu in found.gpus] == expected
    assert [gpu.index for gpu in found.gpus] == list(range(len(expected)))
    hidden = 2 - len(expected)
    assert any("CUDA_VISIBLE_DEVICES hides" in note for note in found.notes) == bool(hidden)


def test_cards_that_differ_may_be_numbered_otherwise():
    assert any("CUDA_DEVICE_ORDER=PCI_BUS_ID" in note for note in machine(*two_cards()).notes)
    ordered = machine(*two_cards(), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert not any("CUDA_DEVICE_ORDER" in note for note in ordered.notes)


def split_card():
    part = card(
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        9728 * MIB,
        nvmlDeviceGetUUID="MIG-1",
        nvmlDeviceGetCudaComputeCapability=(8, 0),
    )
    return card("NVIDIA A100-SXM4-80GB", 80 * GIB, mig=[part, {**part, "nvmlDeviceGetUUID": "MIG-2"}])


def test_mig_instances_are_reported_as_they_are():
    found = machine(split_card())
    assert [gpu.uuid for gpu in found.gpus] == ["MIG-1", "MIG-2"]
    gpu = found.gpus[0]
    assert gpu.total_bytes == 9728 * MIB and gpu.profile.id == "nvidia-a100-sxm4-80gb-mig-1g-10gb"
    assert gpu.profile.bandwidth_bytes_per_s is None, "NVML tells the whole card's"
    assert any("split by MIG" in note for note in found.notes)


@pytest.mark.parametrize(("setting", "expected"), [("MIG-2", ["MIG-2"]), ("0", ["MIG-1"])])
def test_mig_instances_are_chosen(setting, expected):
    found = machine(split_card(), environment={"CUDA_VISIBLE_DEVICES": setting})
    assert [gpu.uuid for gpu in found.gpus] == expected


def test_every_function_asked_for_exists_in_pynvml():
    import re
    from pathlib import Path

    pynvml = pytest.importorskip("pynvml")
    text = (Path(__file__).parents[2] / "planner" / "inspect" / "nvidia.py").read_text()
    names = set(re.findall(r"nvml(?!_)[A-Z]\w+", text)) - {"nvmlDeviceGet", "nvmlDeviceGetDisplay"}
    names |= {"nvmlDeviceGetDisplayMode", "nvmlDeviceGetDisplayActive"}
    names |= {"nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"}
    assert len(names) > 15
    assert not [name for name in names if not hasattr(pynvml, name)]
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (1, 2)
