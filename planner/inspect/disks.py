"""File systems with room for weights: how much is free and what they stand on."""

from __future__ import annotations

import posixpath
import re
from typing import Literal

from planner.inspect.cgroup import Mount
from planner.inspect.host import reason
from planner.inspect.system import Partition, System
from planner.types import Disk
from planner.units import GIB

Kind = Literal["nvme", "ssd", "hdd", "network", "memory", "unknown"]

_SLOWEST_FIRST: tuple[Kind, ...] = ("unknown", "hdd", "ssd", "nvme")
_LOCAL = {
    *("apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "ntfs", "ntfs3"),
    *("overlay", "reiserfs", "vfat", "xfs", "zfs"),
}
_NETWORK = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
    *("pvfs2", "smb3", "smbfs", "vboxsf", "virtiofs", "webdav"),
}
_MEMORY = {"tmpfs", "ramfs"}
_LEAST_BYTES = GIB
_LONGEST_CHAIN = 8


def inspect_disks(system: System, mounts: list[Mount], notes: list[str]) -> tuple[Disk, ...]:
    """Every writable file system of at least 1 GiB, by path. File systems in memory are left out unless they
    hold the working folder, home, the temporary folder or the Hugging Face cache."""
    try:
        wanted = _linux_mounts(system, mounts) if mounts else _other_mounts(system)
    except Exception as error:
        notes.append(f"cannot list the disks: {reason(error)}")
        return ()
    disks = []
    for mount in wanted:
        kind = _kind(system, mount)
        try:
            total, free = system.space(mount.path, kind != "network")
        except Exception as error:
            notes.append(f"cannot read the space of {mount.path}: {reason(error)}")
            continue
        if total >= _LEAST_BYTES:
            disk = Disk(
                path=mount.path,
                total_bytes=total,
                free_bytes=free,
                kind=kind,
                device=mount.device or None,
                filesystem=mount.filesystem,
            )
            disks.append(disk)
    return tuple(sorted(disks, key=lambda disk: disk.path))


def _linux_mounts(system: System, mounts: list[Mount]) -> list[Partition]:
    """One mount a file system: one that holds a folder that matters, else the one with the shortest path."""
    real = [mount for mount in mounts if _is_real(mount) and system.is_folder(mount.path)]
    places = {_holder(place, mounts) for place in map(system.resolve, system.places())}
    chosen: dict[str, Mount] = {}
    for mount in sorted(real, key=lambda mount: (mount.path not in places, len(mount.path), mount.path)):
        key = mount.path if mount.filesystem in _MEMORY else mount.device
        if mount.filesystem not in _MEMORY or mount.path in places:
            chosen.setdefault(key, mount)
    return [Partition(mount.path, mount.source, mount.filesystem, "") for mount in chosen.values()]


def _is_real(mount: Mount) -> bool:
    known = mount.filesystem in _LOCAL | _NETWORK | _MEMORY or mount.filesystem.startswith("fuse.")
    return known and "ro" not in mount.options


def _holder(place: str, mounts: list[Mount]) -> str | None:
    """The mount point a folder lies on: the longest one above it."""
    above = [mount.path for mount in mounts if (place + "/").startswith(mount.path.rstrip("/") + "/")]
    return max(above, key=len, default=None)


def _other_mounts(system: System) -> list[Partition]:
    found = system.partitions()
    usable = [
        part for part in found if part.filesystem and not {"ro", "cdrom"} & set(part.options.split(","))
    ]
    return [
        part for part in usable if not part.path.startswith("/System/Volumes/") or part.path.endswith("/Data")
    ]


def _kind(system: System, mount: Partition) -> Kind:
    if mount.filesystem in _MEMORY:
        return "memory"
    if mount.filesystem in _NETWORK or "remote" in mount.options.split(","):
        return "network"
    if system.platform == "darwin":
        # Every Mac with Apple silicon has flash inside; what is plugged in from outside shows under /Volumes.
        return "unknown" if mount.path.startswith("/Volumes/") else "ssd"
    if not mount.device.startswith("/dev/"):
        return "unknown"
    return _device_kind(system, posixpath.basename(system.resolve(mount.device)))


def _device_kind(system: System, name: str, depth: int = 0) -> Kind:
    """nvme, ssd or hdd by what the kernel knows of a block device, through LVM, RAID and encryption."""
    below = system.names(f"/sys/class/block/{name}/slaves")
    if below and depth < _LONGEST_CHAIN:
        kinds = {_device_kind(system, device, depth + 1) for device in below}
        return next(kind for kind in _SLOWEST_FIRST if kind in kinds)
    if system.read(f"/sys/class/block/{name}/partition") is not None:
        name = posixpath.basename(posixpath.dirname(system.resolve(f"/sys/class/block/{name}")))
    if name.startswith("nvme"):
        return "nvme"
    if re.match(r"x?vd|pmem|loop|rbd|nbd", name):
        # Virtual disks: what they say of rotation is a default, not a fact.
        return "unknown"
    rotational = (system.read(f"/sys/class/block/{name}/queue/rotational") or "").strip()
    return "ssd" if rotational == "0" else "hdd" if rotational == "1" else "unknown"
