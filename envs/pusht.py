"""PushT with DINO-WM's protocol: push a T with a disc (DINO-WM, env/pusht; the physics and the picture are gym-pusht's)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmcache.common.columns import Column
from wmcache.common.errors import UserError, reason
from wmcache.envs import base
from wmcache.envs.base import ENVIRONMENTS, Environment, EnvSpec, Frames, Observation, States, Steps, Task
from wmcache.envs.gym import resized

FPS = 10
WORLD = 512
"""Side of the world, in its units and in pixels of its picture."""
SCALE = 100.0
"""World units of an action of 1: the agent's move relative to where it is."""
LOW, HIGH = 20.0, 491.0
"""Bounds of the agent's centre: its radius of 15 inside the walls."""
POSITION_TOLERANCE, ANGLE_TOLERANCE = 20.0, np.pi / 9
CENTRE = 45.0
"""Distance from the middle of the T's bar, which is its position, to its centre of gravity."""
TIPS = np.array([[-60.0, 0.0], [60.0, 0.0], [60.0, 30.0], [-60.0, 30.0], [-15.0, 120.0], [15.0, 120.0]])
"""Corners of the T around its position."""

NOISE = 0.05
"""Standard deviation of the expert's noise, in units of actions."""
WIDE_NOISE, CORRELATION = 0.15, 0.8
"""Those of the noisy expert: its noise alone moves the agent about 60 units in 5 env steps, as far as the expert does."""
NEXT_TARGET = 60
"""Env steps after which the expert chooses another target."""
PROPRIO = [0, 1, 5, 6]
"""The agent's part of a state."""


class Expert:
    """A scripted policy that pushes the T from one random pose to the next, with Gaussian noise on every action.

    It walks around the T until it is behind it, as seen from the target, then pushes; beside the centre where the T has to turn.
    """

    noise, correlation = NOISE, 0.0

    def __init__(self, rng: np.random.Generator, env: Environment) -> None:  # noqa: ARG002 (a policy's signature)
        """Draw targets and noise from `rng`."""
        self._rng, self._left, self._drift = rng, 0, np.zeros(2)
        self._target: States = np.zeros(7)

    def __call__(self, seen: Steps) -> NDArray[np.float32]:
        """Return the action [2] in a state."""
        state = seen["state"]
        if self._left == 0 or pose_error(state, self._target) < 1.0:
            self._target, self._left = sample_state(self._rng), NEXT_TARGET
        self._left -= 1
        move = push_towards(state, self._target) / SCALE
        fresh = self._rng.normal(scale=self.noise * np.sqrt(1 - self.correlation**2), size=2)
        self._drift = self.correlation * self._drift + fresh
        return (move + self._drift).clip(-1.0, 1.0).astype(np.float32)


class NoisyExpert(Expert):
    """The expert with noise as large as its moves and correlated over env steps.

    The expert's own actions are nearly a function of the state; a planner also tries others, which a world model has to have seen.
    """

    noise, correlation = WIDE_NOISE, CORRELATION


def push_towards(state: States, target: States) -> States:
    """Return the agent's next move [2], in world units, to bring T and agent to the pose of a target [7]."""
    agent, centre = state[:2], centre_of(state)
    if pose_error(state, target) < 1.0:
        return _at_most(target[:2] - agent, 40.0)
    offset, angle = centre_of(target) - centre, float(wrapped(target[4] - state[4]))
    distance = float(np.linalg.norm(offset))
    if distance < 18.0 and abs(angle) > 0.2:
        forward = turn(float(state[4])) @ (-np.sign(angle), 0.0)  # at the end of its stem
        return _push(agent, centre, state[2:4] + turn(float(state[4])) @ (0.0, 105.0), forward)
    forward = offset / max(1e-6, distance)
    # A push beside the centre turns the T by the opposite of its side.
    beside = float(np.clip(-25.0 * angle, -30.0, 30.0)) * np.array([-forward[1], forward[0]])
    return _push(agent, centre, centre + beside, forward)


def _push(agent: States, centre: States, contact: States, forward: States) -> States:
    """Push the T at a point along a direction, or go around its centre to where that is possible."""
    along = (agent - contact) @ forward
    across = np.linalg.norm(agent - contact - along * forward)
    if along < -10.0 and across < 25.0:
        return _at_most(contact + 10.0 * forward - agent, 30.0)
    behind = contact - 80.0 * forward
    here, there = _bearing(agent - centre), _bearing(behind - centre)
    left = float(wrapped(there - here))
    if abs(left) < 0.4:
        return _at_most(behind - agent, 40.0)
    around = here + float(np.clip(left, -0.5, 0.5))
    return _at_most(centre + 115.0 * np.array([np.cos(around), np.sin(around)]) - agent, 40.0)


def _bearing(offset: States) -> float:
    return float(np.arctan2(offset[1], offset[0]))


def centre_of(state: States) -> States:
    """Return the T's centre of gravity [2]."""
    return np.asarray(state[2:4] + turn(float(state[4])) @ (0.0, CENTRE))


def _at_most(move: States, length: float) -> States:
    return move * min(1.0, length / max(1e-6, float(np.linalg.norm(move))))


def pose_error(state: States, target: States) -> float:
    """Compute the distance of the T's pose alone, in the units of `PushT.distance`."""
    position = np.linalg.norm(centre_of(state) - centre_of(target)) / POSITION_TOLERANCE
    return float(np.maximum(position, np.abs(wrapped(state[4] - target[4])) / ANGLE_TOLERANCE))


def sample_state(rng: np.random.Generator) -> States:
    """Draw a state [7] at rest."""
    while True:
        agent, block = rng.uniform(50, 450, 2), rng.uniform(100, 400, 2)
        angle = rng.uniform(0, 2 * np.pi)
        tips = block + TIPS @ turn(angle).T
        state = np.concatenate([agent, block, [angle, 0.0, 0.0]])
        if (tips > 10).all() and (tips < WORLD - 10).all() and np.linalg.norm(agent - centre_of(state)) > 110:
            return state


def turn(angle: float) -> States:
    """Return the matrix [2, 2] of a rotation."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def wrapped(angle: States | float) -> States:
    """Return angles in [-pi, pi)."""
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)


@ENVIRONMENTS.register("PushT")
class PushT(Environment):
    """A disc and a T on a plane. No goal is drawn.

    A state is (agent x, y, T x, y, angle in [0, 2 pi), agent vx, vy). Success is a distance below 1: the positions of agent and T
    together within 20 and the angle within pi / 9.
    """

    policies: ClassVar = {"expert": Expert, "noisy-expert": NoisyExpert}

    def __init__(self, name: str, count: int = 1, image_size: int = 224, layout: Sequence[str] = ()) -> None:  # noqa: ARG002
        """Open it; raises UserError where gym-pusht is not installed."""
        self.count = count
        columns = {
            "action": Column(("action",), "float32", (2,), (-1.0, -1.0), (1.0, 1.0)),
            "proprio": Column(("proprio",), "float64", (4,)),
            "state": Column(("state",), "float64", (7,)),
        }
        self.spec = EnvSpec("PushT", FPS, columns, image_size, renders_states=True, thresholds=(1.0,), dataset="pusht")
        self._worlds = [_make_world() for _ in range(count)]
        self._painter: Any = None

    def sample_task(self, rng: np.random.Generator, *, goal: bool = True) -> Task:
        """Draw states at rest: positions as gym-pusht, but with the T inside the walls and clear of the agent."""
        start = sample_state(rng)
        return Task(start, sample_state(rng) if goal else None)

    def reset(self, tasks: Sequence[Task]) -> Observation:
        """Start at states [7]."""
        for i, task in enumerate(tasks):
            start = np.asarray(task.start, np.float64)
            if start.shape != (7,) or not np.isfinite(start).all():
                raise UserError(f"a state of PushT is 7 finite numbers, not {task.start!r}")
            self._worlds[i] = _make_world()
            _set_state(self._worlds[i], start)
        return self.observe()

    def step(self, actions: NDArray[np.floating]) -> Steps:
        """Move the agents; an episode never ends by itself."""
        states = np.empty((*actions.shape[:2], 7))
        for i, sequence in enumerate(actions):
            for t, action in enumerate(sequence):
                _move(self._worlds[i], action)
                states[i, t] = _state(self._worlds[i])
        return {"state": states, "proprio": states[..., PROPRIO]}

    def observe(self) -> Observation:
        """Return frames and states."""
        states = np.stack([_state(world) for world in self._worlds])
        columns = {"state": states, "proprio": states[:, PROPRIO]}
        return Observation(columns, self.spec.columns, lambda: self.render(states))

    def render(self, states: States) -> Frames:
        """Draw states from above."""
        if self._painter is None:
            self._painter = _make_world(obs_type="pixels", observation_width=WORLD, observation_height=WORLD)
        frames = []
        for state in states:
            _set_state(self._painter, state)
            frames.append(resized(self._painter.get_obs(), self.spec.image_size))
        return np.stack(frames)

    def distance(self, states: States, goal: States) -> States:
        """Compute the larger of position error / 20 and angle error / (pi / 9) (DINO-WM, env/pusht: eval_state)."""
        position = np.linalg.norm(states[..., :4] - goal[..., :4], axis=-1) / POSITION_TOLERANCE
        angle = np.abs(wrapped(states[..., 4] - goal[..., 4])) / ANGLE_TOLERANCE
        return np.asarray(np.maximum(position, angle))

    def expert(self) -> base.Expert:
        """Push as `Expert` does, without its noise."""
        world = _make_world()

        def act(state: States, goal: States, steps: int) -> NDArray[np.floating]:
            _set_state(world, state)
            actions = np.empty((steps, 2))
            for i in range(steps):
                actions[i] = (push_towards(_state(world), goal) / SCALE).clip(-1.0, 1.0)
                _move(world, actions[i])
            return actions

        return act


def _move(world: Any, action: NDArray[np.floating]) -> None:
    target = np.array(world.agent.position) + SCALE * np.clip(np.asarray(action, np.float64), -1.0, 1.0)
    world.step(np.clip(target, LOW, HIGH))


def _make_world(**options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pygame and pymunk warn of pkg_resources
            world = importlib.import_module("gym_pusht.envs").PushTEnv(**options)
            world.reset(options={"reset_to_state": np.array([100.0, 100.0, 350.0, 350.0, 0.0])})
    except ImportError as error:
        raise UserError(f"PushT needs gym-pusht ({reason(error)}); pip install 'wmcache[pusht]'") from error
    world.goal_pose = np.array([-WORLD, -WORLD, 0.0])  # gym-pusht draws it and counts it as an end
    return world


def _set_state(world: Any, state: States) -> None:
    # The angle first: it turns the T around its centre of gravity, and so moves its position.
    world.block.angle = float(state[4])
    world.block.position = tuple(map(float, state[2:4]))
    world.agent.position = tuple(map(float, state[:2]))
    world.agent.velocity = tuple(map(float, state[5:7]))
    for body in (world.block, world.agent):
        world.space.reindex_shapes_for_body(body)


def _state(world: Any) -> States:
    agent, block = world.agent, world.block
    return np.array([*agent.position, *block.position, block.angle % (2 * np.pi), *agent.velocity])
