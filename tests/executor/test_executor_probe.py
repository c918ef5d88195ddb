"""`executor probe`: what is measured is kept and found; what cannot be measured or kept is one line."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from executor import cli, probe_command
from executor import probe as probing
from planner import cli as planner
from planner.inspect.probes import StoredProbe, probe_file, read_probe
from planner.inspect.system import System
from planner.machine import machine_from_gpus
from planner.render.probe import probe_table
from planner.types import Gpu, Machine, ProbeResult
from profiles.hardware import load_gpu

CARD = replace(machine_from_gpus([(load_gpu("h200"), 1)]).gpus[0], uuid="GPU-1", driver="580.1")
FIGURES = {
    "host_to_device_bytes_per_s": 55_200_000_000,
    "bf16_flops_per_s": 7 * 10**14,
    "launch_seconds": 4e-6,
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time, on a machine without a card."""

    def steps(device: Any, folder: Path) -> Iterator[Any]:
        for name, value in FIGURES.items():
            yield name, lambda r, name=name, value=value: replace(r, **{name: value})

    monkeypatch.setattr(probe_command, "probe_steps", steps)
    on_machine(monkeypatch)


def on_machine(monkeypatch: pytest.MonkeyPatch, *cards: Gpu) -> None:
    monkeypatch.setattr(probe_command, "read_machine", lambda system: Machine(origin="live", gpus=cards))
    monkeypatch.setattr(probe_command, "_device", lambda card: card and "cuda:0")


def stored(uuid: str | None = None) -> StoredProbe:
    path = probe_file(System(), uuid)
    assert path is not None
    return msgspec.json.decode(path.read_bytes(), type=StoredProbe)


# --------------------------------------------------------------------------- kept and found


def test_the_result_is_kept_for_the_card_and_its_driver(
    quick: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(monkeypatch, CARD)
    assert cli.main(["probe", "--folder", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert shown["schema"] == "fitwright.probe/1" and shown["uuid"] == "GPU-1" and shown["driver"] == "580.1"
    assert {name: shown[name] for name in FIGURES} == FIGURES
    assert printed.err.splitlines() == [f"measuring {name}" for name in FIGURES]
    notes: list[str] = []
    found = read_probe(System(), (CARD,), notes)
    assert found is not None and found.bf16_flops_per_s == 7 * 10**14 and found.date == shown["date"]
    assert read_probe(System(), (replace(CARD, uuid="GPU-2"),), notes) is None and not notes
    path = probe_file(System(), "GPU-1")
    assert path is not None and [p.name for p in path.parent.iterdir()] == ["GPU-1.json"]


def test_the_table_stands_beside_the_catalogue(
    quick: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(monkeypatch, CARD)
    assert cli.main(["probe", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "55.2 GB/s" in out and "63 GB/s" in out and "88%" in out and "4.0 µs" in out
    assert "both ways" not in out and "GPU-1.json" in out


def test_inspect_shows_the_probe_and_a_new_one_replaces_it(quick: None, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["probe", "--folder", str(tmp_path)]) == 0
    monkey = {**FIGURES, "launch_seconds": 8e-6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIGURES, "launch_seconds", monkey["launch_seconds"])
        assert cli.main(["probe", "--folder", str(tmp_path)]) == 0
    assert stored().launch_seconds == 8e-6
    capsys.readouterr()
    assert planner.main(["inspect"]) == 0
    out = capsys.readouterr().out
    if "GPU 0" not in out:
        assert f"on {stored().date}" in out and "8.0 µs" in out


def test_without_a_card_only_processor_and_disk_are_measured(tmp_path: Path) -> None:
    assert [name for name, _ in probing.probe_steps(None, tmp_path)] == [
        "matrix products on the CPU",
        "disk",
    ]


def test_a_table_has_a_row_for_what_was_measured_alone() -> None:
    table = probe_table(ProbeResult(date="2026-01-01", disk_read_bytes_per_s=10**9), None)
    assert table.row_count == 1


# --------------------------------------------------------------------------- what goes wrong


def failed(capsys: Any, *arguments: object) -> str:
    assert cli.main(["probe", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("measuring")]
    assert printed.out == "" and len(lines) == 2 and lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return " ".join(lines)


def test_a_data_folder_that_cannot_be_written(
    quick: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FITWRIGHT_HOME", str(tmp_path / "file"))
    assert "FITWRIGHT_HOME" in failed(capsys, "--folder", tmp_path)


def test_no_home_at_all(quick: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FITWRIGHT_HOME", "HOME", "XDG_DATA_HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert "no home folder" in failed(capsys, "--folder", tmp_path)


def test_a_folder_that_is_none(quick: None, tmp_path: Path, capsys: Any) -> None:
    assert "--folder DIR" in failed(capsys, "--folder", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "--folder DIR" in failed(capsys, "--folder", tmp_path / "file")


def test_no_disk_space(quick: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        probe_command.os, "statvfs", lambda folder: SimpleNamespace(f_bavail=10, f_frsize=4096)
    )
    assert "no disk space" in failed(capsys, "--folder", tmp_path)


def failing(error: Exception) -> Callable[..., Iterator[Any]]:
    def step(result: ProbeResult) -> ProbeResult:
        raise error

    def steps(device: Any, folder: Path) -> Iterator[Any]:
        yield "first", lambda r: replace(r, launch_seconds=1e-6)
        yield "second", step
        yield "third", lambda r: replace(r, disk_read_bytes_per_s=10**9)

    return steps


def test_a_disk_that_fills_up_while_measured_leaves_no_result(
    quick: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(probe_command, "probe_steps", failing(full))
    assert "No space left on device" in failed(capsys, "--folder", tmp_path)
    path = probe_file(System(), None)
    assert path is not None and not path.exists()


def test_a_card_without_free_memory_leaves_that_figure_out(
    quick: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_command, "probe_steps", failing(RuntimeError("CUDA out of memory. Tried")))
    assert cli.main(["probe", "--folder", str(tmp_path)]) == 0
    assert "second is not measured" in capsys.readouterr().err
    assert stored().launch_seconds and stored().disk_read_bytes_per_s


def test_a_torch_that_cannot_use_the_card_is_said(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(probe_command, "read_machine", lambda system: Machine(origin="live", gpus=(CARD,)))
    assert "cannot use it" in failed(capsys, "--folder", tmp_path)


# --------------------------------------------------------------------------- the disk


def test_the_disk_is_read_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "DISK_BYTES", 2 * probing.LEAST_DISK_BYTES)
    found = probing._disk(tmp_path)
    assert found["disk_read_bytes_per_s"] and found["disk_read_bytes_per_s"] > 10**6
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_gets_a_smaller_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "DISK_SECONDS", 0.0)
    began = time.monotonic()
    with probing._scratch(tmp_path, 2**40) as (path, size):
        assert size == path.stat().st_size == probing.LEAST_DISK_BYTES
    assert time.monotonic() - began < 30 and not path.exists()
