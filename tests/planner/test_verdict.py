"""Verdicts at their edges, and the reasons that go with them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from planner.types import (
    Disk,
    DiskEstimate,
    GpuEstimate,
    Host,
    HostEstimate,
    Machine,
    MemoryLine,
    PlacementMap,
    Strategy,
    Workload,
)
from planner.verdict import judge

GIB = 2**30
CARD = GpuEstimate(
    index=0, budget_bytes=24 * GIB, budget_basis="", load_bytes=0, allocated_peak_bytes=0, required_bytes=0,
    context_bytes=0, process_bytes=20 * GIB, low_bytes=19 * GIB, high_bytes=22 * GIB, managed_bytes=0,
    peak_moment="loss", components=(),
)  # fmt: skip
ENOUGH = Machine(host=Host(ram_total_bytes=64 * GIB, ram_available_bytes=64 * GIB))
RAM = HostEstimate(ram_bytes=4 * GIB)
ON_GPU = PlacementMap(device_map={"": 0}, layers_on_gpu=28)


def verdict(
    *cards: GpuEstimate,
    machine: Machine = ENOUGH,
    host: HostEstimate = RAM,
    disk: DiskEstimate | None = None,
    how: Strategy | None = None,
    work: Workload | None = None,
    placement: PlacementMap = ON_GPU,
):
    return judge(
        machine, cards, host, disk or DiskEstimate(), how or Strategy(), work or Workload(), placement
    )


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (22 * GIB + 1, "fits"),
        (22 * GIB, "fits"),  # the high end, to the byte
        (22 * GIB - 1, "tight"),
        (19 * GIB, "tight"),  # the low end, to the byte
        (19 * GIB - 1, "does_not_fit"),
        (0, "does_not_fit"),
        (None, "unknown"),
    ],
)
def test_a_card_against_its_budget(budget: int | None, expected: str) -> None:
    found, reasons = verdict(replace(CARD, budget_bytes=budget))
    assert found == expected
    assert reasons[0].startswith("card 0 needs 20.00 GiB (19.00 GiB to 22.00 GiB)")


def test_reasons_say_what_is_spare_or_missing() -> None:
    assert "4.00 GiB to spare" in verdict(CARD)[1][0]
    assert "may or may not run" in verdict(replace(CARD, budget_bytes=20 * GIB))[1][0]
    assert "3.00 GiB short at least" in verdict(replace(CARD, budget_bytes=16 * GIB))[1][0]
    assert "not known" in verdict(replace(CARD, budget_bytes=None))[1][0]


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ((24, 24), "fits"),
        ((24, 20), "tight"),
        ((20, 16), "does_not_fit"),
        ((16, None), "does_not_fit"),
        ((20, None), "unknown"),
    ],
)
def test_the_worst_card_decides(budgets: tuple[int | None, ...], expected: str) -> None:
    cards = [
        replace(CARD, index=i, budget_bytes=None if n is None else n * GIB) for i, n in enumerate(budgets)
    ]
    found, reasons = verdict(*cards)
    assert found == expected
    worst = next(i for i, card in enumerate(cards) if verdict(card)[0] == expected)
    assert reasons[0].startswith(f"card {worst} ")


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (4.6 * GIB + 1, "fits"),  # 15 % more than needed
        (4.5 * GIB, "tight"),
        (3.5 * GIB, "tight"),
        (3.3 * GIB, "does_not_fit"),
    ],
)
def test_ram_has_an_interval_of_its_own(available: float, expected: str) -> None:
    machine = Machine(host=Host(ram_total_bytes=int(available), ram_available_bytes=int(available)))
    assert verdict(CARD, machine=machine)[0] == expected
    assert verdict(machine=machine, how=Strategy(placement="cpu"))[0] == expected


def test_total_ram_stands_in_for_what_is_available() -> None:
    machine = Machine(host=Host(ram_total_bytes=2 * GIB))
    assert verdict(CARD, machine=machine)[0] == "does_not_fit"


def test_unknown_ram_leaves_a_cpu_job_unknown_and_a_card_alone() -> None:
    assert verdict(machine=Machine(), how=Strategy(placement="cpu"))[0] == "unknown"
    assert verdict(CARD, machine=Machine())[0] == "fits"


FULL_DISK = Machine(
    host=ENOUGH.host,
    disks=(
        Disk(path="/", total_bytes=100 * GIB, free_bytes=10 * GIB, kind="nvme"),
        Disk(path="/dev/shm", total_bytes=100 * GIB, free_bytes=90 * GIB, kind="memory"),
    ),
)
FOLDER = DiskEstimate(components=(MemoryLine("offload folder", 20 * GIB, "", "counted"),))


def test_disk_decides_only_where_layers_live_there() -> None:
    on_disk = Strategy(placement="disk_offload")
    found, reasons = verdict(CARD, machine=FULL_DISK, disk=FOLDER, how=on_disk)
    assert found == "does_not_fit" and "10.00 GiB free" in reasons[0]  # what is in memory is no disk
    found, reasons = verdict(CARD, machine=FULL_DISK, disk=FOLDER)
    assert found == "fits" and any("needs 20.00 GiB of disk" in text for text in reasons)
    assert verdict(CARD, disk=FOLDER, how=on_disk)[0] == "fits"  # no disk was looked at


def test_where_layers_stay_is_said() -> None:
    ram = PlacementMap(layers_on_gpu=20, layers_in_ram=8)
    assert any("8 of 28 layers stay in RAM" in text for text in verdict(CARD, placement=ram)[1])
    disk = PlacementMap(layers_on_gpu=20, layers_on_disk=8)
    assert any("8 of 28 layers stay on disk" in text for text in verdict(CARD, placement=disk)[1])


def test_training_on_two_cards_is_two_replicas() -> None:
    work = Workload(task="train")
    assert any("replica" in text for text in verdict(CARD, replace(CARD, index=1), work=work)[1])
    assert not any("replica" in text for text in verdict(CARD, work=work)[1])


def test_reasons_come_worst_first_and_none_is_empty() -> None:
    machine = Machine(host=Host(ram_available_bytes=GIB))
    found, reasons = verdict(replace(CARD, budget_bytes=20 * GIB), machine=machine)
    assert found == "does_not_fit" and "RAM" in reasons[0] and "card 0" in reasons[1]
    assert all(reasons)
