"""Rope and Granular: pushes, states, frames and distance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import Environment, Task, open_environment
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import FrameDataset

HALF, REACH = 3.0, 2.6
HOLD = np.full(4, -1.0)
"""A push of no length in a corner, where nothing is."""


@pytest.fixture(scope="module", params=["Rope", "Granular"])
def env(request: pytest.FixtureRequest) -> Iterator[Environment]:
    env = open_environment(request.param, 1, 32)
    yield env
    env.close()


def start_of(env: Environment, seed: int = 0) -> np.ndarray:
    return np.asarray(env.sample_task(np.random.default_rng(seed), goal=False).start)


def push(env: Environment, state: np.ndarray, *actions: np.ndarray) -> np.ndarray:
    """Particles [n, 3] after pushes from a state [3 n]."""
    env.reset([Task(state)])
    return np.asarray(env.step(np.stack(actions)[None])["particles"][0, -1])


def test_the_distance_is_the_reference_s(env: Environment) -> None:
    states, goal = np.random.default_rng(0).normal(size=(2, 3, start_of(env).size)), start_of(env)
    expected = np.empty((2, 3))
    for index in np.ndindex(2, 3):
        one, other = states[index].reshape(-1, 3), goal.reshape(-1, 3)
        there = [min(float(np.sqrt(((a - b) ** 2).sum())) for b in other) for a in one]
        back = [min(float(np.sqrt(((a - b) ** 2).sum())) for a in one) for b in other]
        expected[index] = sum(there) / len(there) + sum(back) / len(back)
    np.testing.assert_allclose(env.distance(states, goal), expected)
    shuffled = np.random.default_rng(1).permutation(goal.reshape(-1, 3)).ravel()
    assert env.distance(shuffled, goal) == 0.0


def test_a_push_moves_what_is_in_its_way_and_nothing_else(env: Environment) -> None:
    state = start_of(env)
    before = state.reshape(-1, 3)
    held = push(env, state, HOLD)
    assert np.abs(held - before).max() < 0.03
    particles = before.copy()
    if env.spec.id == "Granular":
        particles[0, :2] = 2.2, -2.2  # alone
    target = particles[0, :2]
    assert np.linalg.norm(before[1:, :2] - target, axis=1).min() > 0.8 or env.spec.id == "Rope"
    # Towards the middle of the table, through the particle.
    along = -target / np.linalg.norm(target)
    after = push(env, particles.ravel(), np.concatenate([target - 0.3 * along, target + 0.2 * along]) / REACH)
    moved = np.linalg.norm(after - particles, axis=1)
    assert 0.3 < moved[0] < 0.6
    if env.spec.id == "Granular":
        assert moved[1:].max() < 0.03
        return
    np.testing.assert_allclose(np.linalg.norm(np.diff(after, axis=0), axis=1), 0.15, atol=1e-9)


def test_any_push_leaves_the_object_on_the_table(env: Environment) -> None:
    rng, state = np.random.default_rng(2), start_of(env, 2)
    radius = 0.1
    for index in range(12):
        action = rng.uniform(-1.5, 1.5, 4)
        if index % 2:  # down onto a particle
            action[:2] = state.reshape(-1, 3)[rng.integers(state.size // 3), :2] / REACH
        after = push(env, state, action)
        if index == 0:
            np.testing.assert_array_equal(after, push(env, state, action.clip(-1, 1)))
        assert np.abs(after[:, :2]).max() < HALF - 0.5 * radius
        assert (after[:, 2] > 0.9 * radius).all()
        assert (after[:, 2] < 8 * radius).all()
        state = after.ravel()


def test_the_expert_comes_nearer_to_goals_than_random_pushes(env: Environment) -> None:
    expert = env.expert()
    assert expert is not None
    task = env.sample_task(np.random.default_rng(3))
    start, goal = np.asarray(task.start), np.asarray(task.goal)
    at_start = float(env.distance(start, goal))
    assert at_start > env.spec.thresholds[0]
    reached = push(env, start, *expert(start, goal, 3)).ravel()
    at_random = push(env, start, *np.random.default_rng(4).uniform(-1, 1, (3, 4))).ravel()
    assert env.distance(reached, goal) < min(0.8 * at_start, float(env.distance(at_random, goal)))


def test_most_collected_pushes_move_the_object(env: Environment, tmp_path: Path) -> None:
    collect(env.spec.id, tmp_path / "frames", episodes=2, length=8, image_size=32, policy="pushes")
    steps = FrameDataset.open(tmp_path / "frames").steps
    particles = steps.columns["particles"].reshape(2, 8, -1, 3)
    moved = np.linalg.norm(np.diff(particles, axis=1), axis=-1).max(-1)
    assert (moved > 0.2).mean() > 0.5
    assert np.abs(steps.action).max() <= 1.0


@pytest.mark.parametrize("change", ["shape", "nan", "length"])
def test_what_is_no_state_is_refused(change: str) -> None:
    env = open_environment("Rope", 1, 32)
    state = start_of(env)
    wrong = {"shape": state[3:], "nan": np.where(np.arange(state.size) == 4, np.nan, state), "length": 1.1 * state}
    with pytest.raises(UserError):
        env.reset([Task(wrong[change])])
    env.close()
