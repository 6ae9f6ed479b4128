"""Policies on the command line: trained, resumed and evaluated like world models, beside baselines, and from another package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wmcache.trainer.train import train

from .conftest import TINY, error_of, run, succeed

TRAIN = "wmtrain --cache {store} --out {run} --width 16 --depth 1 --batch-size 8 --device cpu --dtype float32"
PLAN = "wmplan --run {run} --episodes 2 --budget 10 --device cpu --json"
QUICK = f"{PLAN} --horizon 2 --samples 6 --elites 2 --iterations 1"
PACKAGE = '''
import torch
from wmcache.planner.policies import PLAN_POLICIES


@PLAN_POLICIES.register("push")
class Push:
    """Pushes to the right."""

    reads = "nothing"

    def __init__(self, context, options):
        self.seconds, self.encoder_frames, self.decisions = 0.0, 0, 0
        self.shape = (options.execute, context.model.shape.action_dim)

    def reset(self, goal, generators):
        self.episodes = len(generators)

    def observe(self, observation):
        pass

    def act(self):
        self.decisions += self.episodes
        return torch.tensor([1.0, 0.0]).repeat(self.episodes, self.shape[0], self.shape[1] // 2)
'''


@pytest.fixture(scope="module")
def model_run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world model."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    train(store_path, path, TINY)
    return path


@pytest.mark.parametrize("kind", ["gcbc", "gc-idm"])
def test_a_policy_is_trained_resumed_and_evaluated(store_path: Path, tmp_path: Path, kind: str) -> None:
    paths = {"store": store_path, "run": tmp_path / "run"}
    succeed(f"{TRAIN} --model {kind} --steps 2", **paths)
    succeed(f"{TRAIN} --model {kind} --steps 4 --resume", **paths)
    results = json.loads(succeed(PLAN, **paths).stdout)
    assert (results["policy"], results["reads_state"], results["replans"]) == ("actor", False, 4)
    assert list(results["baselines"]) == ["random", "zero"]
    folder = tmp_path / "run/plan-all-x1-device-cpu-2x10"
    assert "actor" in (folder / "report.html").read_text()
    other = error_of(run(f"{PLAN} --policy mpc", **paths))
    assert str(tmp_path / "run") in other
    world = error_of(run("wmcache imagine --run {run} --decoder {run} --cache {store}", **paths))
    assert str(tmp_path / "run") in world


def test_baselines_are_reported_beside_the_planner(model_run: Path, tmp_path: Path) -> None:
    line = f"{QUICK} --out {tmp_path / 'plan'}"
    first = json.loads(succeed(f"{line} --baselines zero,expert,untrained", run=model_run).stdout)
    assert list(first["baselines"]) == ["zero", "expert", "untrained"]
    # The same evaluation beside other baselines.
    again = json.loads(succeed(f"{line} --baselines random --untrained", run=model_run).stdout)
    assert list(again["baselines"]) == ["random", "untrained"]
    assert again["by_threshold"] == first["by_threshold"]
    assert again["baselines"]["untrained"] == first["baselines"]["untrained"]


def test_a_reference_is_marked(model_run: Path, tmp_path: Path) -> None:
    line = f"{PLAN} --policy expert --out {tmp_path / 'plan'}"
    results = json.loads(succeed(line, run=model_run).stdout)
    assert (results["policy"], results["reads_state"], results["encoder_frames"]) == ("expert", True, 0)
    table = succeed(line.replace(" --json", ""), run=model_run).stdout.splitlines()
    assert table[1].split()[:2] == ["0.5", "expert"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--policy actor", "{run}"),
        ("--policy pmc", "'pmc'"),
        ("--baselines mpc", "--baselines mpc"),
        ("--baselines zero,unknown", "--baselines zero,unknown"),
    ],
)
def test_what_does_not_suit_the_run_is_refused(model_run: Path, tmp_path: Path, flags: str, named: str) -> None:
    error = error_of(run(f"{PLAN} --out {tmp_path / 'plan'} {flags}", run=model_run))
    assert named.format(run=model_run) in error
    assert not (tmp_path / "plan").exists()


def test_a_policy_of_another_package_acts(model_run: Path, tmp_path: Path) -> None:
    info = tmp_path / "pushing-1.dist-info"
    info.mkdir()
    (tmp_path / "pushing.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pushing\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[wmcache.plan_policies]\npush = pushing\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = PLAN.format(run=model_run).split()[1:]
    script = "from wmcache import cli; cli.wmplan()"
    out = ["--policy", "push", "--baselines", "push,zero", "--out", str(tmp_path / "plan")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words, *out],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    assert (results["policy"], list(results["baselines"])) == ("push", ["zero"])
    assert results["operations_per_decision"] == 0
