"""Every registered environment keeps the contract."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import ENVIRONMENTS, Environment, open_environment


def works(name: str) -> bool:
    """Return whether the packages of an environment are installed, and work with each other."""
    try:
        open_environment(name).close()
    except UserError:
        return False
    return True


SIZE = 32
COUNT = 2
PYGAME = pytest.mark.skipif(find_spec("pygame") is None, reason="pygame is not installed")
NAMES = [
    *(name for name in ENVIRONMENTS if ":" not in name and name != "PushT"),
    pytest.param(
        "PushT", marks=pytest.mark.skipif(find_spec("gym_pusht") is None, reason="gym-pusht is not installed")
    ),
    *(pytest.param(f"gym:{name}", marks=PYGAME) for name in ("CartPole-v1", "Pendulum-v1", "FrozenLake-v1")),
    *("gym:InvertedPendulum-v5", "gym:Reacher-v5"),
    *("UMaze+colors,camera,background@3", "NoisyUMaze+background@0", "gym:Reacher-v5+colors,camera,background@1"),
    pytest.param("gym:CartPole-v1+colors,background@2", marks=PYGAME),
    *(
        pytest.param(name, marks=pytest.mark.skipif(not works(name.split("+")[0]), reason=f"{name} does not work here"))
        for name in (
            *("dmc:reacher-easy", "dmc:cheetah-run", "dmc:reacher-easy+colors,camera,background@0"),
            *("metaworld:drawer-open-v3", "metaworld:drawer-open-v3+colors,camera,background@1"),
        )
    ),
]


@pytest.fixture(scope="module", params=NAMES)
def env(request: pytest.FixtureRequest) -> Iterator[Environment]:
    env = open_environment(request.param, COUNT, SIZE)
    yield env
    env.close()


def tasks(env: Environment, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [env.sample_task(rng) for _ in range(env.count)]


def random_actions(env: Environment, steps: int, seed: int = 1) -> np.ndarray:
    space = env.spec.action
    rng = np.random.default_rng(seed)
    if space.discrete:
        return np.eye(space.width, dtype=np.float32)[rng.integers(space.width, size=(env.count, steps))]
    return rng.uniform(space.low, space.high, (env.count, steps, space.width)).astype(np.float32)


def test_the_spec_describes_what_is_returned(env: Environment) -> None:
    spec = env.spec
    seen = env.reset(tasks(env))
    assert seen.image.shape == (COUNT, SIZE, SIZE, 3)
    assert seen.image.dtype == np.uint8
    width = sum(column.width for column in spec.columns.values() if "proprio" in column.roles)
    assert (None if seen.proprio is None else seen.proprio.shape) == ((COUNT, width) if width else None)
    moved = env.step(random_actions(env, 3))
    assert set(moved) == set(spec.columns) - {"action"}
    assert set(seen.columns) <= set(moved)
    for name, values in moved.items():
        column = spec.columns[name]
        assert (values.dtype.name, values.shape) == (column.dtype, (COUNT, 3, *column.shape))
    for name, values in env.observe().columns.items():
        np.testing.assert_array_equal(values, moved[name][:, -1])
    assert list(spec.thresholds) == sorted(spec.thresholds, reverse=True)
    assert spec.fps > 0


def test_an_episode_depends_on_its_task_and_actions_alone(env: Environment) -> None:
    started, actions = tasks(env), random_actions(env, 5)
    first_seen = env.reset(started).image
    first = env.step(actions)
    last_seen = env.observe().image
    env.reset(tasks(env, seed=7))
    env.step(actions[:, ::-1])
    alone = open_environment(env.spec.id, 1, SIZE, env.spec.layout)
    for row in reversed(range(COUNT)):
        np.testing.assert_array_equal(alone.reset([started[row]]).image[0], first_seen[row])
        for name, values in alone.step(actions[row : row + 1]).items():
            np.testing.assert_array_equal(values[0], first[name][row])
        np.testing.assert_array_equal(alone.observe().image[0], last_seen[row])
    alone.close()


def test_a_state_is_drawn_as_the_live_frame(env: Environment) -> None:
    if not env.spec.renders_states:
        pytest.skip("its frames are drawn by replay")
    env.reset(tasks(env))
    env.step(random_actions(env, 4))
    seen = env.observe()
    states = np.concatenate(_states(env), 1)
    env.reset(tasks(env, seed=3))
    np.testing.assert_array_equal(env.render(states), seen.image)


def test_mujoco_environments_draw_a_given_state() -> None:
    assert open_environment("gym:Reacher-v5", 1, SIZE).spec.renders_states
    assert open_environment("gym:InvertedPendulum-v5", 1, SIZE).spec.renders_states


def test_distances_are_zero_at_the_goal_alone(env: Environment) -> None:
    env.reset(tasks(env))
    state = np.concatenate(
        [np.asarray(seen, np.float64).reshape(COUNT, -1) for seen in _states(env)] or [np.zeros((COUNT, 1))], 1
    )
    assert env.distance(state[0], state[0]) == 0.0
    assert env.distance(state, state[0]).shape == (COUNT,)


def _states(env: Environment) -> list[np.ndarray]:
    seen = env.observe().columns
    return [seen[name] for name in sorted(seen) if "state" in env.spec.columns[name].roles]


def test_the_geometry_knows_free_states(env: Environment) -> None:
    if (geometry := env.geometry) is None:
        pytest.skip("no geometry is known")
    rng = np.random.default_rng(0)
    states = np.stack([env.sample_task(rng).start for _ in range(20)])
    assert geometry.is_free(states).all()
    lengths = geometry.distance(states[0], states)
    if not env.spec.id.startswith("wmcache/PointMaze-Teleport"):  # a teleporter is shorter than the straight line
        assert (lengths >= env.distance(states, states[0]) - 1e-9).all()
    x_min, x_max, y_min, y_max = geometry.extent
    assert geometry.walls.shape == (round(x_max - x_min), round(y_max - y_min))
    assert ((geometry.position(states) > (x_min, y_min)) & (geometry.position(states) < (x_max, y_max))).all()


@pytest.mark.parametrize("name", ["UMase", "no-such-world", "nowhere/PointMaze-UMaze-v0"])
def test_an_unknown_name_is_refused_with_what_exists(name: str) -> None:
    with pytest.raises(UserError, match="UMaze"):
        open_environment(name)


def test_names_of_one_maze_and_its_grid_open_the_same_world() -> None:
    by_id, by_name = open_environment("wmcache/PointMaze-Medium-v0"), open_environment("Medium")
    assert by_id.spec == by_name.spec
    grid = open_environment("gone/corridor.txt", layout=["####", "#OO#", "####"])
    assert grid.spec.layout == ("####", "#OO#", "####")
    assert grid.spec.dataset == "pointmaze-corridor"
