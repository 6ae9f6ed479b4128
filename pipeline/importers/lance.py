"""A Lance table of stable-worldmodel as arrays (data/formats/lance.py).

episode_idx, step_idx   int32: rows of an episode are one after another
pixels                  binary: a JPEG file per row
action, …               fixed-size lists of float32: any named columns, also of single numbers
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from wmcache.common.errors import UserError
from wmcache.common.reading import reading
from wmcache.pipeline.importers.arrays import AGAIN, ROWS, Array
from wmcache.pipeline.importers.conversions import ROLES
from wmcache.pipeline.importers.images import identify

if TYPE_CHECKING:
    import lance

INDEX = ("episode_idx", "step_idx")


def open_lance(path: Path) -> dict[str, Array]:
    """List the columns of a table's folder by name, with `ep_len` and `ep_offset` [episodes]; raises UserError, naming the folder."""
    try:
        import lance
    except ImportError as error:
        raise UserError(f"pylance is not installed ({error}); pip install 'wmcache[lance]'") from error
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name the folder of a table, NAME.lance")
    with reading(path, f"{path} cannot be opened", AGAIN):
        table = lance.dataset(str(path))
        files = [file for fragment in table.get_fragments() for file in fragment.data_files()]
        # Such files may be any of this machine.
        if outside := [file.path for file in files if file.base_id is not None or "/" in file.path]:
            raise UserError(f"{path} refers to {outside[0]} in another folder; write it again as one table")
    if missing := [name for name in INDEX if name not in table.schema.names]:
        raise UserError(f"{path} has no column {missing[0]}; it is no dataset of stable-worldmodel")
    if not table.count_rows():
        raise UserError(f"{path} has no rows; collect it again")
    columns = {name: _column(path, table, name) for name in table.schema.names}
    index = [columns.pop(name) for name in INDEX]
    for name, array in zip(INDEX, index, strict=True):
        if array.shape[1:] or array.dtype.kind not in "iu":
            raise UserError(f"{path}: {name} is {array}, not one integer; it is no dataset of stable-worldmodel")
    episode, step = (array.read() for array in index)
    lengths, offsets = _episodes(episode, step, path)
    return columns | {"ep_len": _constant(lengths), "ep_offset": _constant(offsets)}


def _episodes(episode: NDArray[Any], step: NDArray[Any], path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of each episode and its first row; raises UserError where rows are not in order."""
    offsets = np.flatnonzero(np.append(True, episode[1:] != episode[:-1]))
    lengths = np.diff(offsets, append=len(episode))
    disordered = np.flatnonzero(step != np.arange(len(step)) - np.repeat(offsets, lengths))
    again = np.delete(offsets, np.unique(episode[offsets], return_index=True)[1])
    if len(wrong := np.union1d(disordered, again)):
        row = wrong[0]
        raise UserError(
            f"{path}: the rows of an episode are not one after another (row {row} is episode {episode[row]}, step {step[row]}); "
            "write the table again with stable-worldmodel"
        )
    return lengths, offsets


def _constant(values: NDArray[Any]) -> Array:
    return Array(values.shape, values.dtype, lambda: values, lambda start, stop: iter(values[start:stop]))


def _column(path: Path, table: lance.LanceDataset, name: str) -> Array:
    kind, rows = table.schema.field(name).type, table.count_rows()
    if (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and _holds_jpeg(path, table, name):
        return _images(path, table, name, rows)
    of_vectors = pa.types.is_fixed_size_list(kind)
    number = kind.value_type if of_vectors else kind
    if not (pa.types.is_integer(number) or pa.types.is_floating(number) or pa.types.is_boolean(number)):
        # Such a column is refused by its type, unless it is left out.
        return _constant(np.full(rows, None))
    dtype = np.dtype(number.to_pandas_dtype())
    shape: tuple[int, ...] = (rows, kind.list_size) if of_vectors else (rows,)
    if name in ROLES and shape[1:] == (1,):
        shape = (rows,)

    def read(start: int = 0, stop: int = rows) -> NDArray[Any]:
        with reading(path, f"{name} of {path} cannot be read", AGAIN):
            column = table.to_table(columns=[name], offset=start, limit=stop - start)[name].combine_chunks()
            if column.null_count:
                hint = "" if name in INDEX else f", or leave it out with --drop {name}"
                raise UserError(f"{path}: {name} has rows without a value; write them{hint}")
            values = column.flatten() if of_vectors else column
            return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(stop - start, *shape[1:])

    return Array(shape, dtype, read, lambda start, stop: iter(read(start, stop)))


def _files(path: Path, table: lance.LanceDataset, name: str, rows: range) -> list[bytes | None]:
    with reading(path, f"{name} of {path} cannot be read", AGAIN):
        return list(table.take(list(rows), columns=[name])[name].to_pylist())


def _holds_jpeg(path: Path, table: lance.LanceDataset, name: str) -> bool:
    return (_files(path, table, name, range(1))[0] or b"").startswith(b"\xff\xd8")


def _images(path: Path, table: lance.LanceDataset, name: str, count: int) -> Array:
    """Return a column of images in colour, which all have the size of the first one."""

    def decode(start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        for at in range(start, stop, ROWS):
            wanted = range(at, min(at + ROWS, stop))
            for row, file in zip(wanted, _files(path, table, name, wanted), strict=True):
                where = f"{name} of {path}, row {row}"
                with reading(path, f"{where} cannot be decoded", AGAIN):
                    yield np.asarray(identify(file or b"", ["JPEG"], where).convert("RGB"))

    def rows(start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        for row, image in enumerate(decode(start, stop), start):
            if image.shape != first:
                raise UserError(
                    f"{name} of {path}, row {row} has {image.shape[1]} x {image.shape[0]} pixels, row 0 {first[1]} x {first[0]}; "
                    "write images of one size"
                )
            yield image

    first = next(decode(0, 1)).shape
    return Array((count, *first), np.dtype(np.uint8), lambda: np.stack([*rows(0, count)]), rows)
