"""What success is: a distance to the goal, the environment's own or one on named columns, or the return."""

from __future__ import annotations

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
    names = tuple(dict.fromkeys(name.strip() for name in judge_columns.split(",")))
    for name in names:
        if name not in known:
            raise UserError(
                f"--judge-columns: no column {name!r} describes frames of {store.path}; {suggest(name, known)}"
            )
        if store.columns[name].shape != env.spec.columns[name].shape:
            raise UserError(
                f"--judge-columns: {name} has other sizes in {env.spec.id} and {store.path}; choose another --env"
            )
    return Success(names, euclidean, named=True)


def euclidean(values: NDArray[np.float64], goal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the distance of values [..., C] from a goal [..., C]."""
    return np.asarray(np.linalg.norm(values - goal, axis=-1))
