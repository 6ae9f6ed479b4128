"""Environments of gymnasium, and of a user's own package."""

from __future__ import annotations

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import Environment, Task, open_environment


@pytest.fixture
def dots(user_package: str) -> Environment:
    return open_environment(f"{user_package}:Dots-v0", 2, 16)


def test_each_numeric_part_of_an_observation_is_a_column(dots: Environment) -> None:
    columns = dots.spec.columns
    assert {name: (column.roles, column.dtype, column.shape) for name, column in columns.items()} == {
        "action": (("action",), "float32", (2,)),
        "lamp": (("proprio", "state"), "int64", (3,)),
        "observation_step": (("proprio", "state"), "int64", (1,)),
        "robot_xy": (("proprio", "state"), "float64", (2,)),
        "reward": (("reward",), "float32", ()),
        "terminated": (("terminated",), "bool", ()),
        "truncated": (("truncated",), "bool", ()),
    }
    assert (columns["action"].low, columns["action"].high) == ((-2.0, -2.0), (2.0, 1.0))
    assert (dots.spec.fps, dots.spec.dataset, dots.spec.renders_states) == (12, "dots-v0", False)
    seen = dots.reset([Task(3), Task(4)])
    assert seen.columns["lamp"].sum(1).tolist() == [1, 1]
    assert seen.proprio is not None
    np.testing.assert_array_equal(seen.proprio[:, -2:], seen.columns["robot_xy"].astype(np.float32))


def test_an_episode_stays_where_it_ends(dots: Environment) -> None:
    dots.reset([Task(3), Task(3)])
    actions = np.zeros((2, 14, 2), np.float32)
    actions[0, :, 0] = 2.0
    moved = dots.step(actions)
    ends = moved["terminated"].argmax(1)[0]
    assert 0 < ends < 8
    assert moved["terminated"][0].tolist() == [False] * ends + [True] * (14 - ends)
    assert (moved["robot_xy"][0, ends:] == moved["robot_xy"][0, ends]).all()
    assert moved["reward"][0, ends] == pytest.approx(1.0)
    assert not moved["reward"][0, ends + 1 :].any()
    assert moved["truncated"][1].tolist() == [False] * 8 + [True] * 6
    assert dots.observe().image.shape == (2, 16, 16, 3)


def test_a_discrete_action_is_the_largest_of_its_one_hot_vector() -> None:
    pytest.importorskip("pygame")
    cart = open_environment("gym:CartPole-v1", 2, 16)
    action = cart.spec.action
    assert (action.shape, action.discrete, cart.spec.fps) == ((2,), True, 50)
    cart.reset([Task(0), Task(0)])
    pushed = cart.step(np.eye(2, dtype=np.float32)[:, None])
    speed = pushed["observation"][:, 0, 1]
    assert speed[0] < 0 < speed[1]
    cart.close()


@pytest.mark.parametrize("name", ["Unbounded-v0", "Blind-v0", "Missing-v0"])
def test_what_cannot_be_recorded_is_refused_in_one_line(user_package: str, name: str) -> None:
    with pytest.raises(UserError, match=name):
        open_environment(f"{user_package}:{name}")


@pytest.mark.parametrize(("name", "cause"), [("Grey-v0", "uint8"), ("Broken-v0", "no motor")])
def test_a_fault_of_an_environment_is_one_line(user_package: str, name: str, cause: str) -> None:
    env = open_environment(f"{user_package}:{name}", 1, 16)
    seen = env.reset([Task(0)])
    with pytest.raises(UserError, match=f"{name}.*{cause}"):
        env.step(np.zeros((1, 1, 2), np.float32)) if name == "Broken-v0" else seen.image
    with pytest.raises(UserError, match=name):
        env.reset([Task(np.zeros(2))])


def test_a_module_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(UserError, match="no_such_module"):
        open_environment("no_such_module:Thing-v0")


def test_an_unknown_id_asks_for_the_module_that_registers_it() -> None:
    with pytest.raises(UserError, match="module:ID"):
        open_environment("gym:NoSuchThing-v0")


def test_an_environment_draws_in_its_own_opengl_context_while_another_one_opens_and_closes() -> None:
    first, other = (open_environment("gym:Pusher-v5", 2, 32) for _ in range(2))
    tasks = [Task(3), Task(4)]
    drawn = first.reset(tasks).image
    assert drawn.any(axis=(1, 2, 3)).all()
    other.reset(tasks[::-1]).image  # noqa: B018 (frames are drawn when they are read)
    np.testing.assert_array_equal(first.reset(tasks).image, drawn)
    other.close()
    np.testing.assert_array_equal(first.reset(tasks).image, drawn)
