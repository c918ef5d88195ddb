"""What stands in a run's way before it begins: decided from hand-written machines, read from this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from executor.errors import OutOfMemory
from executor.preflight import Now, Place, clear, decide
from executor.surroundings import least_versions, look, place
from planner.machine import machine_from_gpus
from planner.types import (
    Candidate,
    DiskEstimate,
    Estimate,
    Gpu,
    GpuEstimate,
    GpuProcess,
    Host,
    HostEstimate,
    Machine,
    MemoryLine,
    ModelRef,
    Plan,
    PlanModel,
    Speed,
    Stack,
    Strategy,
    Workload,
)
from planner.units import GIB
from profiles.hardware import load_gpu

STACK = Stack("2.11", "5.17", "0.50", "0.21")
INSTALLED = {"torch": "2.13.0+cu130", "transformers": "5.23.0", "bitsandbytes": "0.50.2", "peft": "0.21.2"}
NEEDS = GpuEstimate(
    index=0,
    budget_bytes=None,
    budget_basis="",
    load_bytes=5 * GIB,
    allocated_peak_bytes=9 * GIB,
    required_bytes=9 * GIB,
    context_bytes=GIB,
    process_bytes=10 * GIB,
    low_bytes=9 * GIB,
    high_bytes=11 * GIB,
    managed_bytes=0,
    peak_moment="loss",
    components=(),
)


def candidate(rank: int = 1, gpu: GpuEstimate = NEEDS, **changes: Any) -> Candidate:
    """A way that needs 10 GiB of the card, 4 GiB of RAM, and these disk lines."""
    disk = changes.pop("disk", {})
    strategy = changes.pop("strategy", Strategy(quant="nf4"))
    lines = tuple(MemoryLine(name, n, "", "counted") for name, n in disk.items())
    estimate = Estimate(
        model=ModelRef("m", 1),
        stack=STACK,
        gpus=(gpu,) if strategy.placement != "cpu" else (),
        host=changes.pop("host", HostEstimate(ram_bytes=4 * GIB)),
        disk=DiskEstimate(components=lines),
        speed=Speed(),
        verdict="fits",
    )
    engine = changes.pop("engine", strategy.engine)
    return Candidate(
        rank=rank, strategy=strategy, engine=engine, device_map={"": 0}, estimate=estimate, speed=Speed()
    )


def plan(*candidates: Candidate, work: Workload | None = None) -> Plan:
    return Plan(
        model=PlanModel(id="m", parameters=1),
        stack=STACK,
        machine=Machine(),
        workload=work or Workload(task="train"),
        candidates=candidates,
    )


def now(free_gib: float = 24, ram_gib: float = 64, **changes: Any) -> Now:
    """A card with so much free, held by two programs, and so much RAM."""
    card: Gpu = machine_from_gpus([(load_gpu("rtx-3090"), 1)]).gpus[0]
    users = (GpuProcess(7, "game", GIB), GpuProcess(9, "python3", 3 * GIB))
    card = replace(card, free_bytes=int(free_gib * GIB), processes=changes.pop("users", users))
    host = Host(ram_available_bytes=int(ram_gib * GIB), **changes.pop("host", {}))
    return Now(machine=Machine(gpus=(card,), host=host), libraries=INSTALLED, **changes)


def only(found: tuple[Any, ...]) -> Any:
    assert len(found) == 1, found
    return found[0]


def problems(way: Candidate, there: Now, **options: Any) -> tuple[Any, ...]:
    return decide(plan(way), way, there, **options)


# --------------------------------------------------------------------------- card


def test_a_machine_with_room_has_nothing_in_the_way() -> None:
    assert problems(candidate(), now()) == ()
    assert problems(candidate(), now(free_gib=11), vram_cap_bytes=None) == ()


@pytest.mark.parametrize(
    ("free", "rehearse", "fatal", "words"),
    [
        (10.5, False, False, "up to 11 GiB: tight"),
        (9.5, False, False, "it may run out of memory"),
        # data may be shorter than planned, so a run is refused only where the weights have no room
        (8.0, False, False, "it may run out of memory"),
        (8.0, True, True, "9 GiB at the very least"),
        (5.5, False, True, "6 GiB at the very least"),
    ],
)
def test_free_memory_against_the_prediction(free: float, rehearse: bool, fatal: bool, words: str) -> None:
    found = only(problems(candidate(), now(free), rehearse=rehearse))
    assert found.fatal is fatal and words in found.text and "\n" not in str(found)
    assert f"card 0 has {free:g} GiB free" in found.text and "needs 10 GiB" in found.text


def test_what_holds_the_card_is_named_largest_first() -> None:
    assert "close python3 (pid 9, 3 GiB), game (pid 7, 1 GiB)" in str(only(problems(candidate(), now(5))))
    assert "plan again" in str(only(problems(candidate(), now(5, users=()))))


def test_memory_that_nobody_here_holds_is_told_apart() -> None:
    # 24 GiB in all, 5 free, 4 held by the two that can be seen
    assert "what holds 15 GiB unseen from here" in str(only(problems(candidate(), now(5))))
    blind = (GpuProcess(7, None, None),)
    said = str(only(problems(candidate(), now(5, users=blind))))
    assert "a process (pid 7)" in said and "unseen" not in said


def test_another_card_than_the_planned_one_is_a_warning() -> None:
    way = candidate()
    planned = machine_from_gpus([(load_gpu("rtx-4090"), 1)])
    found = only(decide(replace(plan(way), machine=planned), way, now()))
    assert not found.fatal and "RTX 4090" in found.text and "RTX 3090" in found.text


def test_the_cap_stands_for_the_card_unless_less_is_free() -> None:
    capped = only(problems(candidate(), now(), vram_cap_bytes=5 * GIB))
    assert capped.fatal and "--vram-cap is 5 GiB" in capped.text and "raise it" in capped.advice
    assert problems(candidate(), now(), vram_cap_bytes=12 * GIB) == ()
    assert "card 0 has 4 GiB free" in only(problems(candidate(), now(4), vram_cap_bytes=12 * GIB)).text
    # at the predicted need exactly, a run is let go
    assert not any(p.fatal for p in problems(candidate(), now(), vram_cap_bytes=10 * GIB, rehearse=True))


def test_nothing_is_claimed_of_what_could_not_be_read() -> None:
    assert problems(candidate(), Now()) == ()
    unread = now()
    blind = replace(unread.machine.gpus[0], free_bytes=None)
    there = replace(unread, machine=replace(unread.machine, gpus=(blind,)))
    assert problems(candidate(), there) == ()
    assert only(problems(candidate(), there, vram_cap_bytes=GIB)).fatal


def test_training_needs_its_first_card_alone() -> None:
    second = replace(now().machine.gpus[0], index=1, free_bytes=GIB)
    there = replace(now(), machine=Machine(gpus=(*now().machine.gpus, second)))
    two = candidate()
    two = replace(two, estimate=replace(two.estimate, gpus=(NEEDS, replace(NEEDS, index=1))))
    assert decide(plan(two), two, there) == ()
    busy = only(decide(plan(two, work=Workload()), two, there))
    assert busy.fatal and "card 1 has 1 GiB free" in busy.text


def test_another_engine_than_the_predicted_one_is_not_judged_by_its_memory() -> None:
    assert problems(candidate(engine="stream"), now(1, 1)) == ()


# --------------------------------------------------------------------------- RAM


@pytest.mark.parametrize(
    ("ram", "swap", "fatal"), [(3.9, 0, False), (3.0, 0, True), (3.0, 8, False), (1, 2, True)]
)
def test_ram(ram: float, swap: int, fatal: bool) -> None:
    found = only(problems(candidate(), now(ram_gib=ram, host={"swap_free_bytes": swap * GIB})))
    assert (
        found.fatal is fatal and f"{ram:g}" in found.text.replace(".0 ", " ") and "needs 4 GiB" in found.text
    )


def test_pinned_memory_is_not_swapped_and_has_a_limit_of_its_own() -> None:
    way = candidate(host=HostEstimate(ram_bytes=4 * GIB, pinned_bytes=3 * GIB))
    locked = only(problems(way, now(host={"locked_limit_bytes": 2**23})))
    assert not locked.fatal and "ulimit -l" in locked.advice and "8 MiB" in locked.text
    assert problems(way, now(host={"locked_limit_bytes": None})) == ()
    assert only(problems(way, now(ram_gib=2, host={"swap_free_bytes": 64 * GIB}))).fatal
    # nothing is pinned, so the limit does not matter
    assert problems(candidate(), now(host={"locked_limit_bytes": 0})) == ()


# --------------------------------------------------------------------------- disk


DISK = {"download": 14 * GIB, "offload folder": 6 * GIB, "checkpoints": 4 * GIB, "final adapter": GIB}


def on_disks(output_gib: float, cache_gib: float, same: bool = False) -> Now:
    return now(
        output=Place("runs/x", int(output_gib * GIB), 1),
        cache=Place("hub", int(cache_gib * GIB), 1 if same else 2),
    )


def test_disks_are_judged_one_by_one_and_together_where_they_are_one() -> None:
    way = candidate(disk=DISK)
    assert problems(way, on_disks(11, 14)) == ()
    short = only(problems(way, on_disks(30, 13)))
    assert short.fatal and "hub: 13 GiB free" in short.text and "HF_HOME" in short.advice
    together = only(problems(way, on_disks(20, 20, same=True)))
    assert together.fatal and "runs/x and hub" in together.text and "25 GiB" in together.text


def test_one_checkpoint_is_sure_and_two_are_kept() -> None:
    way = candidate(disk=DISK)
    assert not only(problems(way, on_disks(9.5, 99))).fatal
    assert only(problems(way, on_disks(8.5, 99))).fatal


def test_a_rehearsal_leaves_no_checkpoints() -> None:
    assert problems(candidate(disk=DISK), on_disks(6, 99), rehearse=True) == ()
    assert only(problems(candidate(disk=DISK), on_disks(5, 99), rehearse=True)).fatal


# --------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("torch", "2.10.1", "older than the 2.11"),
        ("torch", "3.0.0", "a newer generation than the 2.11"),
        ("transformers", "5.9.0", "older than the 5.17"),
        ("torch", "2.20.0.dev1+cpu", None),
    ],
)
def test_versions_against_the_stack(name: str, version: str, words: str | None) -> None:
    there = replace(now(), libraries={**INSTALLED, name: version})
    found = problems(candidate(), there)
    if words is None:
        assert found == ()
    else:
        assert words in only(found).text and not only(found).fatal


def test_a_release_that_is_too_old_is_refused_where_it_is_needed() -> None:
    there = replace(now(), libraries={**INSTALLED, "peft": "0.9"}, least_versions={"peft": "0.19"})
    assert only(problems(candidate(), there)).fatal
    assert "pip install -U" in only(problems(candidate(), there)).advice
    assert decide(plan(work=Workload()), candidate(), there) == ()


# --------------------------------------------------------------------------- candidates


def small(rank: int) -> Candidate:
    return candidate(
        rank, replace(NEEDS, load_bytes=GIB, low_bytes=GIB, process_bytes=2 * GIB, high_bytes=3 * GIB)
    )


def test_the_first_that_may_run_comes_first_and_the_reason_is_kept() -> None:
    kept, left, warnings = clear(plan(), [candidate(1), small(2), candidate(3), small(4)], now(2.5))
    assert [way.rank for way in kept] == [2, 4]
    assert [text[:12] for text in left] == ["candidate 1:", "candidate 3:"]
    assert len(warnings) == 1 and "tight" in warnings[0]


def test_when_none_may_run_the_first_reason_is_the_error() -> None:
    with pytest.raises(OutOfMemory) as caught:
        clear(plan(), [candidate(1), candidate(2)], now(2))
    assert caught.value.exit_code == 3 and "needs 10 GiB" in str(caught.value)
    assert "all 2 candidates" in str(caught.value) and "close python3" in str(caught.value.hint)


def test_who_insists_gets_warnings_instead() -> None:
    kept, left, warnings = clear(plan(), [candidate(1)], now(2), refuse=False)
    assert [way.rank for way in kept] == [1] and left == () and "needs 10 GiB" in warnings[0]


# --------------------------------------------------------------------------- reading


def test_the_folder_that_will_be_made_has_the_file_system_of_its_parent(tmp_path: Path) -> None:
    there = place(tmp_path / "not" / "yet")
    assert there is not None and there.filesystem == tmp_path.stat().st_dev and there.free_bytes > 0
    assert not (tmp_path / "not").exists()


def test_look_reads_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path / "hub"))
    model = PlanModel(id="m", parameters=1, repo_id="Some/Model")
    seen: Callable[[bool], Now] = lambda rehearse: look(model, tmp_path / "o", rehearse)  # noqa: E731
    assert seen(False).cache is not None and seen(True).cache is None
    shards = tmp_path / "hub" / "models--Some--Model" / "snapshots" / "abc"
    shards.mkdir(parents=True)
    (shards / "model.safetensors").write_bytes(b"")
    assert seen(False).cache is None
    assert seen(False).machine.host.ram_available_bytes and seen(False).output is not None


def test_oldest_versions_are_those_the_distribution_asks_for() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = next(x for x in project["optional-dependencies"]["executor"] if x.startswith("torch"))
    assert asked == f"torch>={least_versions()['torch']}"
