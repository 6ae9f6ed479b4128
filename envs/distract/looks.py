"""What an episode looks like under distraction, as a function of seeds and the env step alone; nothing here draws."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError, suggest

KINDS = ("colors", "camera", "background", "jitter", "ball")
"""A new kind comes last: an episode's generators are numbered by them."""
NAMED = re.compile(r"(?P<plain>.+)\+(?P<kinds>[a-z]+(?:,[a-z]+)*)@(?P<seed>[0-9]{1,9})", re.DOTALL)
"""Name of a distracted environment: `UMaze+colors,camera@3`."""

SECTORS = 12
"""Of the hue circle. Even seeds draw hues from the even sectors, odd seeds from the odd ones, so the two sets of colours are disjoint."""
MIDDLE = 1 / 3
"""Share of a sector that hues are drawn from, around its centre, so that a rendered colour stays in it."""
SATURATION, VALUE = (0.55, 1.0), (0.45, 1.0)

TURN, ROLL, ZOOM = 0.2, 0.15, (0.95, 1.15)
"""Largest turn of the camera around what it looks at and around its axis, in radians, and its distance relative to the usual one."""
SHIFT = 0.04
"""Largest shift of a jittered frame to each side, as a share of its side."""
WAVES, BANDS = 4, 3
SPEED = (0.05, 0.25)
"""Radians per env step that a wave of the background moves by."""


@dataclass(frozen=True)
class Distraction:
    """Kinds of distraction, in the order of `KINDS`, and the seed that their looks are drawn from."""

    kinds: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, kinds: str, seed: int) -> Distraction:
        """Read kinds that are separated by commas; raises UserError for an unknown one."""
        names = [name.strip() for name in kinds.split(",")]
        if unknown := [name for name in names if name not in KINDS]:
            raise UserError(f"--distract has no kind {unknown[0]!r}; {suggest(unknown[0], KINDS)}")
        return cls(tuple(name for name in KINDS if name in names), seed)

    def __str__(self) -> str:
        """Return `colors,camera@3`."""
        return f"{','.join(self.kinds)}@{self.seed}"

    def name(self, plain: str) -> str:
        """Return the name of a distracted environment."""
        return f"{plain}+{self}"


def split_name(name: str) -> tuple[str, Distraction | None]:
    """Split the name of a distracted environment into the plain name and the distraction; None where the name has none."""
    found = NAMED.fullmatch(name)
    if found is None or not {*found["kinds"].split(",")} <= {*KINDS}:
        return name, None
    return found["plain"], Distraction.of(found["kinds"], int(found["seed"]))


def distraction_of(name: str) -> str:
    """Return the distraction in the name of an environment, as `EnvSpec` has it; empty without."""
    found = split_name(name)[1]
    return "" if found is None else str(found)


Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""


@dataclass(frozen=True)
class CameraMove:
    """A turn around what the camera looks at (yaw, pitch) and around its axis (roll), in radians; `zoom` scales its distance."""

    yaw: float
    pitch: float
    roll: float
    zoom: float


@dataclass(frozen=True)
class Look:
    """What a frame looks like.

    Attributes:
        episode: number that the look of an episode is drawn from.
        step: env steps since the episode started, which move the background, the camera and the second ball.
    """

    distraction: Distraction
    episode: int
    step: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of distraction."""
        return self.distraction.kinds

    def rng(self, kind: str) -> np.random.Generator:
        """Return the episode's generator of a kind, from its start."""
        return np.random.default_rng((self.distraction.seed, self.episode, KINDS.index(kind)))

    def colours(self, count: int) -> list[Colour]:
        """Draw the episode's colours of some objects."""
        return _draw_colours(self.rng("colors"), self.distraction.seed, count)

    @cached_property
    def camera(self) -> CameraMove:
        """The episode's camera."""
        rng = self.rng("camera")
        yaw, pitch = rng.uniform(-TURN, TURN, 2)
        return CameraMove(yaw, pitch, rng.uniform(-ROLL, ROLL), rng.uniform(*ZOOM))

    @cached_property
    def shift(self) -> tuple[float, float]:
        """The frame's shift to the right and down, as shares of its side; another one in each env step."""
        rng = np.random.default_rng((self.distraction.seed, self.episode, KINDS.index("jitter"), self.step))
        right, down = rng.uniform(-SHIFT, SHIFT, 2)
        return right, down

    def background(self, height: int, width: int) -> NDArray[np.uint8]:
        """Draw the moving background, [height, width, 3]: bands of three colours along waves."""
        rng = self.rng("background")
        palette = (255 * np.asarray(_draw_colours(rng, self.distraction.seed, BANDS))).astype(np.uint8)
        x, y = np.arange(width) / width, np.arange(height)[:, None] / height
        bands = waves(rng, x, y, self.step)
        return np.asarray(palette[np.minimum((BANDS * bands).astype(int), BANDS - 1)])


def _draw_colours(rng: np.random.Generator, seed: int, count: int) -> list[Colour]:
    sectors = range(seed % 2, SECTORS, 2)
    order = rng.permutation(sectors)
    found = []
    for i in range(count):
        hue = (order[i % len(order)] + 0.5 + rng.uniform(-MIDDLE, MIDDLE) / 2) / SECTORS
        found.append(colorsys.hsv_to_rgb(hue, rng.uniform(*SATURATION), rng.uniform(*VALUE)))
    return found


def waves(
    rng: np.random.Generator, x: NDArray[np.floating], y: NDArray[np.floating], step: int = 0
) -> NDArray[np.floating]:
    """Draw a sum of waves at points in [0, 1], values in [0, 1]; they move with the env step."""
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape))
    for _ in range(WAVES):
        across, down = rng.uniform(-4, 4, 2)
        phase = rng.uniform(0, 2 * np.pi) + step * rng.choice((-1, 1)) * rng.uniform(*SPEED)
        total += np.sin(2 * np.pi * (across * x + down * y) + phase)
    return np.asarray(np.clip(0.5 + total / 4.0, 0.0, 1.0))


def looks_of(distraction: Distraction, views: NDArray[np.floating]) -> Sequence[Look]:
    """Return the looks of views [n, 2], see `environment.VIEW`."""
    return [Look(distraction, int(episode), int(step)) for episode, step in views]
