"""What success is: a distance to the goal, the environment's own or one on named columns, or the return."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.common.columns import of_role
from wmcache.common.errors import UserError, suggest
from wmcache.envs import Environment, Geometry
from wmcache.planner.episodes import Distance

OF_A_FRAME = frozenset({"proprio", "state", "extra"})
"""Roles of columns that describe a frame."""


PART = re.compile(r"(?P<name>\w+)(:(?P<first>\d{1,4})(-(?P<last>\d{1,4}))?)?")
"""A column of `--judge-columns`, or some of its numbers: `observation`, `observation:8-9`, `observation:3`."""


@dataclass(frozen=True)
class Euclidean:
    """A `Distance` of some of the numbers of recorded columns."""

    numbers: tuple[int, ...]

    def __call__(self, values: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the distance of values [..., C] from a goal [..., C]."""
        return np.asarray(np.linalg.norm((values - goal)[..., list(self.numbers)], axis=-1))


@dataclass(frozen=True)
class Success:
    """What episodes are judged by.

    Attributes:
        columns: of the step table that are recorded, and that `distance` compares with those of the goal.
        thresholds: of `distance`, that are reported beside an evaluation's own, the largest first.
        geometry: shortest paths between recorded columns; None where they are not known.
        named: the columns are the user's choice, `--judge-columns`; goals are cached frames.
    """

    columns: tuple[str, ...]
    distance: Distance
    thresholds: tuple[float, ...] = ()
    geometry: Geometry | None = None
    named: bool = False

    @property
    def by_return(self) -> bool:
        """Whether there is no goal, so that success is a return."""
        return not (self.thresholds or self.named)


def success_of(env: Environment, store: TokenStore, judge_columns: str) -> Success:
    """Return what success is in an environment; raises UserError where `judge_columns`, separated by commas, do not exist."""
    if not judge_columns:
        columns = tuple(of_role(env.spec.columns, "state"))
        return Success(columns, env.distance, env.spec.thresholds, env.geometry)
    known = [
        name for name, column in env.spec.columns.items() if OF_A_FRAME & {*column.roles} and name in store.columns
    ]
    names: list[str] = []
    numbers: list[int] = []
    width = 0
    for text in judge_columns.split(","):
        part = PART.fullmatch(text.strip())
        name = part["name"] if part else text.strip()
        if part is None or name not in known or name in names:
            raise UserError(
                f"--judge-columns: no column {name!r} describes frames of {store.path}; {suggest(name, known)}"
            )
        column = env.spec.columns[name]
        if store.columns[name].shape != column.shape:
            raise UserError(
                f"--judge-columns: {name} has other sizes in {env.spec.id} and {store.path}; choose another --env"
            )
        first, last = int(part["first"] or 0), int(part["last"] or part["first"] or column.width - 1)
        if not first <= last < column.width:
            raise UserError(f"--judge-columns {text.strip()}: the numbers of {name} are 0 to {column.width - 1}")
        names.append(name)
        numbers += range(width + first, width + last + 1)
        width += column.width
    return Success(tuple(names), Euclidean(tuple(numbers)), named=True)
