"""Wall: DINO-WM's moves, picture, tasks and judge, the expert, and the commands from frames to a plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmcache.common.errors import UserError
from wmcache.envs import Environment, Task, open_environment
from wmcache.envs.wall import sample_free
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.play import Player, play_all

from ..commands.conftest import error_of, run, succeed

NAMES = ("Wall", "Wall-random")


def in_wall(x: np.ndarray, y: np.ndarray, wall: float, door: float) -> np.ndarray:
    """Return whether points are in a wall: by DINO-WM's numbers, without the code of the environment."""
    outside = (x < 4) | (x > 60) | (y < 4) | (y > 60)
    return outside | ((abs(x - wall) < 3) & (abs(y - door) > 4))


def start_of(env: Environment, position: list[float], wall: float = 32, door: float = 10) -> np.ndarray:
    return np.array([*position, wall, door][: 2 if env.spec.id == "Wall" else 4], np.float64)


def test_a_move_ends_where_small_steps_first_meet_a_wall() -> None:
    env, rng, count, stopped = open_environment("Wall-random"), np.random.default_rng(0), 20_000, 0
    for number in range(300):
        state = np.array([0, 0, rng.integers(20, 45), rng.integers(10, 55)], np.float64)
        state[:2] = sample_free(rng, state[2:])
        action = rng.uniform(-1.8, 1.8, 2) * (number % 4 > 0, number % 5 > 0)  # also along one axis
        x, y = (state[:2] + 2 * action * np.linspace(0, 1, count + 1)[:, None]).T
        walled = in_wall(x, y, *state[2:])
        last = int(walled.argmax()) - 1 if walled.any() else count
        stopped += bool(walled.any())
        env.reset([Task(state)])
        moved = env.step(action[None, None])
        np.testing.assert_allclose(moved["position"][0, 0], (x[last], y[last]), atol=8 / count)
        np.testing.assert_array_equal(moved["wall"][0, 0], state[2:])
    assert stopped > 20
    env.reset([Task(np.array([20.0, 30.0, 32.0, 10.0]))])
    np.testing.assert_allclose(env.step(np.full((1, 1, 2), 9.0))["position"], [[[23.6, 33.6]]])  # as 1.8


@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(NAMES),
    actions=st.lists(st.sampled_from([-1.8, -0.5, 0.0, 0.3, 1.0, 1.8]), min_size=20, max_size=40),
)
def test_a_dot_is_never_in_a_wall(seed: int, name: str, actions: list[float]) -> None:
    env = open_environment(name)
    state = env.sample_task(np.random.default_rng(seed), goal=False).start
    assert isinstance(state, np.ndarray)
    wall, door = state[2:] if len(state) == 4 else (32, 10)
    for action in np.array(actions[: len(actions) // 2 * 2]).reshape(-1, 2):
        env.reset([Task(state)])  # raises UserError in a wall
        x, y = env.step(action[None, None])["position"][0, 0]
        assert not in_wall(x, y, wall, door)
        state = np.array([x, y, *state[2:]])


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_those_of_dino_wm_and_have_one_wall(name: str) -> None:
    env, layouts, sides = open_environment(name), set(), []
    for seed in range(300):
        task = env.sample_task(np.random.default_rng(seed))
        assert isinstance(task.start, np.ndarray)
        assert isinstance(task.goal, np.ndarray)
        np.testing.assert_array_equal(task.start[2:], task.goal[2:])
        wall, door = task.start[2:] if name == "Wall-random" else (32, 10)
        layouts.add((wall, door))
        for x, y in (task.start[:2], task.goal[:2]):
            assert 7.4 <= y <= 56.6
            assert 7.4 <= x <= wall - 6.4 or wall + 6.4 <= x <= 56.6
        sides.append(task.start[0] < wall)
        assert (task.goal[0] < wall) != sides[-1]
        other = env.sample_goal(np.random.default_rng(seed), task.goal)
        assert isinstance(other, np.ndarray)
        assert (other[0] < wall) == sides[-1]
    assert 100 < sum(sides) < 200
    if name == "Wall":
        assert layouts == {(32, 10)}
    else:
        walls, doors = (set(values) for values in zip(*layouts, strict=True))
        assert (min(walls), max(walls), min(doors), max(doors)) == (20, 44, 10, 54)


def test_success_is_a_distance_below_4_5_in_the_same_rooms() -> None:
    env = open_environment("Wall-random")
    goal = start_of(env, [20, 30])
    states = np.stack([start_of(env, [20, 34.4]), start_of(env, [20, 34.6]), start_of(env, [20, 30], door=11)])
    assert (env.distance(states, goal) < env.spec.thresholds[0]).tolist() == [True, False, False]
    assert env.spec.thresholds == (4.5,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("position", "wall"), [([30, 30], 32), ([3, 30], 32), ([np.nan, 30], 32), ([], 32), ([50, 30], 5)]
)
def test_a_start_in_a_wall_is_refused(name: str, position: list[float], wall: float) -> None:
    env = open_environment(name)
    if name == "Wall" and wall != 32:
        pytest.skip("its wall does not move")
    with pytest.raises(UserError, match=f"{name} "):
        env.reset([Task(start_of(env, position, wall=wall) if position else np.zeros(3))])


@pytest.mark.parametrize("door", [10, 40])
def test_a_frame_shows_the_whole_state(door: int) -> None:
    env = open_environment("Wall-random", 1, 65)
    frame = env.reset([Task(start_of(env, [20.3, 33.6], door=door))]).image[0]
    rows, columns = np.mgrid[:65, :65]
    black = (frame == 0).all(-1)
    inner = (abs(columns - 32) <= 3) & (abs(rows - door) > 4)
    np.testing.assert_array_equal(black, inner | np.isin(rows, (4, 60)) | np.isin(columns, (4, 60)))
    red = frame[..., 0] - frame[..., 1].astype(float)
    assert ((red * columns).sum() / red.sum(), (red * rows).sum() / red.sum()) == pytest.approx((20.3, 33.6), abs=0.05)
    assert red.max() == 255
    assert (red**2).sum() / 255**2 == pytest.approx(np.pi * 1.7**2, rel=0.1)
    assert (frame[~black, 0] == 255).all()
    at_wall = env.render(start_of(env, [29, 50], door=door)[None])[0]
    assert at_wall[50, 28, 1] < 100
    large = open_environment("Wall-random", 1, 130).render(start_of(env, [20.3, 33.6], door=door)[None])[0]
    red, pixels = large[..., 0] - large[..., 1].astype(float), (np.arange(130) - 0.5) / 2
    assert (red.sum(0) @ pixels / red.sum(), red.sum(1) @ pixels / red.sum()) == pytest.approx((20.3, 33.6), abs=0.05)


def test_the_shortest_path_passes_the_door_as_short_as_can_be() -> None:
    env, rng = open_environment("Wall"), np.random.default_rng(1)
    assert env.geometry is not None
    door = np.linspace(6, 14, 801)
    for _ in range(20):
        task = env.sample_task(rng)
        assert isinstance(task.start, np.ndarray)
        assert isinstance(task.goal, np.ndarray)
        left, right = sorted((task.start, task.goal), key=lambda position: float(position[0]))
        before, behind = (np.hypot(x - at[0], door - at[1]) for x, at in ((29, left), (35, right)))
        shortest = (before[:, None] + np.hypot(6, door[:, None] - door) + behind).min()
        assert env.geometry.distance(task.start, task.goal[None]) == pytest.approx(shortest, abs=1e-3)
        near = task.start[None] + [[0, 3]]
        assert env.geometry.distance(task.start, near) == pytest.approx(3.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_expert_walks_through_the_door(name: str) -> None:
    env = open_environment(name)
    expert = env.expert()
    assert expert is not None
    for seed in range(30):
        task = env.sample_task(np.random.default_rng(seed))
        assert isinstance(task.start, np.ndarray)
        assert isinstance(task.goal, np.ndarray)
        env.reset([task])
        actions = expert(task.start, task.goal, 40)
        assert np.linalg.norm(actions, axis=1).max() <= 1.8 + 1e-9
        end = env.step(actions[None])["position"][0]
        np.testing.assert_allclose(end[-1], task.goal[:2], atol=1e-6)
        if env.geometry:
            moves = np.diff(np.concatenate([task.start[None], end]), axis=0)
            taken = np.linalg.norm(moves, axis=1).sum()
            assert taken < 1.15 * env.geometry.distance(task.start, task.goal[None])[0]


def test_policies_walk_as_in_dino_wms_data_and_through_the_door() -> None:
    crossed = {}
    for policy in ("walk", "expert"):
        steps = play_all(Player("Wall-random", (), 16, 0, policy, 50), 60)
        side = np.sign(steps.columns["position"][:, 0] - steps.columns["wall"][:, 0]).reshape(60, 50)
        crossed[policy] = int((np.diff(side, axis=1) != 0).any(1).sum())
        actions = steps.action.reshape(60, 50, 2)
        if policy == "walk":
            lengths = np.linalg.norm(actions, axis=-1)
            assert lengths.min() >= 0.2
            assert lengths.max() <= 1.8
            assert (lengths.mean(), lengths.std()) == pytest.approx((1.0, 0.352), abs=0.02)
            angle = np.arctan2(actions[..., 1], actions[..., 0])
            turn = (np.diff(angle, axis=1) + np.pi) % (2 * np.pi) - np.pi
            assert (turn.mean(), turn.std()) == pytest.approx((0.0, 0.48), abs=0.03)
    assert 0 < crossed["walk"] < 30 < crossed["expert"]


@pytest.mark.parametrize("name", NAMES)
def test_the_road_from_frames_to_a_plan(name: str, tmp_path: Path) -> None:
    names = {"frames": tmp_path / "frames", "store": tmp_path / "store", "run": tmp_path / "run"}
    succeed(
        f"wmcache collect --env {name} --policy walk --episodes 8 --length 30 --image-size 32 --out {{frames}}", **names
    )
    succeed("wmcache extract --dataset {frames} --encoder pixels --out {store} --device cpu", **names)
    sizes = "--width 16 --depth 1 --heads 2 --history 1 --steps 5 --batch-size 8 --device cpu"
    succeed(f"wmtrain --cache {{store}} --out {{run}} {sizes}", **names)
    plan = "wmplan --run {run} --protocol dino-wm-wall --episodes 4 --samples 8 --elites 3 --iterations 2 --device cpu"
    succeed(f"{plan} --baselines random,zero,expert --out {{out}}", **names, out=tmp_path / "plan")
    results = json.loads((tmp_path / "plan/results.json").read_text())
    rows = {policy: row[0]["successes"] for policy, row in results["baselines"].items()}
    assert (rows["expert"], rows["zero"], results["threshold"]) == (4, 0, 4.5)
    assert {file.stem for file in (tmp_path / "plan/figures").iterdir()} >= {"success"}
    episodes = pq.read_table(tmp_path / "plan/episodes.parquet", columns=["start", "goal"]).to_pydict()
    again = [open_environment(name).sample_task(np.random.default_rng(99 * number + 1)) for number in range(4)]
    np.testing.assert_array_equal(episodes["goal"], [task.goal for task in again])
    if name == "Wall-random":
        played = tmp_path / "played"
        again = "--episodes 2 --length 30 --image-size 32"
        succeed(f"wmcache collect --env Wall-random --policy {{run}} {again} --out {{played}}", **names, played=played)
        assert len(FrameDataset.open(played).steps) == 60
        table = pa.table({"start": [[20.0, 30.0, 32.0, 10.0]], "goal": [[40.0, 30.0, 32.0, 11.0]]})
        pq.write_table(table, pairs := tmp_path / "pairs.parquet")
        line = "wmplan --run {run} --goals {pairs} --episodes 1 --budget 5 --device cpu"
        assert "pairs.parquet" in error_of(run(line, **names, pairs=pairs))
