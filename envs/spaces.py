"""gymnasium's spaces as columns of numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from gymnasium import spaces

from wmcache.common.columns import MAX_COLUMN_WIDTH, RESERVED, Column, DType, Role
from wmcache.common.errors import UserError
from wmcache.envs.base import Array

OWN = {"action", "state", "reward", "terminated", "truncated", *RESERVED}
"""Columns that a part of an observation cannot be named after."""
DTYPES = get_args(DType)


@dataclass(frozen=True)
class Part:
    """A part of an observation that becomes a column.

    Attributes:
        keys: that lead to it through nested dictionaries.
    """

    keys: tuple[str, ...]
    space: spaces.Space[Any]
    column: Column

    def read(self, observation: Any) -> Array:
        """Return the column's values of one observation."""
        for key in self.keys:
            observation = observation[key]
        flat = np.asarray(spaces.flatten(self.space, observation))
        return flat.astype(self.column.dtype).reshape(self.column.shape)


def observed_parts(space: spaces.Space[Any], roles: tuple[Role, ...]) -> dict[str, Part]:
    """Name the numeric parts of an observation; images, texts and what has no fixed size are left out."""
    parts: dict[str, Part] = {}
    for keys, leaf in _leaves(space):
        image = isinstance(leaf, spaces.Box) and leaf.dtype == np.uint8 and len(leaf.shape) > 1
        if image or isinstance(leaf, spaces.Text) or not leaf.is_np_flattenable:
            continue
        flat = spaces.flatten_space(leaf)
        assert isinstance(flat, spaces.Box)
        width = flat.shape[0]
        if not 0 < width <= MAX_COLUMN_WIDTH:
            continue
        dtype = flat.dtype.name if flat.dtype.name in DTYPES else "float64"
        name = re.sub(r"[^A-Za-z0-9_]", "_", "_".join(keys))[:40]
        if not name[:1].isalpha() or name.lower() in OWN or name in parts:
            name = "_".join(filter(None, ("observation", name)))
        parts[name] = Part(keys, leaf, Column(roles, cast(DType, dtype), (width,)))
    return parts


def _leaves(space: spaces.Space[Any], keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], spaces.Space[Any]]]:
    if not isinstance(space, spaces.Dict):
        return [(keys, space)]
    return [leaf for name, inner in space.spaces.items() for leaf in _leaves(inner, (*keys, name))]


def action_column(space: spaces.Space[Any], env: str) -> tuple[Column, Callable[[Array], Any]]:
    """Return the column of an action space, and a function from its values [A] to an action of the environment.

    Raises:
        UserError: the space is neither a Box with finite bounds nor Discrete.
    """
    if isinstance(space, spaces.Discrete):
        count, first = int(space.n), int(space.start)
        column = Column(("action",), "float32", (count,), (0.0,) * count, (1.0,) * count, discrete=True)
        return column, lambda values: int(np.argmax(values)) + first
    if not isinstance(space, spaces.Box) or not space.shape or not np.isfinite([space.low, space.high]).all():
        raise UserError(
            f"actions of environment {env} are {space}; they must be a Box with finite bounds or Discrete, so wrap it"
        )
    low, high = (tuple(np.ravel(bound).astype(float).tolist()) for bound in (space.low, space.high))
    column = Column(("action",), "float32", (len(low),), low, high)
    whole = np.issubdtype(space.dtype, np.integer)

    def to_action(values: Array) -> Any:
        return (np.rint(values) if whole else values).astype(space.dtype).reshape(space.shape)

    return column, to_action
