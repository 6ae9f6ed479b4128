"""What is pushed: a rope and grains, as MJCF and as particles.

Lengths are in units of 10 cm, as the reference's. A state is the positions of the particles alone: none turns around an axis that matters.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.mujoco_gl import mujoco

Particles = NDArray[np.float64]
"""Positions [n, 3]: x to the right and y upwards in a frame, z above the table."""

AWAY = 0.6
"""Largest distance between the middles of object and table at the start, along x and along y."""


class Pushable(Protocol):
    """An object on the table.

    Attributes:
        radius: of a particle, which is a sphere.
        tool: MJCF of what pushes it. A push is along x, and z = 0 is the table.
        tool_radius: half the extent of the tool along a push.
        room: distance from the tool's middle at which no particle is under it.
    """

    radius: ClassVar[float]
    tool: ClassVar[str]
    tool_radius: ClassVar[float]
    room: ClassVar[float]

    def mjcf(self) -> tuple[str, str]:
        """Return the bodies, and the pairs of them that do not touch each other."""

    def sample(self, rng: np.random.Generator) -> Particles:
        """Draw particles near the middle of the table."""

    def to_joints(self, particles: Particles) -> NDArray[np.float64]:
        """Return the positions of the joints of `mjcf`."""

    def to_particles(self, data: Any) -> Particles:
        """Return the particles of simulated data."""

    def is_possible(self, particles: Particles) -> bool:
        """Return whether these can be its particles."""


class RopeOnTable(Pushable):
    """A chain of 20 links with ball joints, which bend back weakly; a sphere at each end of a link. A stick pushes it."""

    links, length, radius = 20, 0.15, 0.1
    tool_radius, room = 0.12, 0.25
    tool = '<geom class="tool" type="capsule" size="0.12" fromto="0 0 0.14 0 0 1"/>'

    def mjcf(self) -> tuple[str, str]:
        """See `Pushable`."""
        sphere = f'<geom class="particle" size="{self.radius}"/>'
        skin = f'<geom class="seen" type="capsule" size="{self.radius}" fromto="0 0 0 {self.length} 0 0"/>'
        bodies = f'<geom class="particle" size="{self.radius}" pos="{self.length} 0 0"/>'
        for link in reversed(range(self.links)):
            joint = '<joint type="ball" stiffness="0.3" damping="0.05" armature="0.002"/>' if link else "<freejoint/>"
            at = self.length if link else 0
            bodies = f'<body name="link{link}" pos="{at} 0 0">{joint}{sphere}{skin}{bodies}</body>'
        near = [(one, two) for one in range(self.links) for two in range(one + 1, min(one + 4, self.links))]
        return bodies, "".join(f'<exclude body1="link{one}" body2="link{two}"/>' for one, two in near)

    def sample(self, rng: np.random.Generator) -> Particles:
        """Draw an arc of up to 2 radians."""
        headings = rng.uniform(0, 2 * np.pi) + rng.uniform(-1, 1) * np.linspace(-1, 1, self.links)
        nodes = np.zeros((self.links + 1, 3))
        nodes[1:, :2] = self.length * np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1), 0)
        nodes[:, :2] += rng.uniform(-AWAY, AWAY, 2) - nodes[:, :2].mean(0)
        nodes[:, 2] = self.radius
        return nodes

    def to_joints(self, particles: Particles) -> NDArray[np.float64]:
        """Turn each link by the smallest rotation from the one before it."""
        joints = [*particles[0]]
        turned = np.array([1.0, 0.0, 0.0, 0.0])  # of the link before, in the world
        for along in np.diff(particles, axis=0):
            back, seen, before = np.empty(4), np.empty(3), turned.copy()
            mujoco.mju_negQuat(back, before)
            mujoco.mju_rotVecQuat(seen, along / np.linalg.norm(along), back)
            turn = _turn_x_to(seen)
            mujoco.mju_mulQuat(turned, before, turn)
            joints += [*turn]
        return np.array(joints)

    def to_particles(self, data: Any) -> Particles:
        """Return the ends of the links."""
        nodes = data.xpos[1 : self.links + 1]
        end = nodes[-1] + self.length * data.xmat[self.links].reshape(3, 3)[:, 0]
        return np.concatenate([nodes, end[None]])

    def is_possible(self, particles: Particles) -> bool:
        """Return whether the links have their length."""
        return bool(np.allclose(np.linalg.norm(np.diff(particles, axis=0), axis=1), self.length, rtol=1e-4))


def _turn_x_to(direction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest rotation, a quaternion, that turns the x axis to a unit vector."""
    x, y, z = direction
    if x < -1 + 1e-9:
        return np.array([0.0, 0.0, 0.0, 1.0])
    turn = np.array([1 + x, 0.0, -z, y])
    return np.asarray(turn / np.linalg.norm(turn))


class GrainsOnTable(Pushable):
    """Spheres that slide and do not roll, so that they come to rest, in one layer. A board across the push moves them."""

    rows, radius = 10, 0.1
    spacing = 0.23
    tool_radius, room = 0.1, 0.6
    tool = (
        '<geom class="tool" type="capsule" size="0.1" fromto="0 -0.6 0.12 0 0.6 0.12"/>'
        '<geom class="tool" type="box" size="0.1 0.6 0.5" pos="0 0 0.62"/>'
    )

    def mjcf(self) -> tuple[str, str]:
        """See `Pushable`."""
        joints = "".join(f'<joint type="slide" axis="{axis}"/>' for axis in ("1 0 0", "0 1 0", "0 0 1"))
        return f'<body>{joints}<geom class="particle" size="{self.radius}"/></body>' * self.rows**2, ""

    def sample(self, rng: np.random.Generator) -> Particles:
        """Draw a turned square of grains, each a little off its grid point."""
        line = self.spacing * (np.arange(self.rows) - (self.rows - 1) / 2)
        square = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2) + rng.uniform(-0.01, 0.01, (self.rows**2, 2))
        angle = rng.uniform(0, np.pi / 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        middle = rng.uniform(-AWAY, AWAY, 2)
        return np.concatenate([square @ turn.T + middle, np.full((self.rows**2, 1), self.radius)], 1)

    def to_joints(self, particles: Particles) -> NDArray[np.float64]:
        """Return the positions themselves."""
        return particles.ravel()

    def to_particles(self, data: Any) -> Particles:
        """Return the middles of the grains."""
        return np.array(data.xpos[1 : self.rows**2 + 1])

    def is_possible(self, particles: Particles) -> bool:  # noqa: ARG002 (any positions are)
        """See `Pushable`."""
        return True
