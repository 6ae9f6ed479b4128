"""Available memory is what the tightest limit leaves."""

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

from wmcache.common import memory

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


def measure(limit: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(limit)], capture_output=True, text=True, timeout=60, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("limit", [GB, 3 * GB])
def test_the_address_space_limits_memory(limit: int) -> None:
    found = measure(limit)
    assert 0 < found["ram"] <= found["left"] < limit
    assert found["half"]
    assert not found["all_of_it"]
    assert not found["torch"]


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY, reason="limited outside")
def test_the_address_space_may_be_unlimited() -> None:
    found = measure(resource.RLIM_INFINITY)
    assert found["left"] is None
    assert found["ram"] > 0


def test_the_memory_of_the_cpu_is_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory.available_ram() <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "available_ram", lambda: 12345)
    assert memory.free_memory(torch.device("cpu")) == 12345


@pytest.fixture
def machine(enter: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`enter`, with 100 GB of memory."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    monkeypatch.setattr(memory, "address_space_left", lambda: None)
    return enter


def group_v2(folder: Path, limit: int | str, used: int = 0, inactive: int = 0, active: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\ninactive_file {inactive}\nactive_file {active}\nslab 7\n")


def group_v1(folder: Path, limit: int, used: int = 0, inactive: int = 0, active: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    # Values without `total_` leave out the groups below.
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
    (folder / "memory.stat").write_text(stat)


@pytest.fixture(params=["v2", "v1"])
def version(request: pytest.FixtureRequest, machine: Callable[[str], Path]) -> tuple[Callable[[str], Path], MakeGroup]:
    """((name of this process's group) -> root of the memory groups, function that makes a group)."""
    if request.param == "v2":
        return lambda name: machine(f"0::{name}\n"), group_v2
    other = "3:cpu,cpuacct:/elsewhere\n1:name=systemd:/elsewhere\n0::/elsewhere\n"
    return lambda name: machine(f"4:memory:{name}\n{other}") / "memory", group_v1


def test_without_control_groups_the_machine_limits_memory(machine: Callable[[str], Path], tmp_path: Path) -> None:
    for text in ("0::/\n", ""):
        machine(text)
        assert memory.available_ram() == 100 * GB
    (tmp_path / "cgroup").unlink()
    assert memory.available_ram() == 100 * GB


@pytest.mark.parametrize(
    ("name", "made", "used", "cached", "left"),
    [
        ("/", "", 3, 0, 7),
        ("/slurm/uid_0/job_1/step_0", "slurm/uid_0/job_1/step_0", 3, 0, 7),
        ("/docker/0123abcd", "", 3, 0, 7),  # of the host
        # Cached pages of files are not usage; the counters are not read at one moment, so they may be larger.
        ("/job", "job", 9, 6, 7),
        ("/job", "job", 5, 6, 10),
        ("/job", "job", 11, 0, 0),
    ],
)
def test_a_group_leaves_its_limit_minus_its_usage(
    version: tuple[Callable[[str], Path], MakeGroup], name: str, made: str, used: int, cached: int, left: int
) -> None:
    enter, make = version
    make(enter(name) / made, 10 * GB, used=used * GB, inactive=cached // 3 * GB, active=cached // 3 * 2 * GB)
    assert memory.available_ram() == left * GB


@pytest.mark.parametrize("tightest", range(4))
def test_the_tightest_of_all_groups_above_the_machine_and_the_process_counts(
    version: tuple[Callable[[str], Path], MakeGroup], monkeypatch: pytest.MonkeyPatch, tightest: int
) -> None:
    enter, make = version
    root = enter("/a/b/c")
    for depth, folder in enumerate([root, root / "a", root / "a/b", root / "a/b/c"]):
        make(folder, (5 if depth == tightest else 50) * GB, used=GB)
    for other in (root / "beside", root / "a/b/c/below", root.parent / "not-a-group"):
        make(other, GB)
    assert memory.available_ram() == 4 * GB
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * GB))
    assert memory.available_ram() == 3 * GB
    monkeypatch.setattr(memory, "address_space_left", lambda: 2 * GB)
    assert memory.available_ram() == 2 * GB


def test_max_and_the_largest_number_are_not_limits(machine: Callable[[str], Path]) -> None:
    root = machine("0::/slice/job\n")
    group_v2(root / "slice/job", "max", used=GB)
    assert memory.available_ram() == 100 * GB
    group_v2(root / "slice", 20 * GB, used=GB)
    assert memory.available_ram() == 19 * GB
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
