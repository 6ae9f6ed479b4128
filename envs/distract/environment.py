"""A wrapper that distracts from any environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from wmcache.common.columns import Column, join_role, of_role
from wmcache.common.errors import UserError
from wmcache.envs.base import DrawTask, Environment, Expert, Frames, Observation, Replay, Start, States, Steps, Task
from wmcache.envs.distract import pixels, scene
from wmcache.envs.distract.looks import Distraction, looks_of

VIEW = "view"
"""Column of a distracted environment, float64 [2]: the number that the episode's look is drawn from, and its env steps."""
ENDS = ("terminated", "truncated")


class Distracted(Environment):
    """An environment whose episodes look different each. What happens in them is as without distraction.

    A state is the environment's own, with `view` where its name sorts: so a state is still all that a frame shows, and a goal looks as
    the episode does. The look of an episode is a function of its start and the distraction's seed.
    """

    def __init__(self, inner: Environment, distraction: Distraction) -> None:
        """Wrap an environment; raises UserError for a kind that it cannot be distracted by."""
        possible = (*(scene.KINDS if inner.scene else pixels.KINDS), *inner.distractions)
        if missing := [kind for kind in distraction.kinds if kind not in possible]:
            raise UserError(
                f"environment {inner.spec.id} cannot be distracted by {missing[0]}; choose --distract from {', '.join(possible)}"
            )
        if VIEW in inner.spec.columns:
            raise UserError(f"environment {inner.spec.id} has a column {VIEW} of its own, so it cannot be distracted")
        self._inner, self._distraction = inner, distraction
        self.count, self.geometry = inner.count, inner.geometry
        setattr(self, "policies", inner.policies)  # noqa: B010 (mypy: a class variable)
        self.spec = replace(
            inner.spec,
            id=distraction.name(inner.spec.id),
            columns={**inner.spec.columns, VIEW: Column(("state",), "float64", (2,))},
            dataset=f"{inner.spec.dataset}-{'-'.join(distraction.kinds)}-{distraction.seed}",
            distraction=str(distraction),
        )
        self._states = {name: inner.spec.columns[name] for name in of_role(inner.spec.columns, "state")}
        self._first = sum(column.width for name, column in self._states.items() if name < VIEW)
        self._size = sum(column.width for column in self._states.values())
        self._views = np.zeros((inner.count, 2))
        self._ended = np.zeros(inner.count, bool)

    def sample_task(self, rng: np.random.Generator, *, goal: bool = True) -> Task:
        """Draw the task that the environment draws; start and goal look the same."""
        return self._viewed(self._inner.sample_task(rng, goal=goal))

    def fixed_tasks(self) -> dict[str, DrawTask]:
        """Return the environment's; start and goal look the same."""
        return {name: partial(self._draw_viewed, draw) for name, draw in self._inner.fixed_tasks().items()}

    def sample_goal(self, rng: np.random.Generator, start: States) -> Start | None:
        """Draw a goal of the environment, which looks as the start does."""
        plain, view = self._split(start)
        assert isinstance(plain, np.ndarray)
        goal = self._inner.sample_goal(rng, plain)
        return None if goal is None else self._join(goal, view)

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """Start at states with a view, or at any start of the environment's own."""
        starts, views = zip(*(self._split(task.start) for task in tasks), strict=True)
        self._views, self._ended = np.stack(views), np.zeros(self.count, bool)
        return self._observe(self._inner.reset([Task(start) for start in starts]))

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Execute actions."""
        moved = self._inner.step(actions)
        ended = np.zeros(actions.shape[:2], bool)
        for name in ENDS:
            ended |= moved.get(name, False)
        before = np.concatenate([self._ended[:, None], ended[:, :-1]], 1)
        views = np.repeat(self._views[:, None], actions.shape[1], 1)
        views[..., 1] += np.cumsum(~np.logical_or.accumulate(before, 1), 1)
        self._views, self._ended = views[:, -1].copy(), before[:, -1] | ended[:, -1]
        return {**moved, VIEW: views}

    def observe(self) -> Observation:
        """Return the current observations."""
        return self._observe(self._inner.observe())

    def render(self, states: States) -> Frames:
        """Draw states with a view."""
        plain, views = self._plain(states), states[..., self._first : self._first + 2]
        return self._draw(views, lambda: self._inner.render(plain), plain)

    def distance(self, states: States, goal: States) -> States:
        """Compute the environment's distance."""
        return self._inner.distance(self._plain(states), self._plain(goal))

    def longest_move(self, env_steps: int) -> float:
        """Return the environment's."""
        return self._inner.longest_move(env_steps)

    def expert(self) -> Expert | None:
        """Return the environment's."""
        act = self._inner.expert()
        return None if act is None else lambda state, goal, steps: act(self._plain(state), self._plain(goal), steps)

    def close(self) -> None:
        """Close the environment."""
        self._inner.close()

    def _observe(self, seen: Observation) -> Observation:
        views = self._views.copy()
        states = join_role(seen.columns, self._states, "state") if self.spec.renders_states else None
        columns = {**seen.columns, VIEW: views}
        return Observation(columns, self.spec.columns, lambda: self._draw(views, lambda: seen.image, states))

    def _draw(self, views: NDArray[np.floating], usual: Callable[[], Frames], states: States | None) -> Frames:
        looks = looks_of(self._distraction, views)
        if self._inner.scene:
            return self._inner.draw_looks(looks, states)
        return np.stack([pixels.distort(frame, look) for frame, look in zip(usual(), looks, strict=True)])

    def _plain(self, states: States) -> States:
        """Leave out the view of states [..., S]; states without one stay as they are."""
        if states.shape[-1] == self._size:
            return states
        return np.delete(states, (self._first, self._first + 1), -1)

    def _draw_viewed(self, draw: DrawTask, rng: np.random.Generator) -> Task:
        return self._viewed(draw(rng))

    def _viewed(self, task: Task) -> Task:
        """Add the view of its start to a task of the environment's own."""
        view = _view_of(task.start)
        return Task(self._join(task.start, view), None if task.goal is None else self._join(task.goal, view))

    def _join(self, start: Start, view: NDArray[np.floating]) -> Start:
        if not isinstance(start, np.ndarray):
            return start  # the view follows from the seed
        return np.insert(np.asarray(start, np.float64), [self._first, self._first], view)

    def _split(self, start: Start) -> tuple[Start, NDArray[np.floating]]:
        """Split a start into the environment's own and its view [2]."""
        if isinstance(start, Replay):
            first, view = self._split(start.start)
            assert not isinstance(first, Replay)
            return Replay(first, start.actions), after(view, start)
        if isinstance(start, int) or np.shape(start)[-1] == self._size:
            return start, _view_of(start)
        state = np.asarray(start, np.float64)
        return self._plain(state), state[self._first : self._first + 2]


def _view_of(start: Start) -> NDArray[np.floating]:
    """Return the view of an episode that starts at a seed or a state."""
    if isinstance(start, Replay):
        return after(_view_of(start.start), start)
    words = [start] if isinstance(start, int) else np.frombuffer(np.asarray(start, np.float64).tobytes(), np.uint32)
    return np.array([float(np.random.SeedSequence(words).generate_state(1)[0]), 0.0])


def after(view: NDArray[np.floating], replay: Replay) -> NDArray[np.floating]:
    """Return a view as many env steps later as a replay has."""
    later: NDArray[np.floating] = view + np.array([0.0, len(replay.actions)])
    return later
