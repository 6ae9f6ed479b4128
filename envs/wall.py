"""DINO-WM's Wall: a dot walks through the door between two rooms (DINO-WM, env/wall).

Positions are in pixels of the picture: x is the column, y is the row. The border is a line, the wall between the rooms a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmcache.common.columns import Column
from wmcache.common.errors import UserError
from wmcache.envs.base import ENVIRONMENTS, Environment, EnvSpec, Expert, Frames, Observation, States, Steps, Task

FPS = 10
SIDE = 65
"""Side of the picture before it is resized."""
LOW, HIGH = 4.0, 60.0
"""The border's lines, in both axes."""
WALL, DOOR = 32.0, 10.0
"""x of the wall's middle, y of the door's middle; that of `Wall`."""
WALLS, DOORS = (20, 45), (10, 55)
"""Ranges of those of `Wall-random`, whole numbers, the end excluded."""
HALF_WALL, HALF_DOOR = 3.0, 4.0
DOT = 1.7
"""Standard deviation of the dot's brightness."""
MARGIN = 2 * DOT
"""Distance of starts and goals from every wall."""
THRESHOLD = 4.5

GAIN = 2.0
"""Pixels of an action of 1."""
STEP_MEAN, STEP_DEVIATION, STEP_LEAST, STEP_MOST = 1.0, 0.4, 0.2, 1.8
"""Length of an action of the random walk, a truncated normal."""
CONCENTRATION = 1 / 0.2
"""Of the von Mises distribution of its turns."""
NOISE, NEAR = 0.4, 2.0
"""Standard deviation of the expert's noise, in units of actions; distance in pixels at which it chooses another target."""
ROUNDING = 1e-9
"""Share of a move below which contacts are simultaneous."""
MOUTH = 1.0
"""Distance from the wall of the points before and behind the door that the expert walks to."""


class Walk:
    """A random walk, the policy of DINO-WM's data: each action turns a little from the last one, and has a length of its own."""

    def __init__(self, rng: np.random.Generator, env: Environment) -> None:  # noqa: ARG002 (a policy's signature)
        """Draw the first direction from `rng`."""
        self._rng, self._angle = rng, rng.uniform(0, 2 * np.pi)

    def __call__(self, seen: Steps) -> NDArray[np.float32]:  # noqa: ARG002
        """Return the next action [2]."""
        length = 0.0
        while not STEP_LEAST <= length <= STEP_MOST:
            length = self._rng.normal(STEP_MEAN, STEP_DEVIATION)
        action = length * np.array([np.cos(self._angle), np.sin(self._angle)])
        self._angle += self._rng.vonmises(0.0, CONCENTRATION)
        return action.astype(np.float32)


class Visitor:
    """A scripted policy that walks from one random target to the next, with Gaussian noise on every action.

    Every second target is in the other room on average, so its data has the door, which few episodes of `Walk` pass.
    """

    def __init__(self, rng: np.random.Generator, env: Environment) -> None:  # noqa: ARG002 (a policy's signature)
        """Draw targets and noise from `rng`."""
        self._rng, self._target = rng, np.full(2, np.nan)

    def __call__(self, seen: Steps) -> NDArray[np.float32]:
        """Return the action [2] in a state."""
        position, layout = seen["position"], seen.get("wall", np.array([WALL, DOOR]))
        if not np.linalg.norm(self._target - position) > NEAR:
            self._target = sample_in_room(self._rng, layout, right=bool(self._rng.integers(2)))
        action = action_toward(position, self._target, layout) + self._rng.normal(scale=NOISE, size=2)
        return action.clip(-STEP_MOST, STEP_MOST).astype(np.float32)


def walls_of(layouts: States) -> tuple[States, States]:
    """Return the low and high corners of the walls, [..., 6, 2] each: four behind the border, then above and below the door.

    Args:
        layouts: x of the wall and y of the door, [..., 2].
    """
    low, high = (np.full((*layouts.shape[:-1], 6, 2), bound) for bound in (-np.inf, np.inf))
    for axis in (0, 1):
        high[..., axis, axis], low[..., 2 + axis, axis] = LOW, HIGH
    low[..., 4:, 0], high[..., 4:, 0] = layouts[..., :1] - HALF_WALL, layouts[..., :1] + HALF_WALL
    high[..., 4, 1], low[..., 5, 1] = layouts[..., 1] - HALF_DOOR, layouts[..., 1] + HALF_DOOR
    return low, high


def is_free(positions: States, layouts: States) -> NDArray[np.bool_]:
    """Return whether positions [..., 2] are outside the walls; their surface is."""
    low, high = walls_of(layouts)
    inside = ((low < positions[..., None, :]) & (positions[..., None, :] < high)).all(-1)
    return np.asarray(~inside.any(-1))


def move(positions: States, changes: States, layouts: States) -> tuple[States, States]:
    """Move along a straight line, until a wall stops it.

    The reference moves a dot that touches a wall half a pixel back, and half a pixel along the wall towards larger coordinates.

    Args:
        positions, changes, layouts: [n, 2] each; the positions are free.

    Returns:
        The new positions [n, 2], and the share [n] of the move that was made.
    """
    low, high = walls_of(layouts)
    here, by = positions[:, None], changes[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # a coordinate that does not change
        bounds = np.stack([(low - here) / by, (high - here) / by])
    near, far = np.minimum(*bounds), np.maximum(*bounds)  # NaN along a surface: comparisons are false
    enter, leave = near.max(-1), far.min(-1)
    hit = (enter < leave) & (leave > 0)
    enter = np.where(hit, enter, np.inf)
    share = np.minimum(enter.min(-1), 1.0)
    moved = positions + share[:, None] * changes
    surface = np.where(by > 0, low, high)
    for i, wall in np.argwhere(enter <= share[:, None] + ROUNDING).tolist():  # exactly on the surface
        axis = near[i, wall].argmax()
        moved[i, axis] = surface[i, wall, axis]
    return moved, share


def sees(start: States, ends: States, layout: States) -> NDArray[np.bool_]:
    """Return whether no wall is between a position [2] and positions [n, 2]."""
    starts = np.broadcast_to(start, ends.shape)
    share = move(starts, ends - starts, np.broadcast_to(layout, ends.shape))[1]
    return np.asarray(share >= 1 - ROUNDING)


def toward(position: States, goal: States, layout: States) -> States:
    """Return the point [2] to walk straight to: the goal, or else the other side of the door, or this one."""
    beyond = np.array([HALF_WALL + MOUTH if goal[0] > layout[0] else -HALF_WALL - MOUTH, 0.0])
    points = np.stack([goal, layout + beyond, layout - beyond])
    return np.asarray(points[sees(position, points, layout).argmax()])


def action_toward(position: States, goal: States, layout: States) -> States:
    """Return the action [2] that moves to the point of `toward`, or as fast as the data's fastest in its direction."""
    change = toward(position, goal, layout) - position
    return np.asarray(change / max(GAIN, float(np.linalg.norm(change)) / STEP_MOST))


@dataclass(frozen=True)
class TwoRooms:
    """A `Geometry`: two rooms and a door.

    Attributes:
        layout: x of the wall and y of the door.
    """

    name: str
    layout: tuple[float, float]

    extent: ClassVar[tuple[float, float, float, float]] = (-0.5, SIDE - 0.5, -0.5, SIDE - 0.5)

    @property
    def walls(self) -> NDArray[np.bool_]:
        """Pixels that are walls or behind the border, [SIDE, SIDE]; the row runs along x."""
        inside = slice(int(LOW) + 1, int(HIGH))
        walls = np.ones((SIDE, SIDE), bool)
        walls[inside, inside] = draw_walls(np.array(self.layout)).T[inside, inside]
        return walls

    def position(self, states: States) -> States:
        """Return (x, y) of states [..., S]."""
        return states[..., :2]

    def is_free(self, states: States) -> NDArray[np.bool_]:
        """Return whether states [..., S] are outside the walls."""
        return is_free(states[..., :2], np.array(self.layout))

    def distance(self, start: States, ends: States) -> States:
        """Compute exact shortest path lengths from a state [S] to states [n, S]: straight, or around corners of the door."""
        layout, start, ends = np.array(self.layout), start[:2], ends[:, :2]
        corners = layout + np.array([(x, y) for x in (-HALF_WALL, HALF_WALL) for y in (-HALF_DOOR, HALF_DOOR)])
        between = np.linalg.norm(corners[:, None] - corners, axis=-1)  # each corner sees the others
        to_corner = _seen_distances(start, corners, layout)
        lengths = [_seen_distances(start, ends, layout)]
        for i, corner in enumerate(corners):
            lengths.append((to_corner + between[i]).min() + _seen_distances(corner, ends, layout))
        return np.asarray(np.min(lengths, axis=0))

    def path_length(self, path: States) -> float:
        """Measure a path [n, 2]."""
        return float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())


def _seen_distances(start: States, ends: States, layout: States) -> States:
    """Return straight distances from a position [2] to positions [n, 2]; inf behind a wall."""
    return np.where(sees(start, ends, layout), np.linalg.norm(ends - start, axis=-1), np.inf)


def draw_walls(layout: States) -> NDArray[np.bool_]:
    """Return the black pixels [SIDE, SIDE]."""
    (wall, door), pixels = layout, np.arange(SIDE)
    walls = (np.abs(pixels - wall) <= HALF_WALL) & (np.abs(pixels - door) > HALF_DOOR)[:, None]
    border = (pixels == LOW) | (pixels == HIGH)
    return np.asarray(walls | border | border[:, None])


def draw(position: States, layout: States) -> Frames:
    """Draw a red dot on white between black walls, [SIDE, SIDE, 3]. Its centre's pixel is as red as can be."""
    along_x, along_y = (np.exp(-np.square(np.arange(SIDE) - centre) / (2 * DOT**2)) for centre in position)
    dot = along_y[:, None] * along_x
    frame = np.full((SIDE, SIDE, 3), 255, np.uint8)
    frame[..., 1:] -= (255 * dot / dot.max()).astype(np.uint8)[..., None]
    frame[draw_walls(layout)] = 0
    return frame


def sample_free(rng: np.random.Generator, layout: States) -> States:
    """Draw a position [2] outside the walls."""
    while True:
        position = rng.uniform(LOW, HIGH, 2)
        if is_free(position, layout):
            return position


def sample_in_room(rng: np.random.Generator, layout: States, *, right: bool) -> States:
    """Draw a position [2] in a room, MARGIN away from its walls."""
    low, high = np.full(2, LOW + MARGIN), np.full(2, HIGH - MARGIN)
    if right:
        low[0] = layout[0] + HALF_WALL + MARGIN
    else:
        high[0] = layout[0] - HALF_WALL - MARGIN
    return rng.uniform(low, high)


@ENVIRONMENTS.register("Wall")
class Wall(Environment):
    """A dot without inertia. A state is its position (x, y), which is also the proprio; success is a distance below 4.5.

    Episodes of datasets start anywhere. Where there is a goal, it and the start are in different rooms (DINO-WM, plan.py: random_state).
    """

    policies: ClassVar = {"walk": Walk, "expert": Visitor}
    layout_columns: ClassVar[dict[str, Column]] = {}

    def __init__(self, name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> None:  # noqa: ARG002
        """Open `count` copies."""
        self.count = count
        columns = {
            "action": Column(("action",), "float32", (2,), (-STEP_MOST, -STEP_MOST), (STEP_MOST, STEP_MOST)),
            "position": Column(("state", "proprio"), "float64", (2,)),
            **self.layout_columns,
        }
        self.spec = EnvSpec(name, FPS, columns, image_size, True, (THRESHOLD,), name.lower())
        if not self.layout_columns:
            self.geometry = TwoRooms(name, (WALL, DOOR))
        self._positions: States = np.zeros((count, 2))
        self._layouts: States = np.zeros((count, 2))

    def sample_task(self, rng: np.random.Generator, *, goal: bool = True) -> Task:
        """Draw a start anywhere, or start and goal in different rooms."""
        layout = self._sample_layout(rng)
        if not goal:
            return Task(self._join(sample_free(rng, layout), layout))
        start = self._join(sample_in_room(rng, layout, right=bool(rng.integers(2))), layout)
        return Task(start, self.sample_goal(rng, start))

    def sample_goal(self, rng: np.random.Generator, start: States) -> States:
        """Draw a goal in the other room."""
        position, layout = self._split(start)
        return self._join(sample_in_room(rng, layout, right=bool(position[0] < layout[0])), layout)

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """Start at states outside the walls; raises UserError for others."""
        starts = [self._checked(task.start) for task in tasks]
        self._positions, self._layouts = (np.stack(parts) for parts in zip(*map(self._split, starts), strict=True))
        return self.observe()

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Move by twice the action; an episode never ends by itself."""
        positions = np.empty((*actions.shape[:2], 2))
        for t, action in enumerate(actions.swapaxes(0, 1)):
            change = GAIN * np.clip(action.astype(np.float64), -STEP_MOST, STEP_MOST)
            self._positions, _ = move(self._positions, change, self._layouts)
            positions[:, t] = self._positions
        return self._columns(positions, np.broadcast_to(self._layouts[:, None], positions.shape))

    def observe(self) -> Observation:
        """Return frames and states."""
        columns = self._columns(self._positions.copy(), self._layouts)
        states = self._join(columns["position"], self._layouts)
        return Observation(columns, self.spec.columns, lambda: self.render(states))

    def render(self, states: States) -> Frames:
        """Draw states."""
        frames = [Image.fromarray(draw(*self._split(state))) for state in states]
        size = (self.spec.image_size, self.spec.image_size)
        return np.stack([np.asarray(frame.resize(size, Image.Resampling.BILINEAR)) for frame in frames])

    def distance(self, states: States, goal: States) -> States:
        """Compute the distance of positions (DINO-WM, env/wall: eval_state)."""
        return np.asarray(np.linalg.norm(states[..., :2] - goal[..., :2], axis=-1))

    def longest_move(self, env_steps: int) -> float:
        """Compute it along the diagonal."""
        return float(env_steps * GAIN * STEP_MOST * np.sqrt(2))

    def expert(self) -> Expert:
        """Walk as `Visitor` does, without its noise."""

        def act(state: States, goal: States, steps: int) -> NDArray[np.floating]:
            position, layout = self._split(state)
            actions = np.empty((steps, 2))
            for i in range(steps):
                actions[i] = action_toward(position, goal[:2], layout)
                position = move(position[None], GAIN * actions[i][None], layout[None])[0][0]
            return actions

        return act

    def _checked(self, start: object) -> States:
        state = np.asarray(start, np.float64)
        size = sum(column.width for name, column in self.spec.columns.items() if name != "action")
        if state.shape == (size,) and np.isfinite(state).all():
            position, layout = self._split(state)
            room = np.array([HALF_WALL, HALF_DOOR])
            if (LOW + room <= layout).all() and (layout <= HIGH - room).all() and is_free(position, layout):
                return state
        raise UserError(
            f"a state of {self.spec.id} is {size} finite numbers, a position outside its walls, not {start!r}"
        )

    def _sample_layout(self, rng: np.random.Generator) -> States:  # noqa: ARG002 (for walls that differ)
        return np.array([WALL, DOOR])

    def _split(self, state: States) -> tuple[States, States]:
        """Return position and layout, [2] each, of a state [S]."""
        return state, np.array([WALL, DOOR])

    def _join(self, positions: States, layouts: States) -> States:  # noqa: ARG002 (for walls that differ)
        """Return states [..., S]."""
        return positions

    def _columns(self, positions: States, layouts: States) -> Steps:  # noqa: ARG002 (for walls that differ)
        return {"position": positions}


@ENVIRONMENTS.register("Wall-random")
class RandomWall(Wall):
    """`Wall` where each episode has its own wall and door. A state is (x, y, x of the wall, y of the door)."""

    layout_columns: ClassVar = {"wall": Column(("state",), "float64", (2,))}

    def distance(self, states: States, goal: States) -> States:
        """See `Wall`; inf where the wall or the door is another one."""
        same = (states[..., 2:] == goal[..., 2:]).all(-1)
        return np.where(same, super().distance(states, goal), np.inf)

    def _sample_layout(self, rng: np.random.Generator) -> States:
        return np.array([rng.integers(*WALLS), rng.integers(*DOORS)], np.float64)

    def _split(self, state: States) -> tuple[States, States]:
        return state[:2], state[2:]

    def _join(self, positions: States, layouts: States) -> States:
        return np.concatenate([positions, layouts], -1)

    def _columns(self, positions: States, layouts: States) -> Steps:
        return {"position": positions, "wall": layouts.copy()}
