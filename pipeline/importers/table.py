"""Tables of steps from outside, CSV or Parquet, one row a frame."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wmcache.common.columns import SCALARS, DType, Role, require_names
from wmcache.common.errors import UserError
from wmcache.common.reading import reading
from wmcache.pipeline.importers.conversions import (
    STATE,
    build_steps,
    describe,
    describe_action,
    is_action_missing,
    note,
)
from wmcache.pipeline.steps import Steps

COLUMNS = r"episode|step|file|video|(action|state|proprio)(_\d+)?|reward|terminated|truncated"
NO_INDEX = rf"{COLUMNS}|timestamp"
"""Columns that are never an index."""
PANDAS_INDEX = r"Unnamed: \d+(\.\d+)*|__index_level_\d+__|index|level_\d+"
"""Names that pandas gives to an index without a name."""


@dataclass(frozen=True)
class StepTable:
    """The frames of a table, sorted by episode and step."""

    kind: str
    """`file`, images; or `video`."""
    names: NDArray[Any]
    """[frames], files as the table names them."""
    steps: Steps
    dropped: NDArray[np.bool_]
    """[episodes], whether the last row, without an action, was left out."""


def read_table(path: Path) -> StepTable:
    """Read a CSV or Parquet table; raises UserError, naming the column and the row as the file counts it."""
    rows = _read_rows(path)
    episode, step, order = _in_order(rows, path)
    new = step == 0
    acts = any(re.fullmatch(r"action(_\d+)?", name) for name in rows.column_names)
    action = _matrix(rows, "action", path)[order] if acts else np.zeros((len(rows), 0))
    last = np.append(new[1:], True)
    missing = last & is_action_missing(action) if acts else np.zeros_like(last)
    if len(alone := np.flatnonzero(missing & new)):
        where = f"{path}, {_row(path, int(order[alone[0]]))}"
        raise UserError(
            f"episode {episode[alone[0]]} has one frame and no action: {where}; remove it, and renumber others"
        )
    if missing.any():
        note(
            f"{missing.sum()} of {last.sum()} episodes of {path} end in a row without an action, which is not imported"
        )
    kept = ~missing
    order = order[kept]
    values, described = (
        ({"action": action[kept]}, {"action": describe_action(action[kept], path)}) if acts else ({}, {})
    )
    for name, column, roles, dtype in _other_columns(rows, order, path):
        values[name], described[name] = column, describe(name, column, roles, dtype, path)
    numbers = episode[kept].astype(np.int32), step[kept].astype(np.int32)
    steps = build_steps(*numbers, values, described, path, lambda frame: _row(path, int(order[frame])))
    kind = _kind(rows, path)
    return StepTable(kind, rows[kind].to_numpy(zero_copy_only=False)[order], steps, missing[last])


def _other_columns(
    rows: pa.Table, order: NDArray[np.int64], table: Path
) -> Iterator[tuple[str, NDArray[Any], tuple[Role, ...], DType]]:
    """Yield name, values of the rows in this order, roles and dtype of all columns but episode, step, file and action."""
    has_proprio = any(re.fullmatch(r"proprio(_\d+)?", name) for name in rows.column_names)
    state: tuple[Role, ...] = ("state",) if has_proprio else STATE
    vectors: tuple[tuple[str, tuple[Role, ...]], ...] = (("state", state), ("proprio", ("proprio",)))
    for vector, roles in vectors:
        if any(re.fullmatch(rf"{vector}(_\d+)?", name) for name in rows.column_names):
            yield vector, _matrix(rows, vector, table)[order], roles, "float64"
    for name in rows.column_names:
        if re.fullmatch(COLUMNS, name) and name not in SCALARS:
            continue
        column = rows[name].combine_chunks()
        if len(empty := np.flatnonzero(pc.is_null(column.take(pa.array(order))))):
            where = f"{table}, {_row(table, int(order[empty[0]]))}"
            raise UserError(f"{name} is empty: {where}; fill it in, or remove the row")
        values, dtype = _numbers_of(column, name, table)
        role: Role = next((known for known in SCALARS if known == name), "extra")
        if role in ("terminated", "truncated"):
            if not np.isin(values, (0, 1)).all():
                raise UserError(f"{table}: the column {name} has other values than true and false, or 0 and 1")
            dtype = "bool"
        yield name, values[order], (role,), dtype


def _numbers_of(column: pa.Array, name: str, table: Path) -> tuple[NDArray[Any], DType]:
    """Read a column of numbers, or of lists of as many numbers each, and find the dtype to keep; empty cells are 0."""
    lists = isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray)
    if lists:
        return _lists(column, name, table), "float64"
    kinds: tuple[tuple[Any, DType], ...] = (
        (pa.types.is_boolean, "bool"),
        (pa.types.is_uint8, "uint8"),
        (pa.types.is_int32, "int32"),
        (pa.types.is_integer, "int64"),
        (pa.types.is_float32, "float32"),
        (pa.types.is_floating, "float64"),
    )
    dtype = next((dtype for is_kind, dtype in kinds if is_kind(column.type)), None)
    if dtype is None:
        raise UserError(f"{table}: the column {name} has type {column.type}, not numbers; remove it from a copy")
    zero = pa.scalar(0, pa.int8()).cast(column.type)
    if pa.types.is_uint64(column.type) and (pc.max(column).as_py() or 0) >= 2**63:
        raise UserError(
            f"{table}: the column {name} has {pc.max(column)}, more than int64 keeps; remove it from a copy"
        )
    return pc.fill_null(column, zero).to_numpy(zero_copy_only=False).astype(dtype), dtype


def _read_rows(path: Path) -> pa.Table:
    with reading(path, f"{path} cannot be read", "check the file"):
        if path.suffix.lower() == ".parquet":
            rows = pq.read_table(path)
            named = (rows.schema.pandas_metadata or {}).get("index_columns", [])
        elif path.suffix.lower() == ".csv":
            as_text = pyarrow.csv.ConvertOptions(column_types={"file": pa.string(), "video": pa.string()})
            rows, named = pyarrow.csv.read_csv(path, convert_options=as_text), []
        else:
            raise UserError(f"{path} is neither .csv nor .parquet")
    if not len(rows):
        raise UserError(f"{path} has no rows")
    rows = _without_index(rows, path, named)
    names = rows.column_names
    if len(names) == 1 and (mark := next((mark for mark in ";\t" if mark in names[0]), None)):
        raise UserError(f"{path} is separated by {mark!r}, not by commas; save it with commas")
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path} has several columns {sorted(twice)[0]!r}")
    try:
        require_names(name for name in names if not re.fullmatch(COLUMNS, name))
    except ValueError as error:
        raise UserError(f"{path}: {error}; rename it in a copy") from error
    for name in ("episode", "step", "file", "video"):
        if name in names and rows[name].null_count:
            row = int(pc.index(pc.is_null(rows[name]), True).as_py())
            raise UserError(f"{name} is empty: {path}, {_row(path, row)}; fill it in, or remove the row")
    return rows


def _without_index(rows: pa.Table, path: Path, named: list[Any]) -> pa.Table:
    """Drop columns that are an index: those that pandas marks as one, and those that count the rows."""
    kept: list[int] = []
    ignored: list[int] = []
    first = 0
    for number, name in enumerate(rows.column_names):
        unnamed = not name and number == first
        first += unnamed  # a MultiIndex has several columns
        is_index = unnamed or name in named or re.fullmatch(PANDAS_INDEX, name) or _counts_rows(rows[number])
        (ignored if is_index and not re.fullmatch(NO_INDEX, name) else kept).append(number)
    if ignored:
        listed = ", ".join(rows.column_names[number] or "without a name" for number in ignored)
        note(f"ignored the index column of {path}: {listed}")
    return rows.select(kept)


def _counts_rows(column: pa.ChunkedArray) -> bool:
    """Whether a column is 0, 1, 2, ..."""
    if not pa.types.is_integer(column.type) or column.null_count or len(column) < 2:
        return False
    return bool((column.to_numpy() == np.arange(len(column))).all())


def _row(table: Path, row: int) -> str:
    """Name a row as its file counts it: the line of a CSV file, header included; the row of a Parquet file, from 0."""
    if table.suffix.lower() != ".csv":
        return f"row {row} (counted from 0)"
    with table.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(file)
        filled = (reader.line_num for words in reader if words)  # empty lines are no rows
        line = next(itertools.islice(filled, row + 1, None), None)
    return f"row {row}" if line is None else f"line {line}"


def _kind(rows: pa.Table, table: Path) -> str:
    found = [name for name in ("file", "video") if name in rows.column_names]
    if len(found) != 1:
        raise UserError(f"{table} has {len(found)} of the columns file (images) and video; it needs one of them")
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    kind = rows[found[0]].type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # pandas writes categories as dictionaries
    if not any(is_kind(kind) for is_kind in kinds):
        raise UserError(f"{table}: the column {found[0]} has type {rows[found[0]].type}, not text")
    return found[0]


def _in_order(rows: pa.Table, table: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sort rows: episode, step and row of each frame; raise UserError if they do not count up from 0 without gaps."""
    numbers = {}
    for name in ("episode", "step"):
        if name not in rows.column_names:
            raise UserError(f"{table} has no column {name}; write one that counts up from 0")
        if not pa.types.is_integer(rows[name].type):
            raise UserError(f"{table}: the column {name} has type {rows[name].type}, not integers; convert it")
        numbers[name] = rows[name].to_numpy().astype(np.int64)
    order = np.lexsort((numbers["step"], numbers["episode"]))
    episode, step = numbers["episode"][order], numbers["step"][order]
    new = np.diff(episode, prepend=episode[0] - 1) != 0
    should_be = np.where(new, 0, np.roll(step, 1) + 1)
    if len(wrong := np.flatnonzero((step != should_be) | (episode != np.cumsum(new) - 1))):
        row = wrong[0]
        raise UserError(
            f"{table}: episodes and their steps must count up from 0 without gaps; {_row(table, int(order[row]))} is "
            f"episode {episode[row]}, step {step[row]} instead of episode {np.cumsum(new)[row] - 1}, step {should_be[row]}"
        )
    return episode, step, order


def _matrix(rows: pa.Table, name: str, table: Path) -> NDArray[np.float64]:
    """Read the numbers of `name_0`, `name_1`, ..., or of the lists in `name`, [rows, n]; NaN for empty cells."""
    parts = [column for column in rows.column_names if column.startswith(f"{name}_")]
    if name in rows.column_names and not parts:
        return _lists(rows[name].combine_chunks(), name, table)
    expected = [f"{name}_{number}" for number in range(len(parts))]
    if name in rows.column_names or set(parts) != set(expected) or not parts:
        raise UserError(
            f"{table} needs either a column {name} of lists or {name}_0, {name}_1, ... without gaps; "
            f"it has {', '.join(column for column in rows.column_names if column.startswith(name)) or 'neither'}"
        )
    return np.stack([_numbers(rows[column].combine_chunks(), column, table) for column in expected], 1)


def _lists(lists: pa.Array, name: str, table: Path) -> NDArray[np.float64]:
    if not isinstance(lists, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        raise UserError(f"{table}: the column {name} has type {lists.type}, not lists; call numbers {name}_0, ...")
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return np.empty((len(lists), 0))
    width = int(lengths[filled[0]])
    if len(wrong := filled[lengths[filled] != width]):
        where = f"{table}, {_row(table, int(wrong[0]))}"
        raise UserError(f"the list in {name} has {lengths[wrong[0]]} numbers, not {width} as the first one: {where}")
    matrix = np.full((len(lists), width), np.nan)
    matrix[filled] = _numbers(lists.flatten(), name, table).reshape(-1, width)
    return matrix


def _numbers(values: pa.Array, name: str, table: Path) -> NDArray[np.float64]:
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise UserError(f"{table}: {name} has type {values.type}, not numbers")
    return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
