"""File systems: which count, what they stand on, and servers that no longer answer."""

import pytest
from inspect_fakes import GIB, FakeSystem

from planner.inspect import inspect_machine
from planner.inspect.system import Partition, System
from planner.types import Disk

SIZE = (100 * GIB, 40 * GIB)


def line(path: str, filesystem: str, source: str, device: str, options: str = "rw") -> str:
    return f"20 1 {device} / {path} {options} shared:1 - {filesystem} {source} rw\n"


def disks(*lines: str, files=None, **changes) -> dict[str, Disk]:
    spaces = {text.split()[4]: SIZE for text in lines}
    spaces.update(changes.pop("spaces", {}))
    system = FakeSystem({"/proc/self/mountinfo": "".join(lines), **(files or {})}, spaces=spaces, **changes)
    return {disk.path: disk for disk in inspect_machine(system).disks}


def block(name: str, rotational: str) -> dict[str, str]:
    return {f"/sys/class/block/{name}/queue/rotational": rotational}


def test_a_partition_of_an_nvme_disk():
    files = {"/sys/class/block/nvme0n1p2/partition": "2\n"}
    links = {"/sys/class/block/nvme0n1p2": "/sys/devices/pci0/nvme/nvme0/nvme0n1/nvme0n1p2"}
    found = disks(line("/", "ext4", "/dev/nvme0n1p2", "259:2"), files=files, links=links)
    assert found["/"].kind == "nvme"
    assert (found["/"].total_bytes, found["/"].free_bytes) == SIZE
    assert (found["/"].device, found["/"].filesystem) == ("/dev/nvme0n1p2", "ext4")


@pytest.mark.parametrize(("flag", "kind"), [("0\n", "ssd"), ("1\n", "hdd"), ("", "unknown")])
def test_a_whole_disk_by_its_rotation(flag, kind):
    assert disks(line("/", "xfs", "/dev/sda", "8:0"), files=block("sda", flag))["/"].kind == kind


def test_a_volume_over_two_disks_is_as_slow_as_the_slower():
    files = {
        "/sys/class/block/dm-0/slaves/sda": "",
        "/sys/class/block/dm-0/slaves/nvme0n1": "",
        **block("sda", "1"),
    }
    links = {"/dev/mapper/vg-root": "/dev/dm-0"}
    assert (
        disks(line("/", "ext4", "/dev/mapper/vg-root", "253:0"), files=files, links=links)["/"].kind == "hdd"
    )


def test_a_volume_that_stands_on_itself_ends():
    files = {"/sys/class/block/dm-0/slaves/dm-0": ""}
    assert disks(line("/", "ext4", "/dev/dm-0", "253:0"), files=files)["/"].kind == "unknown"


def test_virtual_disks_and_overlays_do_not_tell():
    found = disks(
        line("/", "overlay", "overlay", "0:50"),
        line("/data", "ext4", "/dev/vda", "254:0"),
        files=block("vda", "1"),
    )
    assert (found["/"].kind, found["/data"].kind) == ("unknown", "unknown")


@pytest.mark.parametrize("filesystem", ["nfs4", "cifs", "lustre", "virtiofs", "9p", "fuse.sshfs"])
def test_network_file_systems(filesystem):
    assert disks(line("/mnt", filesystem, "server:/share", "0:60"))["/mnt"].kind == "network"


def test_network_file_systems_are_not_waited_for():
    text = line("/mnt", "nfs", "server:/share", "0:60") + line("/", "ext4", "/dev/sda", "8:0")
    system = FakeSystem({"/proc/self/mountinfo": text}, spaces={"/mnt": SIZE, "/": SIZE})
    inspect_machine(system)
    assert system.patience == {"/mnt": False, "/": True}


def test_a_server_that_does_not_answer_is_noted():
    class Dead(FakeSystem):
        def space(self, path: str, patient: bool = True) -> tuple[int, int]:
            raise TimeoutError("no answer")

    system = Dead({"/proc/self/mountinfo": line("/mnt", "nfs", "s:/x", "0:60")}, spaces={"/mnt": SIZE})
    found = inspect_machine(system)
    assert found.disks == () and "cannot read the space of /mnt: no answer" in found.notes


def test_giving_up_on_a_stat_that_hangs(monkeypatch):
    import shutil
    import time

    monkeypatch.setattr(shutil, "disk_usage", lambda path: time.sleep(2))
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        System().space("/", patient=False)
    assert time.perf_counter() - start < 1


def test_what_is_left_out():
    found = disks(
        line("/proc", "proc", "proc", "0:20"),
        line("/sys/fs/cgroup", "cgroup2", "cgroup2", "0:21"),
        line("/dev/shm", "tmpfs", "tmpfs", "0:22"),
        line("/snap/core", "squashfs", "/dev/loop0", "7:0", "ro"),
        line("/cd", "ext4", "/dev/sr0", "11:0", "ro,nosuid"),
        line("/boot/efi", "vfat", "/dev/sda1", "8:1"),
        line("/", "ext4", "/dev/sda2", "8:2"),
        spaces={"/boot/efi": (GIB // 2, GIB // 2)},
    )
    assert list(found) == ["/"]


def test_memory_that_holds_a_folder_that_matters_is_named():
    lines = (line("/", "ext4", "/dev/sda", "8:0"), line("/tmp", "tmpfs", "tmpfs", "0:22"))
    assert set(disks(*lines)) == {"/"}
    assert disks(*lines, places=["/tmp/x"])["/tmp"].kind == "memory"


def test_one_entry_a_file_system():
    lines = (
        line("/", "ext4", "/dev/sda", "8:0"),
        line("/bind/deep", "ext4", "/dev/sda", "8:0"),
        line("/data", "ext4", "/dev/sdb", "8:16"),
    )
    assert set(disks(*lines)) == {"/", "/data"}
    assert set(disks(*lines, places=["/bind/deep/work"])) == {"/bind/deep", "/data"}


def test_files_mounted_into_a_container_are_no_disks():
    text = line("/etc/hosts", "ext4", "/dev/sda", "8:0") + line("/", "overlay", "overlay", "0:9")
    system = FakeSystem({"/proc/self/mountinfo": text}, spaces={"/": SIZE})
    assert [disk.path for disk in inspect_machine(system).disks] == ["/"]


def test_windows_and_macos():
    parts = [
        Partition("C:\\", "C:\\", "NTFS", "rw,fixed"),
        Partition("D:\\", "D:\\", "", "cdrom"),
        Partition("Z:\\", "Z:\\", "NTFS", "rw,remote"),
    ]
    spaces = {part.path: SIZE for part in parts}
    system = FakeSystem(platform="win32", partitions=parts, spaces=spaces)
    assert {disk.path: disk.kind for disk in inspect_machine(system).disks} == {
        "C:\\": "unknown",
        "Z:\\": "network",
    }
    parts = [
        Partition("/", "/dev/disk3s1", "apfs", "ro,local"),
        Partition("/System/Volumes/Data", "/dev/disk3s5", "apfs", "rw,local"),
        Partition("/System/Volumes/VM", "/dev/disk3s6", "apfs", "rw,local"),
        Partition("/Volumes/Stick", "/dev/disk4s1", "exfat", "rw,local"),
    ]
    spaces = {part.path: SIZE for part in parts}
    system = FakeSystem(platform="darwin", partitions=parts, spaces=spaces)
    found = {disk.path: disk.kind for disk in inspect_machine(system).disks}
    assert found == {"/System/Volumes/Data": "ssd", "/Volumes/Stick": "unknown"}
