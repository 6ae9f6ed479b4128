"""Named columns of frame datasets and token stores: one row per frame, each column with its roles."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from wmcache.common.schema import Finite, Size

Role = Literal["action", "proprio", "state", "reward", "terminated", "truncated", "extra"]
DType = Literal["float32", "float64", "int32", "int64", "uint8", "bool"]

MAX_COLUMN_WIDTH = 4096
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
"""A column's name is the name of a folder in a store and of a Parquet column."""
RESERVED = frozenset({"episode", "step", "tokens", "sha256", "scale"})
"""Arrays that every store has."""
SCALARS: tuple[Role, ...] = ("reward", "terminated", "truncated")
"""Roles of at most one column, with one number per frame."""


@dataclass(frozen=True)
class Column:
    """What a column is.

    Attributes:
        roles: what may use it. `action`: taken at that frame. `proprio`: seen by models and policies. `state`: seen by simulators, judges
            and probes only. `reward`, `terminated` and `truncated`: of the env step that starts at that frame.
        dtype: NumPy's name.
        shape: of one frame.
        low, high: bounds of each number of an action; None where they are unknown.
        discrete: the action is the one-hot vector of a Discrete space.
    """

    roles: tuple[Role, ...]
    dtype: DType
    shape: tuple[Size, ...] = ()
    low: tuple[Finite, ...] | None = None
    high: tuple[Finite, ...] | None = None
    discrete: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError where roles, shape or bounds do not fit together."""
        if not self.roles or len(set(self.roles)) < len(self.roles):
            raise ValueError("a column needs roles, each once")
        if not 0 < self.width <= MAX_COLUMN_WIDTH:
            raise ValueError(f"a column has {self.width} numbers per frame, not 1 to {MAX_COLUMN_WIDTH}")
        if any(role in self.roles for role in SCALARS) and self.width > 1:
            raise ValueError(f"{self.roles[0]} has one number per frame, not {self.width}")
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high are given together")
        if self.low is not None and self.high is not None:
            pairs = list(zip(self.low, self.high, strict=False))
            if {len(self.low), len(self.high)} != {self.width} or any(low > high for low, high in pairs):
                raise ValueError(f"low and high are {self.width} ascending pairs of numbers")

    @property
    def width(self) -> int:
        """Numbers per frame."""
        return math.prod(self.shape)


Columns = Mapping[str, Column]
Arrays = Mapping[str, NDArray[Any]]


def default_columns(action_dim: int, state_dim: int) -> dict[str, Column]:
    """Return the columns of a dataset or a store without a description; no state where it has 0 numbers."""
    action = Column(("action",), "float32", (action_dim,), (-1.0,) * action_dim, (1.0,) * action_dim)
    state = {"state": Column(("state", "proprio"), "float64", (state_dim,))} if state_dim else {}
    return {"action": action, **state}


class HasColumns:
    """A card, that is a dataclass, with a field `columns` of the step table: None where they are the default (`default_columns`)."""

    columns: dict[str, Column] | None

    def __post_init__(self) -> None:
        """Raise ValueError for columns that cannot be."""
        if self.columns is not None:
            require_columns(self.columns)

    def to_json(self) -> dict[str, Any]:
        """Return the card as it is in files, which leave default columns out."""
        values = asdict(cast(Any, self))
        del values["columns"]
        return values | described_in_json(self.columns)


def is_default(columns: Columns | None) -> bool:
    """Return whether a description is that of `default_columns`, or is missing, and is left out of files."""
    if columns is None:
        return True
    if set(columns) != {"action", "state"}:
        return False
    return dict(columns) == default_columns(columns["action"].width, columns["state"].width)


def described_in_json(columns: Columns | None) -> dict[str, Any]:
    """Return the entry `columns` of a JSON file: none where the description is the default, or is missing."""
    if columns is None or is_default(columns):
        return {}
    return {"columns": {name: _plain(asdict(column)) for name, column in sorted(columns.items())}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def require_columns(columns: Columns) -> None:
    """Raise ValueError unless these can be the columns of a dataset; videos without actions may have none."""
    require_names(columns)
    for role in SCALARS:
        if len(found := of_role(columns, role)) > 1:
            raise ValueError(f"columns {', '.join(found)} have the role {role}; one may have it")


def require_names(names: Iterable[str]) -> None:
    """Raise ValueError unless these can be the names of columns."""
    known: set[str] = set()
    for name in names:
        if not NAME.fullmatch(name) or name.lower() in RESERVED | known:
            allowed = "letters, digits and _, unlike the others and a store's own arrays"
            raise ValueError(f"column {name[:80]!r} needs another name: {allowed}")
        known.add(name.lower())


def of_role(columns: Columns, role: Role) -> list[str]:
    """Return the names of the columns with a role, in order."""
    return sorted(name for name, column in columns.items() if role in column.roles)


def fits(values: NDArray[Any], column: Column) -> bool:
    """Return whether an array [frames, …] is such a column."""
    return values.dtype == np.dtype(column.dtype) and values.shape[1:] == column.shape


def join_role(arrays: Arrays, columns: Columns, role: Role, dtype: str | None = None) -> NDArray[Any] | None:
    """Concatenate the columns of a role in the order of their names, [frames, numbers]; None where no column has it."""
    names = of_role(columns, role)
    if not names:
        return None
    parts = [np.asarray(arrays[name]) for name in names]
    if len(parts) == 1 and parts[0].ndim == 2 and dtype in (None, parts[0].dtype.name):
        return parts[0]
    joined = np.concatenate([part.reshape(len(part), -1) for part in parts], 1)
    return joined if dtype is None else joined.astype(dtype)


def action_bounds(arrays: Arrays, columns: Columns) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the bounds of actions, float32 [A] each; the smallest and largest values of a column whose bounds are unknown."""
    lows: list[NDArray[Any]] = []
    highs: list[NDArray[Any]] = []
    for name in of_role(columns, "action"):
        column = columns[name]
        values = np.asarray(arrays[name]).reshape(len(arrays[name]), -1)
        lows.append(values.min(0) if column.low is None else np.asarray(column.low))
        highs.append(values.max(0) if column.high is None else np.asarray(column.high))
    return np.concatenate(lows).astype(np.float32), np.concatenate(highs).astype(np.float32)
