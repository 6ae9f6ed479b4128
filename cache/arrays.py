"""The arrays of a store: tokens, and columns with a row for each frame or shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.storage import FsspecStore, MemoryStore

from wmcache.cache.identity import FORMAT_VERSION, Identity
from wmcache.cache.layout import (
    FILL,
    FORMAT,
    SHARD_COLUMNS,
    StoreCard,
    damaged,
    recorded_versions,
    write_attributes,
)
from wmcache.common.columns import MAX_COLUMN_WIDTH
from wmcache.common.files import sha256_of
from wmcache.common.paths import AnyPath, is_local, read_bytes

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "tokens": ("frame", "token", "channel"),
    "sha256": ("shard", "byte"),
    "scale": ("shard", "scale_and_middle", "channel"),
}
"""Names of the dimensions of arrays that are no columns of the step table; stores made before 2026-10 have none."""
ROWS_IN_A_CHUNK = 2**20
SMALL = 2**22
"""Columns of up to this many rows are read on open, so that corruption is reported before any work starts; longer ones on first use."""


def create_arrays(path: Path, card: StoreCard, identity: Identity, steps: Mapping[str, NDArray[Any]]) -> None:
    """Write a store without tokens: the group, the arrays' metadata and the step table."""
    group = zarr.create_group(path, zarr_format=3)
    _create_tokens(group, card)
    columns = {name: _create_column(group, name, steps[name]) for name in card.step_columns}
    (path / "tokens" / "commits").mkdir()
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "identity": identity.to_json(),
        "card": card.to_json(),
        "columns": columns,
        "layout": sha256_of(path / "tokens" / "zarr.json"),
        "versions": recorded_versions(),
    }
    write_attributes(path, attributes)


def _create_tokens(group: zarr.Group, card: StoreCard) -> zarr.Array[Any]:
    return group.create_array(
        "tokens",
        shape=(card.frames, *card.frame_shape),
        chunks=(1, *card.frame_shape),
        shards=(card.frames_per_shard, *card.frame_shape),
        dtype=card.dtype,
        compressors=Crc32cCodec(),
        # One file for each shard, without two levels of folders.
        chunk_key_encoding={"name": "default", "separator": "."},
        fill_value=FILL[card.dtype],
        config={"write_empty_chunks": True},
        dimension_names=DIMENSIONS["tokens"],
        attributes={"coordinates": "episode step"},  # CF conventions, for xarray
    )


def open_tokens(group: zarr.Group, card: StoreCard, attributes: Mapping[str, Any], path: AnyPath) -> zarr.Array[Any]:
    """Return the array of tokens; raise DamagedError where its metadata changed or does not fit the card."""
    file = path / "tokens" / "zarr.json"
    try:
        # Compared by its bytes: another codec could read other numbers from the same shards.
        digest = hashlib.sha256(read_bytes(file)).hexdigest()
        _require(digest == attributes.get("layout"), "it differs from its checksum")
        tokens, fill = _array(group, "tokens"), np.asarray(FILL[card.dtype], card.dtype)
        fits = tokens.shape == (card.frames, *card.frame_shape) and tokens.dtype == card.dtype
        _require(fits, "another shape or dtype")
        _require(np.array_equal(tokens.fill_value, fill, equal_nan=card.dtype == "float16"), "another fill value")
    except Exception as error:
        raise damaged(f"{file} does not fit the store", file, error) from error
    return tokens


def is_mappable(tokens: zarr.Array[Any], card: StoreCard) -> bool:
    """Return whether frames are in the files as they are in memory, as `create_arrays` lays them out."""
    expected = _create_tokens(zarr.create_group(MemoryStore(), zarr_format=3), card).metadata
    parts = ("codecs", "chunk_grid", "chunk_key_encoding")
    return all(getattr(tokens.metadata, part, None) == getattr(expected, part) for part in parts)


def dimension_names(name: str, dimensions: int) -> tuple[str, ...]:
    """Return the names of an array's dimensions, for xarray."""
    if name in DIMENSIONS:
        return DIMENSIONS[name]
    own = [f"{name}_dim"] if dimensions == 2 else [f"{name}_dim_{number}" for number in range(dimensions - 1)]
    return ("frame", *own)


def _create_column(group: zarr.Group, name: str, values: NDArray[Any]) -> str:
    """Write a column, replacing an existing one; return its checksum."""
    column = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(min(len(values), ROWS_IN_A_CHUNK), *values.shape[1:]),
        config={"write_empty_chunks": True},  # by default, zeros would look like a lost chunk
        dimension_names=dimension_names(name, values.ndim),
        overwrite=True,
    )
    for start in range(0, len(values), ROWS_IN_A_CHUNK):
        column[start : start + ROWS_IN_A_CHUNK] = values[start : start + ROWS_IN_A_CHUNK]
    return column_sha256(values)


def write_column(path: AnyPath, name: str, values: NDArray[Any]) -> str:
    """Write a column of a store unless it is there already; return its checksum."""
    group = zarr.open_group(_zarr_store(path), mode="r+", use_consolidated=False)
    try:
        column, sha256 = _array(group, name), column_sha256(values)
        # Without locks, another process may have written it and finished the store.
        names = dimension_names(name, values.ndim)
        if column.metadata.dimension_names == names and column_sha256(column) == sha256:  # type: ignore[union-attr]
            return sha256
    except Exception:  # noqa: BLE001 (whatever zarr raises about a missing or damaged array)
        pass
    return _create_column(group, name, values)


def read_column(
    group: zarr.Group, card: StoreCard, name: str, columns: Mapping[str, Any], path: AnyPath
) -> NDArray[Any]:
    """Return a column; raise DamagedError where it is missing, or differs from its checksum in `columns`."""
    with _damaged_column(path, name):
        values = np.asarray(_column(group, card, name))
        _require(column_sha256(values) == columns.get(name), "it differs from its checksum")
    return values


def check_columns(
    group: zarr.Group, card: StoreCard, columns: Mapping[str, Any], path: AnyPath, *, thorough: bool = False
) -> None:
    """Raise DamagedError unless all columns are there; compare the small ones with their checksums, or with `thorough` all."""
    for name in columns:
        with _damaged_column(path, name):
            rows = _column(group, card, name).shape[0]
        if thorough or rows <= SMALL:
            read_column(group, card, name, columns, path)


def column_sha256(values: NDArray[Any] | zarr.Array[Any]) -> str:
    """Return a checksum of dtype, shape and values."""
    digest = hashlib.sha256(f"{values.dtype.str}{values.shape}".encode())
    for start in range(0, values.shape[0], ROWS_IN_A_CHUNK):
        digest.update(np.ascontiguousarray(values[start : start + ROWS_IN_A_CHUNK]).tobytes())
    return digest.hexdigest()


def _column(group: zarr.Group, card: StoreCard, name: str) -> zarr.Array[Any]:
    array = _array(group, name)
    rows = card.num_shards if name in SHARD_COLUMNS else card.frames
    width = array.size // max(1, array.shape[0])
    # Before anything is allocated: the metadata may be wrong.
    _require(array.shape[0] == rows, f"it has {array.shape[0]} rows for {rows}")
    _require(width <= MAX_COLUMN_WIDTH or name == "scale", f"it has {width} values in a row")
    if described := (card.columns or {}).get(name):
        fits = array.dtype == np.dtype(described.dtype) and array.shape[1:] == described.shape
        _require(fits, f"it is {array.dtype} {array.shape}, and not as the card describes it")
    _require(array.nchunks == array.nchunks_initialized, "a chunk is missing")  # zarr would read zeros
    return array


@contextmanager
def _damaged_column(path: AnyPath, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever zarr raises
        raise damaged(f"{path / name} is damaged", path / name, error) from error


def open_group(path: AnyPath) -> zarr.Group:
    """Return the group at `path`; raise DamagedError where zarr cannot open it."""
    try:
        return zarr.open_group(_zarr_store(path), mode="r", use_consolidated=False)
    except Exception as error:  # whatever zarr raises about metadata
        raise damaged(f"{path / 'zarr.json'} cannot be read", path, error) from error


def _zarr_store(path: AnyPath) -> Any:
    return path if is_local(path) else FsspecStore.from_url(str(path), storage_options=dict(path.storage_options))


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    member = group[name]
    if not isinstance(member, zarr.Array):
        raise TypeError("it is not an array")
    return member


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
