"""The available CPUs are what the tightest limit leaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from wmcache.cli import main
from wmcache.common import cgroups, cpus
from wmcache.common.cpus import available_cpus, limit_threads, own_cpus

SetLimits = Callable[[Path, str], None]


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The CPUs that this thread may run on, without other limits."""
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(cgroups, "ROOT", Path("/nowhere"))
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


@pytest.fixture
def many(affinity: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 CPUs without limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def set_v2(folder: Path, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{limit}\n")


def set_v1(folder: Path, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    quota, period = limit.split()
    (folder / "cpu.cfs_quota_us").write_text("-1\n" if quota == "max" else f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.fixture(params=["v2", "v1", "v1, with others"])
def groups(request: pytest.FixtureRequest, many: None, enter: Callable[[str], Path]) -> tuple[Path, SetLimits]:
    """The root of the groups above /job/step, and what sets a group's limit."""
    if request.param == "v2":
        return enter("0::/job/step\n"), set_v2
    name = "cpu" if request.param == "v1" else "cpu,cpuacct"
    return enter(f"7:memory:/other\n3:{name}:/job/step\n2:cpuset:/\n0::/\n") / "cpu", set_v1


def test_affinity(affinity: set[int]) -> None:
    assert available_cpus() == len(affinity)
    os.sched_setaffinity(0, {min(affinity)})
    assert available_cpus() == 1


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("400000 100000", 4), ("150000 100000", 2), ("1000 100000", 1), ("max 100000", 64), ("9900000 100000", 64)],
)
def test_a_quota_is_rounded_up(groups: tuple[Path, SetLimits], limit: str, expected: int) -> None:
    root, set_limit = groups
    set_limit(root / "job/step", limit)
    assert available_cpus() == expected


@pytest.mark.parametrize(("value", "expected"), [("8", 8), ("128", 64), ("0", 1), ("", 64), ("all", 64)])
@pytest.mark.usefixtures("many")
def test_slurm(monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", value)
    assert available_cpus() == expected


@pytest.fixture
def environment(many: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The empty environment of a process on 64 CPUs."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(cpus, "_set_here", {})
    return variables


def test_only_a_limit_of_cpus_limits_threads(environment: dict[str, str]) -> None:
    CliRunner().invoke(main, ["--version"])
    assert "OMP_NUM_THREADS" not in environment
    assert environment.items() >= cpus.SPINS.items()
    environment["SLURM_CPUS_PER_TASK"] = "6"
    CliRunner().invoke(main, ["--version"])
    assert environment["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize(("processes", "threads"), [(1, "6"), (2, "3"), (4, "1"), (7, "1")])
def test_processes_share_the_cpus(environment: dict[str, str], processes: int, threads: str) -> None:
    environment["SLURM_CPUS_PER_TASK"] = "6"
    limit_threads()
    limit_threads(processes)
    assert environment["OMP_NUM_THREADS"] == threads
    limit_threads(2)
    assert environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "variables",
    [{"OMP_NUM_THREADS": "5", "GOMP_SPINCOUNT": "7"}, {"OMP_NUM_THREADS": "9", "OMP_WAIT_POLICY": "ACTIVE"}],
)
def test_variables_of_the_user_stay(environment: dict[str, str], variables: dict[str, str]) -> None:
    environment |= variables
    limit_threads(4)
    limit_threads(2)
    assert {name: value for name, value in environment.items() if name.startswith(("OMP", "GOMP"))} == variables


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("threads", "count"), [(None, 64), ("4", 4), ("100", 64), ("0", 1), ("4,2", 64)])
def test_a_process_keeps_as_many_cpus_busy_as_it_has_threads(
    monkeypatch: pytest.MonkeyPatch, threads: str | None, count: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert own_cpus() == count
