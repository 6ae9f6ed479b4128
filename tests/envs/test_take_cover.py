"""VizDoom's take cover through the adapter of gymnasium environments: episodes replay, in this process and in others."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wmcache.envs import Task, open_environment

pytest.importorskip("vizdoom")
TAKE_COVER = "vizdoom.gymnasium_wrapper:VizdoomTakeCover-v1"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViZDoom writes its settings into the working directory."""
    monkeypatch.chdir(tmp_path)


def play(seeds: list[int]) -> dict[int, tuple[int, float, str]]:
    """Return env steps, return, and a hash of all frames and columns of random episodes."""
    env, played = open_environment(TAKE_COVER, 1, 64), {}
    for seed in seeds:
        rng, digest, total, steps = np.random.default_rng(seed), hashlib.sha256(), 0.0, 0
        digest.update(env.reset([Task(seed)]).image)
        ended = False
        while not ended:
            found = env.step(np.eye(3, dtype=np.float32)[None, None, rng.integers(3)])
            for name in sorted(found):
                digest.update(np.ascontiguousarray(found[name]))
            digest.update(env.observe().image)
            total, steps, ended = total + float(found["reward"][0, 0]), steps + 1, bool(found["terminated"][0, 0])
        played[seed] = steps, total, digest.hexdigest()
    env.close()
    return played


def test_episodes_replay_from_seed_and_actions() -> None:
    played = play([0, 1, 2, 3, 4])
    assert len({digest for *_, digest in played.values()}) == 5
    assert 60 < np.mean([steps for steps, *_ in played.values()]) < 600  # about 260
    assert all(total == steps for steps, total, _ in played.values())  # 1 for each tic
    assert play([3, 1, 0, 0]) == {seed: played[seed] for seed in (3, 1, 0)}
    other = subprocess.run([sys.executable, "-P", __file__, "4", "2"], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == {str(seed): list(played[seed]) for seed in (4, 2)}


def test_its_image_is_no_column() -> None:
    env = open_environment(TAKE_COVER, 1, 64)
    assert set(env.spec.columns) == {"action", "gamevariables", "reward", "terminated", "truncated"}
    assert (env.spec.action.width, env.spec.action.discrete, env.spec.fps) == (3, True, 35)
    assert env.reset([Task(0)]).image.shape == (1, 64, 64, 3)
    env.close()


if __name__ == "__main__":  # another process, see above
    sys.stdout.write(json.dumps(play([int(word) for word in sys.argv[1:]])))
