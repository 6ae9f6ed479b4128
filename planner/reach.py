"""Tasks between cached frames, for `--judge-columns`: the goal is a later frame of the held-out episode that the start is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.envs import Environment, Task
from wmcache.planner.goals import held_out_starts
from wmcache.planner.success import Success
from wmcache.planner.world import start_at, states_of


@dataclass(frozen=True, kw_only=True)
class FrameTask(Task):
    """A task between two cached frames.

    Attributes:
        target: judged columns of the goal's frame, float64 [C].
    """

    target: NDArray[np.float64]


def frame_tasks(
    env: Environment,
    store: TokenStore,
    success: Success,
    numbers: Sequence[int],
    steps: int,
    split_seed: int = 42,
    apart: float = 0.0,
) -> list[FrameTask]:
    """Draw tasks of episodes. Episode n depends on n alone, by a generator of seed 99 n + 1.

    Args:
        success: with the columns that are judged.
        steps: env steps from start to goal.
        apart: least distance of start and goal.
    """
    starts = held_out_starts(store, steps, split_seed)
    values = states_of(env.spec, {name: store.column(name) for name in success.columns}, (len(store),), success.columns)
    starts = starts[success.distance(values[starts], values[starts + steps]) >= apart]
    if not len(starts):
        raise UserError(
            f"no frames of {store.path} {steps} env steps apart are {apart:g} apart in {', '.join(success.columns)}; lower --threshold "
            "or --min-distance, raise --goal-steps, or draw pairs at any distance with --no-strict"
        )
    tasks = []
    for number in numbers:
        first = int(np.random.default_rng(99 * number + 1).choice(starts))
        start, goal = (start_at(env, store, frame) for frame in (first, first + steps))
        tasks.append(FrameTask(start, goal, target=values[first + steps]))
    return tasks
