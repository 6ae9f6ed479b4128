"""Mazes with teleporters: random exits that belong to the start, shortest paths through them, and an expert that avoids them."""

from __future__ import annotations

import heapq
from collections import defaultdict

import numpy as np
import pytest

from wmcache.envs import Maze, MazeError, PointMazeVectorEnv, Task, open_environment
from wmcache.pipeline.collect import check_replay
from wmcache.pipeline.play import Player
from wmcache.planner.goals import Separation

TELEPORT = Maze.load("Teleport")
ROOMS = Maze("rooms", ("#######", "#OIO#E#", "#O###O#", "#OO#EO#", "#######"))
LEFT, RIGHT, TRAP = np.array([0.8, 0.8]), np.array([0.8, 2.8]), np.array([0.8, 6.8])
COUNT = 60


def at(*xy: float) -> np.ndarray:
    return np.array([*xy, 0.0, 0.0])


def beside_an_entrance() -> list[Task]:
    return [Task(at(2.8, 5.8 + 1e-3 * number)) for number in range(COUNT)]


def push_into_it(steps: int) -> np.ndarray:
    return np.tile(np.array([1.0, 0.0], np.float32), (COUNT, steps, 1))


def jumps(states: np.ndarray) -> np.ndarray:
    """Whether each state [..., 4] is that of a ball that has just come out of an exit."""
    return (states[..., None, :2] == TELEPORT.exits).all(-1).any(-1)


def test_a_ball_in_an_entrance_is_at_rest_in_a_random_exit() -> None:
    env = open_environment("Teleport", COUNT, 32)
    env.reset(beside_an_entrance())
    states = env.step(push_into_it(20))["state"]
    assert not TELEPORT.in_entrance(states[..., :2]).any()
    assert jumps(states).any(1).all()
    first = states[np.arange(COUNT), jumps(states).argmax(1)]
    assert not first[:, 2:].any()
    _, counts = np.unique(first[:, :2], axis=0, return_counts=True)
    assert len(counts) == 3
    assert counts.min() > COUNT / 6


def test_exits_do_not_depend_on_the_batch_nor_on_how_steps_are_grouped() -> None:
    env, alone = open_environment("Teleport", COUNT, 32), open_environment("Teleport", 1, 32)
    tasks, actions = beside_an_entrance(), np.random.default_rng(0).uniform(-1, 1, (COUNT, 40, 2))
    actions[:, :12] = push_into_it(12)
    env.reset(tasks)
    together = env.step(actions)["state"]
    env.reset(tasks)
    grouped = np.concatenate([env.step(part)["state"] for part in np.split(actions, 8, 1)], 1)
    np.testing.assert_array_equal(grouped, together)
    for row in (17, 3):
        alone.reset([tasks[row]])
        np.testing.assert_array_equal(alone.step(actions[row : row + 1])["state"][0], together[row])


@pytest.mark.parametrize("policy", ["navigate", "held"])
def test_recorded_episodes_replay(policy: str) -> None:
    player = Player("Teleport", (), 16, seed=0, policy=policy, length=80)
    check_replay(player)
    played = player.play(range(12))
    jumped = [episode for episode, rows in enumerate(played) if jumps(rows["state"]).any()]
    assert jumped
    for episode in jumped:
        drifts = [drift for _, drift in player.replay(episode, played[episode], 80)]
        assert max(drifts) == 0.0


def test_gymnasiums_envs_teleport_by_their_seed() -> None:
    env = PointMazeVectorEnv(3, "Teleport", image_size=32)
    found = []
    for _ in range(2):
        env.reset(seed=5, options={"state": [at(2.8, 5.8)] * 3})
        found.append(env.advance(push_into_it(12)[:3]))
    np.testing.assert_array_equal(*found)
    assert jumps(found[0]).any(1).all()
    assert len(np.unique(found[0][:, -1, 1])) > 1
    with pytest.raises(MazeError, match="entrance"):
        env.reset(options={"state": [at(3.8, 5.8)] * 3})
    env.close()


def test_frames_show_entrances_and_exits() -> None:
    env = open_environment("Teleport", 1, 120)
    image = env.render(at(0.8, 0.8)[None])[0].astype(int)
    # 12 columns over 120 pixels; x to the right from the middle of 9 rows, y upwards.
    colours = {
        name: np.mean([image[int(119 - 10 * (y + 0.7)), int(10 * (x + 0.7 + 1.5))] for x, y in centres], 0)
        for name, centres in (
            ("in", np.argwhere(TELEPORT.entrances) - 0.2),
            ("out", TELEPORT.exits),
            ("floor", [(6.8, 2.8)]),
        )
    }
    assert colours["in"][[0, 2]].min() > 1.5 * colours["in"][1]
    assert colours["out"][:2].min() > 1.5 * colours["out"][2]
    assert colours["floor"].argmax() == 2
    env.close()


def slow_lengths(maze: Maze, start: np.ndarray, step: float = 0.1) -> dict[tuple[int, int], float]:
    """Dijkstra's algorithm on a lattice, in which a point in an entrance leads to each exit's centre alone."""
    moves = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if np.gcd(a, b) == 1]
    x_min, _, y_min, _ = maze.extent

    def key(xy: np.ndarray) -> tuple[int, int]:
        i, j = np.round((xy - (x_min, y_min)) / step).astype(int).tolist()
        return i, j

    def place(point: tuple[int, int]) -> np.ndarray:
        return np.array(point) * step + (x_min, y_min)

    lengths: dict[tuple[int, int], float] = defaultdict(lambda: np.inf)
    heap = [(0.0, key(start))]
    while heap:
        length, point = heapq.heappop(heap)
        if point in lengths:
            continue
        lengths[point] = length
        if maze.in_entrance(place(point)):
            following = [(key(end), 0.0) for end in maze.exits]
        else:
            following = [((point[0] + a, point[1] + b), step * float(np.hypot(a, b))) for a, b in moves]
        for other, more in following:
            if other not in lengths and maze.is_clear(place(other)):
                heapq.heappush(heap, (length + more, other))
    return lengths


def test_shortest_paths_use_the_luckiest_exit() -> None:
    ends = np.array([[0.8, 0.8], [0.8, 2.8], [2.8, 1.8], [2.8, 3.8], [0.8, 4.8], [1.8, 4.8]])
    for start in (LEFT, RIGHT):
        slow = slow_lengths(ROOMS, start)
        wanted = [slow[tuple(np.round((end + 0.7) / 0.1).astype(int).tolist())] for end in ends]
        np.testing.assert_allclose(ROOMS.geodesic(start, ends), wanted, rtol=0.03, atol=0.15)
    # Into the entrance, 0.5 away, and from an exit on; never back, and never through the entrance.
    assert ROOMS.geodesic(LEFT, np.array([[2.8, 3.8]]))[0] == pytest.approx(0.5, abs=0.06)
    assert np.isinf(ROOMS.geodesic(np.array([0.8, 4.8]), np.array([LEFT]))[0])
    assert np.isinf(ROOMS.geodesic(LEFT, np.array([RIGHT]))[0])


def test_a_jump_has_no_length_and_counts_for_the_separation() -> None:
    path = np.array([[0.8, 0.8], [0.8, 1.2], [2.8, 3.8], [2.8, 4.0]])
    assert ROOMS.path_length(path) == pytest.approx(0.6)
    env = open_environment("rooms", layout=ROOMS.rows)
    start, goal = at(*LEFT), at(2.8, 3.8)
    assert not Separation(0.5, 0.4).allows(env, start, goal)
    assert Separation(0.1, 0.1).allows(env, start, goal)


def test_tasks_have_a_path_and_no_end_in_an_entrance() -> None:
    env, rng = open_environment("Teleport"), np.random.default_rng(0)
    for _ in range(30):
        task = env.sample_task(rng)
        assert TELEPORT.is_free(np.stack([task.start, task.goal])).all()
        assert np.isfinite(TELEPORT.distance(task.start, task.goal[None])).all()


def walk(layout: Maze, start: np.ndarray, goal: np.ndarray, replans: int) -> np.ndarray:
    """States [env steps, 4] of the expert's episode."""
    env = open_environment(layout.name, layout=layout.rows)
    act, state, parts = env.expert(), start, []
    env.reset([Task(start)])
    for _ in range(replans):
        parts.append(env.step(act(state, goal, 5)[None])["state"][0])
        state = parts[-1][-1]
    return np.concatenate(parts)


def test_the_expert_takes_a_teleporter_only_where_no_other_path_leads() -> None:
    for draw in open_environment("Teleport").fixed_tasks().values():
        task = draw(np.random.default_rng(1))
        states = walk(TELEPORT, task.start, task.goal, 30)
        assert not jumps(states).any()
        assert np.linalg.norm((states[-1] - task.goal)[:2]) < 0.25
    states = walk(ROOMS, at(*LEFT), at(1.8, 4.8), 12)
    assert np.linalg.norm((states[-1] - at(1.8, 4.8))[:2]) < 0.25


def test_the_expert_stays_in_a_room_without_a_path_to_the_goal() -> None:
    states = walk(TELEPORT, at(*TRAP), at(6.8, 0.8), 3)
    assert np.abs(states[:, 2:]).max() < 1e-9
    with pytest.raises(MazeError, match="no path"):
        Maze("apart", ("#####", "#O#O#", "#####")).toward(LEFT, RIGHT, 0.5)
