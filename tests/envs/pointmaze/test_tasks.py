"""Fixed tasks: OGBench's in its layouts, the longest pairs elsewhere; noise around the centres of cells."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from wmcache.common.errors import UserError
from wmcache.envs import Maze, open_environment
from wmcache.envs.pointmaze.tasks import OGBENCH, fixed_cells, longest_pairs


@pytest.mark.parametrize("name", [*OGBENCH, "UMaze", "Open", "Giant", "Maze7x9-3"])
def test_each_layout_has_five_tasks_around_free_cells(name: str) -> None:
    env = open_environment(name)
    tasks = env.fixed_tasks()
    assert len(tasks) == 5
    for (start, goal), draw in zip(fixed_cells(env.geometry), tasks.values(), strict=True):
        drawn = [draw(np.random.default_rng(seed)) for seed in range(40)]
        for cell, ends in ((start, [task.start for task in drawn]), (goal, [task.goal for task in drawn])):
            states = np.stack(ends)
            assert env.geometry.is_clear(states[:, :2], 0.1).all()
            assert not states[:, 2:].any()
            offsets = states[:, :2] - (np.array(cell) - 0.2)
            assert 0.2 < np.abs(offsets).max() <= 0.25
        again = draw(np.random.default_rng(3))
        np.testing.assert_array_equal((again.start, again.goal), (drawn[3].start, drawn[3].goal))


def test_a_layout_keeps_its_tasks_under_another_name() -> None:
    rows = tuple(row.replace("G", "O") for row in Maze.load("Large").rows)
    assert fixed_cells(Maze("mine", rows)) == OGBENCH["Large"]
    env = open_environment("Large+colors@1")
    task = next(iter(env.fixed_tasks().values()))(np.random.default_rng(0))
    np.testing.assert_array_equal(task.start[-2:], task.goal[-2:])  # both look the same
    plain = next(iter(open_environment("Large").fixed_tasks().values()))(np.random.default_rng(0))
    np.testing.assert_array_equal(task.start[:4], plain.start)


@pytest.mark.parametrize("name", ["UMaze", "Open", "Maze5x7-2", "Teleport"])
def test_the_longest_pairs_are_those_of_a_slow_search(name: str) -> None:
    maze = Maze.load(name)
    floor = {(row, column) for row, column in np.argwhere(maze.free & ~maze.entrances).tolist()}
    length = dict.fromkeys(product(floor, floor), np.inf) | {(cell, cell): 0 for cell in floor}
    length |= {(a, b): 1 for a, b in product(floor, floor) if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1}
    for middle, a, b in product(floor, floor, floor):  # Floyd and Warshall
        length[a, b] = min(length[a, b], length[a, middle] + length[middle, b])
    left = sorted((-value, a, b) for (a, b), value in length.items() if 0 < value < np.inf)
    wanted = []
    while left and len(wanted) < 5:
        _, start, goal = left[0]
        wanted.append((start, goal))
        left = [pair for pair in left if pair[1] != start and pair[2] != goal]
    assert longest_pairs(maze) == tuple(wanted)


def test_a_maze_without_two_connected_cells_has_none() -> None:
    with pytest.raises(UserError, match="apart"):
        fixed_cells(Maze("apart", ("#####", "#O#O#", "#####")))
