"""The arrays of an HDF5 or npz file: columns in memory, images read row by row."""

from __future__ import annotations

import contextlib
import itertools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.common.reading import reading

if TYPE_CHECKING:
    import h5py

AGAIN = "get the file again"
ROWS = 64
"""Images that are read from HDF5 at a time."""


@dataclass(frozen=True)
class Array:
    """An array of a file that is not read yet.

    Attributes:
        read: reads it whole.
        rows: (start, stop) -> these rows, one by one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]
    rows: Callable[[int, int], Iterator[NDArray[Any]]]

    @property
    def is_image(self) -> bool:
        """Whether each row is an image of 8 bits, grey or in colour."""
        row = self.shape[1:]
        return self.dtype == np.uint8 and len(row) == 3 and (row[2] in (1, 3) or row[0] in (1, 3)) and min(row[:2]) > 0

    def __str__(self) -> str:
        """Return shape and type of a row, for errors."""
        return f"{'x'.join(map(str, self.shape[1:])) or 'one'} {self.dtype}"


def open_arrays(path: Path) -> dict[str, Array]:
    """List the arrays of a .npz, .hdf5 or .h5 file by name, `group/name` inside groups; raises UserError, naming the file."""
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".hdf5", ".h5"):
        raise UserError(f"{path} is neither .npz nor .hdf5 nor .h5")
    with reading(path, f"{path} cannot be opened", AGAIN):
        return _npz_arrays(path) if suffix == ".npz" else _hdf5_arrays(path)


def choose_image(arrays: dict[str, Array], key: str | None, preferred: str, where: Path | str) -> str:
    """Return the array of images to import: the given one, the preferred one or the only one."""
    images = [name for name, array in arrays.items() if array.is_image]
    if key is None:
        key = preferred if preferred in images else images[0] if len(images) == 1 else None
    if key not in images:
        found = ", ".join(f"{name} is {array}" for name, array in arrays.items())
        wrong = f"{len(images)} arrays are images" if key is None else f"{key} is no image"
        raise UserError(
            f"{where}: {wrong}; pass --image-key, one of {', '.join(images) or 'none'} ({found[:600]}; an image is uint8 with 1 or 3 "
            "channels; a file of states alone has no frames to import)"
        )
    return key


def _hdf5_arrays(path: Path) -> dict[str, Array]:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"h5py is not installed ({error}); pip install 'wmcache[hdf5]'") from error
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401 (registers compression filters)
    file = h5py.File(path, "r")
    found: dict[str, Array] = {}

    def add(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.shape:
            # Such arrays are in other files, which may be any of this machine.
            if item.external or item.is_virtual:
                raise UserError(f"{path}: {name} is stored in other files; copy it into one with h5repack")
            found[name] = _hdf5_array(path, name, item)

    file.visititems(add)  # follows no link to other files
    return found


def _hdf5_array(path: Path, name: str, item: h5py.Dataset) -> Array:
    fault, hint = (
        f"{name} of {path} cannot be read",
        "get the file again, or pip install hdf5plugin if it is compressed",
    )

    def read(start: int = 0, stop: int | None = None) -> NDArray[Any]:
        with reading(path, fault, hint):
            return np.asarray(item[start:stop])

    def rows(start: int, stop: int) -> Iterator[NDArray[Any]]:
        for at in range(start, stop, ROWS):
            yield from read(at, min(at + ROWS, stop))

    return Array(item.shape, item.dtype, read, rows)


def _npz_arrays(path: Path) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    arrays = {name: _npz_array(path, name) for name in names}
    return {name: array for name, array in arrays.items() if array.shape}


def _npz_array(path: Path, name: str) -> Array:
    with _open_member(path, name) as file:
        shape, by_column, dtype = _read_header(file)
    stream = _Rows(path, name)

    def read() -> NDArray[Any]:
        with reading(path, f"{name} of {path} cannot be read", AGAIN), np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])

    def rows(start: int, stop: int) -> Iterator[NDArray[Any]]:
        if by_column and len(shape) > 1:
            raise UserError(f"{name} of {path} is stored column by column; save it again with np.ascontiguousarray")
        return stream.rows(start, stop)

    return Array(shape, dtype, read, rows)


def _open_member(path: Path, name: str) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        return archive.open(f"{name}.npy")  # keeps the archive open


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[np.lib.format.read_magic(file)](file)


class _Rows:
    """Reads the rows of an array in a compressed archive in order: reading on costs one row, going back starts again."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name, self._next = path, name, 0
        self._stream: Iterator[NDArray[Any]] | None = None

    def rows(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        if self._stream is None or start < self._next:
            self._next, self._stream = 0, self._read()
        while self._next < stop:
            with reading(self._path, f"{self._name} of {self._path} cannot be read", AGAIN):
                row = next(self._stream)
            self._next += 1
            if self._next > start:
                yield row

    def _read(self) -> Iterator[NDArray[Any]]:
        with _open_member(self._path, self._name) as file:
            shape, _, dtype = _read_header(file)
            size = dtype.itemsize * int(np.prod(shape[1:]))
            for _ in itertools.repeat(None, shape[0]):
                if len(data := file.read(size)) < size:
                    raise ValueError("it ends early")
                yield np.frombuffer(data, dtype).reshape(shape[1:])
