"""Copies of a slow environment in worker processes: the same numbers, and no process that is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import Replay, Task, gym, open_environment

COUNT = 3

OWNER = """
import sys, time
import numpy as np
from wmcache.envs import Task, gym, open_environment
gym.SLOW, gym.own_cpus = 0.0, lambda: 2
env = open_environment(sys.argv[1], 3, 16)
env.reset([Task(1), Task(2), Task(3)]).image
print("ready", flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every environment is slow, and there are two CPUs."""
    monkeypatch.setattr(gym, "SLOW", 0.0)
    monkeypatch.setattr(gym, "own_cpus", lambda: 2)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", ["{package}:Dots-v0", "gym:Reacher-v5", "gym:Reacher-v5+colors@1"])
def test_processes_give_the_same_numbers_and_end(user_package: str, name: str) -> None:
    name, before = name.format(package=user_package), len(children())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "own_cpus", lambda: 1)
        here = open_environment(name, COUNT, 16)
    there = open_environment(name, COUNT, 16)
    lead = np.full((3, here.spec.action.width), 0.5, np.float32)
    tasks = [Task(4), Task(Replay(5, lead)), Task(6)]
    actions = np.random.default_rng(0).uniform(-0.9, 0.9, (COUNT, 4, here.spec.action.width)).astype(np.float32)
    for _ in range(2):
        first, second = here.reset(tasks), there.reset(tasks)
        np.testing.assert_array_equal(first.image, second.image)
        assert len(children()) == before + 2
        moved = there.step(actions)
        for column, values in here.step(actions).items():
            np.testing.assert_array_equal(values, moved[column])
            assert values.dtype == moved[column].dtype
        first, second = here.observe(), there.observe()
        np.testing.assert_array_equal(first.image, second.image)
        for column, values in first.columns.items():
            np.testing.assert_array_equal(values, second.columns[column])
    if there.spec.renders_states:
        columns = there.spec.columns
        parts = [first.columns[name][:1] for name in sorted(first.columns) if "state" in columns[name].roles]
        np.testing.assert_array_equal(there.render(np.concatenate(parts, 1)), first.image[:1])
    for env in (here, there):
        env.close()
        env.close()
    assert len(children()) == before


@pytest.mark.usefixtures("slow")
def test_a_fault_of_a_copy_or_its_process_is_one_line(user_package: str) -> None:
    broken = open_environment(f"{user_package}:Broken-v0", 2, 16)
    broken.reset([Task(0), Task(1)])
    with pytest.raises(UserError, match="no motor"):
        broken.step(np.zeros((2, 1, 2), np.float32))
    broken.close()
    before = {child.pid for child in children()}
    env = open_environment(f"{user_package}:Dots-v0", 2, 16)
    env.reset([Task(0), Task(1)])
    worker = next(child for child in children() if child.pid not in before)
    worker.kill()
    with pytest.raises(UserError, match=r"Dots-v0 died.*-9"):
        env.step(np.zeros((2, 1, 2), np.float32))
    assert {child.pid for child in children()} == before
    env.close()


@pytest.mark.usefixtures("slow")
def test_an_environment_that_only_this_process_knows_stays_here(user_package: str) -> None:
    gymnasium.register(id="OnlyHere-v0", entry_point=f"{user_package}:Dots")
    env, before = open_environment("gym:OnlyHere-v0", 2, 16), len(children())
    assert env.reset([Task(0), Task(1)]).image.shape == (2, 16, 16, 3)
    assert len(children()) == before
    env.close()


@pytest.mark.parametrize("end", ["kill", "interrupt", "exit"])
def test_no_process_outlives_the_one_that_started_it(user_package: str, end: str) -> None:
    words = [sys.executable, "-c", OWNER, f"{user_package}:Dots-v0", "exit" if end == "exit" else "wait"]
    path = os.pathsep.join([str(Path(sys.modules[user_package].__file__ or "").parent), *sys.path])
    owner = subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    workers = psutil.Process(owner.pid).children()
    assert len(workers) == 2 or end == "exit"
    if end != "exit":
        owner.send_signal(signal.SIGKILL if end == "kill" else signal.SIGINT)
    _, errors = owner.communicate(timeout=30)
    assert ("Traceback" in errors) == (end == "interrupt")  # its own, and none of a worker
    assert errors.count("Traceback") <= 1
    deadline = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
