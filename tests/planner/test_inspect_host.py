"""RAM, swap and processors inside control groups of both versions, on three operating systems."""

import time

import pytest
from inspect_fakes import GIB, MIB, FakeSystem

from planner.inspect import System, inspect_machine
from planner.inspect.cgroup import cpu_limit, memory_limit, read_mounts
from planner.types import Host, Machine

V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "35 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


def system(files: dict[str, str], **changes) -> FakeSystem:
    return FakeSystem({"/proc/self/cgroup": "0::/\n", **files}, **changes)


def host(files: dict[str, str], **changes) -> Host:
    return inspect_machine(system(files, **changes)).host


def v2(group: str, **files: str) -> dict[str, str]:
    folder = f"/sys/fs/cgroup{group}"
    return {f"{folder}/{name.replace('_', '.', 1)}": text for name, text in files.items()}


def test_no_groups_leave_the_machines_memory():
    found = host({})
    assert (found.ram_total_bytes, found.ram_available_bytes) == (64 * GIB, 60 * GIB)
    assert (found.swap_total_bytes, found.swap_free_bytes, found.cores) == (8 * GIB, 8 * GIB, 16)
    assert found.locked_limit_bytes == 8 * MIB


def test_version_2_limit_and_usage():
    files = {
        "/proc/self/mountinfo": V2_MOUNT,
        "/proc/self/cgroup": "0::/job\n",
        **v2("/job", memory_max=f"{16 * GIB}\n", memory_current=f"{6 * GIB}\n"),
        "/sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {2 * GIB}\nactive_file 5\n",
    }
    found = host(files)
    assert found.ram_total_bytes == 16 * GIB
    assert found.ram_available_bytes == 12 * GIB, "16 - 6 used + 2 of file cache that can go"


def test_version_2_nested_groups_the_least_holds():
    files = {
        "/proc/self/mountinfo": V2_MOUNT,
        "/proc/self/cgroup": "0::/outer/inner\n",
        **v2("/outer/inner", memory_max=f"{32 * GIB}", memory_current=f"{GIB}"),
        **v2("/outer", memory_max=f"{24 * GIB}", memory_current=f"{20 * GIB}"),
        **v2("", memory_max="max", memory_current="0"),
    }
    found = host(files)
    assert (found.ram_total_bytes, found.ram_available_bytes) == (24 * GIB, 4 * GIB)


def test_version_2_without_limit():
    files = {
        "/proc/self/mountinfo": V2_MOUNT,
        "/proc/self/cgroup": "0::/job",
        **v2("/job", memory_max="max\n", memory_high="max\n", memory_current="5"),
        **v2("/job", memory_swap="x"),
    }
    assert host(files).ram_total_bytes == 64 * GIB


def test_version_2_soft_limit_counts():
    files = {
        "/proc/self/mountinfo": V2_MOUNT,
        **v2("", memory_max=f"{16 * GIB}", memory_high=f"{12 * GIB}", memory_current="0"),
    }
    assert host(files).ram_total_bytes == 12 * GIB


def test_limit_above_the_machines_memory_does_not_matter():
    files = {"/proc/self/mountinfo": V2_MOUNT, **v2("", memory_max=f"{999 * GIB}", memory_current="0")}
    assert host(files).ram_total_bytes == 64 * GIB
    assert host(files).ram_available_bytes == 60 * GIB


def test_version_2_swap_limit():
    files = {"/proc/self/mountinfo": V2_MOUNT, "/sys/fs/cgroup/memory.swap.max": "0\n"}
    assert (host(files).swap_total_bytes, host(files).swap_free_bytes) == (0, 0)


def test_container_whose_group_is_the_root_of_its_mount():
    mount = "30 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    files = {
        "/proc/self/mountinfo": mount,
        "/proc/self/cgroup": "0::/docker/abc/child",
        **v2("", memory_max=f"{8 * GIB}", memory_current="0"),
        **v2("/child", memory_max=f"{9 * GIB}", memory_current="0"),
    }
    assert host(files).ram_total_bytes == 8 * GIB


@pytest.mark.parametrize("group", ["/../../elsewhere", "/nowhere", "", "/docker/abcd"])
def test_group_outside_of_the_mount_reads_the_mounts_root(group):
    mount = "30 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    files = {
        "/proc/self/mountinfo": mount,
        "/proc/self/cgroup": f"0::{group}",
        **v2("", memory_max=f"{8 * GIB}", memory_current="0"),
    }
    assert host(files).ram_total_bytes == 8 * GIB


def test_version_1_nested_limits():
    folder = "/sys/fs/cgroup/memory"
    files = {
        "/proc/self/mountinfo": V1_MOUNTS,
        "/proc/self/cgroup": "9:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n",
        f"{folder}/a/b/memory.limit_in_bytes": f"{9223372036854771712}\n",
        f"{folder}/a/memory.limit_in_bytes": f"{10 * GIB}\n",
        f"{folder}/a/memory.usage_in_bytes": f"{7 * GIB}\n",
        f"{folder}/a/memory.stat": f"total_inactive_file {GIB}\nhierarchical_memory_limit {10 * GIB}\n",
        f"{folder}/a/memory.memsw.limit_in_bytes": f"{11 * GIB}\n",
        f"{folder}/memory.limit_in_bytes": "9223372036854771712\n",
    }
    found = host(files)
    assert (found.ram_total_bytes, found.ram_available_bytes) == (10 * GIB, 4 * GIB)
    assert found.swap_total_bytes == GIB


def test_version_1_limit_of_a_group_that_cannot_be_seen():
    stat = f"hierarchical_memory_limit {5 * GIB}\n"
    files = {"/proc/self/mountinfo": V1_MOUNTS, "/sys/fs/cgroup/memory/memory.stat": stat}
    assert host(files).ram_total_bytes == 5 * GIB


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 16),
        ("400000 100000", 4),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("", 16),
        ("x y", 16),
    ],
)
def test_version_2_processor_time(quota, cores):
    assert host({"/proc/self/mountinfo": V2_MOUNT, "/sys/fs/cgroup/cpu.max": quota}).cores == cores


def test_version_1_processor_time():
    folder = "/sys/fs/cgroup/cpu,cpuacct/a"
    files = {
        "/proc/self/mountinfo": V1_MOUNTS,
        "/proc/self/cgroup": "9:cpu,cpuacct:/a\n",
        f"{folder}/cpu.cfs_quota_us": "250000\n",
        f"{folder}/cpu.cfs_period_us": "100000\n",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    assert host(files).cores == 2
    assert cpu_limit(system(files), read_mounts(system(files))) == 2.5


def test_affinity_below_the_quota_holds():
    files = {"/proc/self/mountinfo": V2_MOUNT, "/sys/fs/cgroup/cpu.max": "800000 100000"}
    assert host(files, cores=3).cores == 3


def test_damaged_tables_are_no_limit():
    files = {"/proc/self/mountinfo": "nonsense\n1 2 3\n - - -\n" + V2_MOUNT, "/proc/self/cgroup": "??\n:\n"}
    damaged = system({**files, "/sys/fs/cgroup/memory.max": "-5", "/sys/fs/cgroup/memory.current": "9" * 99})
    assert memory_limit(damaged, read_mounts(damaged)) == (None, None, None)


def test_paths_with_blanks():
    mount = "30 24 0:26 / /sys/fs/c\\040group rw - cgroup2 cgroup2 rw\n"
    assert read_mounts(system({"/proc/self/mountinfo": mount}))[0].path == "/sys/fs/c group"


def test_processor_names():
    cpuinfo = "processor\t: 0\nmodel name\t: AMD  EPYC 9454\nflags\t: x\n"
    assert host({"/proc/cpuinfo": cpuinfo}).cpu == "AMD EPYC 9454"
    assert host({"/proc/cpuinfo": "processor : 0\n"}).cpu == "x86_64"
    assert host({}, platform="win32").cpu == "x86_64"


class Broken(FakeSystem):
    """A computer that refuses everything."""

    def memory(self):
        raise PermissionError("no /proc")

    def swap(self):
        raise RuntimeError

    def cores(self):
        raise OSError("no affinity")

    def describe(self):
        raise OSError("no name")

    def read(self, path, limit=0):
        raise ValueError("files are\nforbidden")

    def places(self):
        raise FileNotFoundError("the working folder is gone")

    def partitions(self):
        raise OSError("no table")


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_nothing_that_fails_raises(platform):
    found = inspect_machine(Broken(platform=platform))
    assert found.gpus == () and found.disks == () and found.host.ram_total_bytes is None
    assert "cannot read RAM: no /proc" in found.notes
    assert "cannot read swap space: RuntimeError" in found.notes
    assert all("\n" not in note for note in found.notes)


def apple(sysctl: dict[str, str] | None = None, total: int = 36 * GIB, free: int = 30 * GIB) -> Machine:
    chip = {"machdep.cpu.brand_string": "Apple M3 Max", **(sysctl or {})}
    return inspect_machine(FakeSystem(platform="darwin", memory=(total, free), sysctl=chip))


def test_apple_chip_of_the_catalogue():
    found = apple()
    gpu = found.gpus[0]
    assert gpu.profile.id == "apple-m3-max-36gb" and gpu.profile.unified_memory
    assert (gpu.total_bytes, gpu.free_bytes) == (36 * GIB, 27 * GIB), "macOS lets it use three quarters"
    assert found.notes == ()


def test_apple_limit_that_was_set_and_ram_in_use():
    assert apple({"iogpu.wired_limit_mb": "20480"}).gpus[0].free_bytes == 20 * GIB
    assert apple({"iogpu.wired_limit_mb": "0"}).gpus[0].free_bytes == 27 * GIB
    assert apple(free=5 * GIB).gpus[0].free_bytes == 5 * GIB


def test_apple_chip_with_memory_nobody_listed():
    found = apple(total=40 * GIB)
    profile = found.gpus[0].profile
    assert (profile.memory_bytes, profile.memory_basis) == (40 * GIB, "live")
    assert profile.bandwidth_bytes_per_s == 400 * 10**9
    assert any("not in the catalogue" in note for note in found.notes)


def test_apple_chip_nobody_listed():
    profile = apple({"machdep.cpu.brand_string": "Apple M99"}).gpus[0].profile
    assert (profile.id, profile.vendor, profile.unified_memory) == ("apple-m99", "apple", True)
    assert profile.bandwidth_bytes_per_s is None


def test_mac_with_intel_processor():
    found = apple({"machdep.cpu.brand_string": "Intel(R) Core(TM) i7"})
    assert found.gpus == () and any("no Apple silicon" in note for note in found.notes)


def test_this_computer_is_read_quickly():
    inspect_machine()
    start = time.perf_counter()
    found = inspect_machine()
    took = time.perf_counter() - start
    assert found.host.ram_total_bytes and found.host.cores and found.host.cpu
    assert found.origin == "live"
    assert found.gpus or took < 0.5


def test_own_readings_of_this_computer_agree():
    real = System()
    total, available = real.memory()
    found = inspect_machine(real).host
    assert 0 < available <= total and 0 < found.ram_total_bytes <= total
    assert real.read("/no/such/file") is None and real.names("/no/such/folder") == []
    assert real.space(real.places()[0])[0] > 0
    assert real.space(real.places()[0], patient=False)[0] > 0
