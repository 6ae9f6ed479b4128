"""Memory is as much as the tightest limit leaves, whoever set it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from wmcache.common import cgroups, memory

GB = 10**9
MakeGroup = Callable[..., None]

CHILD = """
import json, mmap, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
from wmcache.common import memory
left, ram = memory.address_space_left(), memory.available_ram()
def fits(size):
    try:
        return len(mmap.mmap(-1, size)) == size
    except OSError:
        return False
half, all_of_it = (left is None or fits(left // 2)), (left is None or fits(left + 2**20))
print(json.dumps({"left": left, "ram": ram, "half": half, "all_of_it": all_of_it, "torch": "torch" in sys.modules}))
"""


def ask(limit: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(limit)], capture_output=True, text=True, timeout=60, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("limit", [GB, 3 * GB])
def test_no_more_than_the_address_space_leaves(limit: int) -> None:
    found = ask(limit)
    assert 0 < found["ram"] <= found["left"] < limit
    # So much can be had, and that is all.
    assert found["half"]
    assert not found["all_of_it"]
    # Whoever only asks need not pay for it.
    assert not found["torch"]


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY, reason="limited by others")
def test_without_a_limit_addresses_are_no_limit() -> None:
    found = ask(resource.RLIM_INFINITY)
    assert found["left"] is None
    assert found["ram"] > 0


def test_it_is_never_more_than_the_machine_has() -> None:
    assert 0 < memory.available_ram() <= psutil.virtual_memory().total


def test_the_memory_of_the_cpu_is_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_ram", lambda: 12345)
    assert memory.free_memory(torch.device("cpu")) == 12345


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """(text of /proc/self/cgroup) -> the root of a control group file system to be filled."""
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    root.mkdir()

    def as_path(name: str | Path) -> Path:
        return proc if name == "/proc/self/cgroup" else Path(name)

    def make(text: str) -> Path:
        proc.write_text(text)
        return root

    monkeypatch.setattr(cgroups, "Path", as_path)
    monkeypatch.setattr(cgroups, "ROOT", root)
    # Only what the groups say is looked at.
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    monkeypatch.setattr(memory, "address_space_left", lambda: None)
    return make


def group_v2(folder: Path, limit: int | str, used: int = 0, inactive: int = 0, active: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\ninactive_file {inactive}\nactive_file {active}\nslab 7\n")


def group_v1(folder: Path, limit: int, used: int = 0, inactive: int = 0, active: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    # What stands without `total_` is of this group without those below it.
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
    (folder / "memory.stat").write_text(stat)


@pytest.fixture(params=["v2", "v1"])
def version(request: pytest.FixtureRequest, machine: Callable[[str], Path]) -> tuple[Callable[[str], Path], MakeGroup]:
    """Of control groups: ((name of this process's group) -> root of the memory groups, function that makes a group)."""
    if request.param == "v2":
        return lambda name: machine(f"0::{name}\n"), group_v2
    other = "3:cpu,cpuacct:/elsewhere\n1:name=systemd:/elsewhere\n0::/elsewhere\n"
    return lambda name: machine(f"4:memory:{name}\n{other}") / "memory", group_v1


def test_no_control_group_is_no_limit(machine: Callable[[str], Path]) -> None:
    machine("0::/\n")
    assert memory.available_ram() == 100 * GB
    machine("")
    assert memory.available_ram() == 100 * GB


def test_a_machine_without_control_groups_has_its_own_memory(machine: Callable[[str], Path], tmp_path: Path) -> None:
    machine("")
    (tmp_path / "cgroup").unlink()
    assert memory.available_ram() == 100 * GB


@pytest.mark.parametrize("name", ["/", "/job", "/slurm/uid_0/job_1/step_0"])
def test_a_groups_limit_less_what_it_uses(version: tuple[Callable[[str], Path], MakeGroup], name: str) -> None:
    enter, make = version
    make(enter(name) / name.lstrip("/"), 10 * GB, used=3 * GB)
    assert memory.available_ram() == 7 * GB


def test_pages_of_files_are_not_used(version: tuple[Callable[[str], Path], MakeGroup]) -> None:
    enter, make = version
    make(enter("/job") / "job", 10 * GB, used=9 * GB, inactive=4 * GB, active=2 * GB)
    assert memory.available_ram() == 7 * GB
    # The counters are not read at one moment.
    make(enter("/job") / "job", 10 * GB, used=5 * GB, inactive=4 * GB, active=2 * GB)
    assert memory.available_ram() == 10 * GB


def test_a_group_that_is_full_leaves_nothing(version: tuple[Callable[[str], Path], MakeGroup]) -> None:
    enter, make = version
    make(enter("/job") / "job", 10 * GB, used=11 * GB)
    assert memory.available_ram() == 0


@pytest.mark.parametrize("tightest", range(4))
def test_the_tightest_of_all_groups_above_counts(
    version: tuple[Callable[[str], Path], MakeGroup], tightest: int
) -> None:
    enter, make = version
    root = enter("/a/b/c")
    for depth, folder in enumerate([root, root / "a", root / "a/b", root / "a/b/c"]):
        make(folder, (5 if depth == tightest else 50) * GB, used=GB)
    assert memory.available_ram() == 4 * GB


def test_a_path_that_only_the_host_knows_falls_back_to_the_groups_that_are_there(
    version: tuple[Callable[[str], Path], MakeGroup],
) -> None:
    enter, make = version
    make(enter("/docker/0123abcd"), 10 * GB, used=GB)
    assert memory.available_ram() == 9 * GB


def test_groups_beside_ours_do_not_count(version: tuple[Callable[[str], Path], MakeGroup]) -> None:
    enter, make = version
    root = enter("/ours")
    make(root / "ours", 50 * GB)
    make(root / "theirs", GB)
    make(root / "ours" / "child", GB)
    make(root.parent, GB)  # no group, but files of these names
    assert memory.available_ram() == 50 * GB


def test_max_is_no_limit(machine: Callable[[str], Path]) -> None:
    root = machine("0::/slice/job\n")
    group_v2(root / "slice/job", "max", used=GB)
    assert memory.available_ram() == 100 * GB
    group_v2(root / "slice", 20 * GB, used=GB)
    assert memory.available_ram() == 19 * GB


def test_the_largest_number_is_no_limit(machine: Callable[[str], Path]) -> None:
    root = machine("4:memory:/\n")
    group_v1(root / "memory", 9223372036854771712, used=GB)
    assert memory.available_ram() == 100 * GB


def test_groups_of_both_versions_count(machine: Callable[[str], Path]) -> None:
    root = machine("4:memory:/job\n0::/job\n")
    group_v1(root / "memory" / "job", 30 * GB)
    group_v2(root / "job", 20 * GB)
    assert memory.available_ram() == 20 * GB
    group_v1(root / "memory" / "job", 10 * GB)
    assert memory.available_ram() == 10 * GB


def test_the_machine_itself_may_be_the_tightest(
    version: tuple[Callable[[str], Path], MakeGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    enter, make = version
    make(enter("/job") / "job", 10 * GB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * GB))
    assert memory.available_ram() == 6 * GB
    monkeypatch.setattr(memory, "address_space_left", lambda: 2 * GB)
    assert memory.available_ram() == 2 * GB
