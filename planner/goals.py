"""Starts and goals of episodes (DINO-WM, planning/evaluator.py and plan.py: goal_source)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.cache.windows import window_starts
from wmcache.common.errors import UserError, reason
from wmcache.envs import Environment, Task
from wmcache.planner.judge import reported_thresholds
from wmcache.planner.options import SOURCES, TASKS, PlanOptions
from wmcache.planner.world import cached_states, state_size, states_of, world_name

MAX_DRAWS = 2000
"""Pairs that are drawn for an episode before it is refused."""

States = NDArray[np.float64]
Draw = Callable[[np.random.Generator], tuple[States, States]]


@dataclass(frozen=True)
class Separation:
    """How far apart start and goal are at least, so that no episode begins at its goal or arrives with its first model step.

    The environment's distance, which the judge compares with thresholds, is at least `threshold`, the largest one that is reported. Where
    the geometry is known, the shortest path is at least `threshold` + `step`, the longest move of a model step. `least` is a distance
    that a user asks for.
    """

    threshold: float = 0.0
    step: float = 0.0
    least: float = 0.0

    @classmethod
    def of(cls, options: PlanOptions, env: Environment, frameskip: int, thresholds: Sequence[float]) -> Separation:
        """Return that of an evaluation; `thresholds` are those of `env`, or what else it is judged by."""
        if not options.strict:
            return cls(least=options.min_distance)
        largest = reported_thresholds(thresholds, options.threshold)[0]
        return cls(largest, env.longest_move(frameskip), options.min_distance)

    @property
    def path(self) -> float:
        """The least path length."""
        return self.threshold + self.step

    def allows(self, env: Environment, start: States, goal: States) -> bool:
        """Return whether states [S] are that far apart."""
        straight = float(env.distance(start, goal))
        if not max(self.threshold, self.least) <= straight < np.inf:
            return False
        if env.geometry is None:
            return straight >= self.path
        return float(env.geometry.distance(start, goal[None])[0]) >= self.path


def start_and_goal(
    source: str,
    numbers: Sequence[int],
    env: Environment,
    store: TokenStore,
    steps: int,
    split_seed: int = 42,
    separation: Separation | None = None,
) -> tuple[States, States]:
    """Return start and goal states of episodes. Episode n depends on n alone, by a generator of seed 99 n + 1 (DINO-WM, plan.py).

    Args:
        source: `random-state`: two tasks of the environment. `dataset`: frames of a held-out episode, `steps` env steps apart.
            `random-action`: a random state, and where Gaussian actions lead from it in `steps` env steps. Else a Parquet file with
            columns `start` and `goal`, states; episode n takes row n. An evaluation's episodes.parquet is such a file. `tasks`: the
            environment's fixed tasks; of k, episode n has the one of index n modulo k.
        steps: env steps from start to goal, for `dataset` and `random-action`.
        separation: closer pairs are drawn again from the same generator. Those of a file and of fixed tasks are taken as they are.

    Returns:
        float64 [E, S] each.
    """
    if source not in SOURCES:
        return _read_states(Path(source), numbers, env)
    if source == TASKS:
        return _fixed_states(numbers, env)
    draw = _draw_from(source, env, store, steps, split_seed)
    separation = separation or Separation()
    start, goal = np.stack([_draw_pair(draw, source, number, env, separation) for number in numbers], 1)
    if env.geometry and not env.geometry.is_free(np.concatenate([start, goal])).all():
        raise UserError(
            f"--goals {source}: frames of {store.path} are in walls of {env.geometry.name}; choose another --goals or --env"
        )
    return start, goal


def task_names(env: Environment) -> list[str]:
    """List the environment's fixed tasks; raises UserError where there are none."""
    if not (names := list(env.fixed_tasks())):
        known = ", ".join(name for name in SOURCES if name != TASKS)
        raise UserError(f"--goals {TASKS}: environment {env.spec.id} has no fixed tasks; choose {known} or a file")
    return names


def _fixed_states(numbers: Sequence[int], env: Environment) -> tuple[States, States]:
    names, draws = task_names(env), env.fixed_tasks()
    drawn = [draws[names[number % len(names)]](np.random.default_rng(99 * number + 1)) for number in numbers]
    start, goal = (
        np.array(states, np.float64) for states in zip(*((task.start, task.goal) for task in drawn), strict=True)
    )
    return start, goal


def held_out_starts(store: TokenStore, steps: int, split_seed: int) -> NDArray[np.int64]:
    """List the frames of held-out episodes that a frame follows so many env steps later; raises UserError where there are none."""
    starts, _ = window_starts(store.episode, store.split("val", split_seed), steps + 1)
    if not len(starts):
        raise UserError(f"no held-out episode of {store.path} has {steps + 1} frames; lower --goal-steps")
    return starts


def _draw_from(source: str, env: Environment, store: TokenStore, steps: int, split_seed: int) -> Draw:
    if source == "dataset":
        candidates, states = held_out_starts(store, steps, split_seed), cached_states(env.spec, store)

        def draw_frames(rng: np.random.Generator) -> tuple[States, States]:
            first = int(rng.choice(candidates))
            return states[first], states[first + steps]

        return draw_frames

    def draw_states(rng: np.random.Generator) -> tuple[States, States]:
        task = env.sample_task(rng, goal=source == "random-state")
        start = np.asarray(task.start, np.float64)
        if source == "random-state":
            return start, np.asarray(task.goal, np.float64)
        env.reset([Task(start)])
        moved = env.step(rng.normal(size=(1, steps, env.spec.action.width)))
        return start, states_of(env.spec, moved, (1, steps))[0, -1]

    return draw_states


def _draw_pair(draw: Draw, source: str, number: int, env: Environment, separation: Separation) -> tuple[States, States]:
    rng = np.random.default_rng(99 * number + 1)
    for _ in range(MAX_DRAWS):
        start, goal = draw(rng)
        if separation.allows(env, start, goal):
            return start, goal
    hint = "" if source == "random-state" else "raise --goal-steps, or "
    if separation.least > separation.path:
        raise UserError(
            f"--goals {source}: episode {number}: none of {MAX_DRAWS} pairs in {world_name(env)} is {separation.least:.2f} apart; "
            f"{hint}lower --min-distance"
        )
    raise UserError(
        f"--goals {source}: episode {number}: none of {MAX_DRAWS} pairs in {world_name(env)} is {separation.path:.2f} apart, the largest "
        f"threshold and one model step; {hint}draw pairs at any distance with --no-strict"
    )


def _read_states(file: Path, numbers: Sequence[int], env: Environment) -> tuple[States, States]:
    try:
        table = pq.read_table(file, columns=["start", "goal"])
        both = [np.array(table[name].to_pylist(), dtype=np.float64) for name in ("start", "goal")]
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"--goals {file} is neither {', '.join(SOURCES)} nor a Parquet file with columns start and goal: {reason(error)}"
        ) from error
    size = state_size(env.spec)
    if any(states.shape != (len(table), size) or not (np.abs(states) < 1e6).all() for states in both):
        raise UserError(f"--goals {file}: each start and goal must be {size} finite numbers, a state of {env.spec.id}")
    if max(numbers) >= len(table):
        raise UserError(f"--goals {file} has {len(table)} rows, none for episode {max(numbers)}; lower --episodes")
    start, goal = (states[list(numbers)] for states in both)
    if (elsewhere := ~np.isfinite(env.distance(start, goal))).any():
        row = numbers[int(elsewhere.argmax())]
        raise UserError(
            f"--goals {file}: the goal of row {row} is in another world than its start; write pairs of {env.spec.id}"
        )
    space = env.geometry
    if space and (walled := ~(space.is_free(start) & space.is_free(goal))).any():
        row = numbers[int(walled.argmax())]
        raise UserError(f"--goals {file}: row {row} is in a wall of {space.name}; choose the right --env")
    return start, goal
