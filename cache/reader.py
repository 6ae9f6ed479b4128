"""Reading frames from sharded Zarr arrays at the speed of memory.

In a Zarr v3 shard each uncompressed inner chunk, one frame, ends in a crc32c of 4 bytes. The file ends in an index of (offset, bytes)
pairs, 16 bytes each, with a crc32c of its own. The zarr API, which runs a coroutine for every frame, reads compressed and remote stores.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import resource
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeAlias

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.layout import CRC_BYTES, FILL, INDEX_ENTRY_BYTES, StoreCard, shard_file
from wmcache.common.cpus import available_cpus
from wmcache.common.errors import UserError, command, reason
from wmcache.common.memory import address_space_left
from wmcache.common.paths import MISSING, NO_MAPS, AnyPath, cause_outside, readable, unreadable

COPY_THREADS = min(4, available_cpus())
BYTES_WORTH_A_THREAD = 4_000_000
ABSENT = np.uint64(2**64 - 1)
"""The offset, in a shard's index, of a chunk that was not written."""

Stored = NDArray[Any]
"""Tokens in the store's dtype, [n, N, D]."""
_Job: TypeAlias = "tuple[Stored | _Shard, int, int]"
"""Frames of a shard, the row to copy, and where in the output."""


class Reader:
    """Reads frames as they are stored."""

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """Fill out[i] with frame frames[i]; all numbers are in range."""
        raise NotImplementedError

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Start to read frames that will be gathered soon, if the reader can."""


class _Shard:
    """An open shard, mapped where the file system has maps; elsewhere each frame is read and checked on every access."""

    def __init__(self, stream: IO[bytes], card: StoreCard, shard: int, file: AnyPath, first: int, hint: str) -> None:
        """Take a file whose first frame is at offset `first`; `hint` is for the error of a damaged one."""
        self.frames, self.is_mapped = card.shard_frames(shard), True
        self._shape, self._dtype = card.frame_shape, np.dtype(card.dtype).newbyteorder("<")
        self._stride, self._file, self._first, self._hint = card.frame_bytes + CRC_BYTES, file, first, hint
        self._descriptor = -1
        try:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno not in NO_MAPS:
                raise
            self.is_mapped, self._descriptor = False, os.dup(stream.fileno())

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def rows(self) -> Stored | _Shard:
        """Return the frames [N, D], by row."""
        if not self.is_mapped:
            return self
        if self._map.size() != len(self._map):
            raise self._cut()
        n, d = self._shape
        shape, strides = (len(self.frames), n, d), (self._stride, d * self._dtype.itemsize, self._dtype.itemsize)
        return np.ndarray(shape, self._dtype, buffer=self._map, offset=self._first, strides=strides)

    def __getitem__(self, row: int) -> Stored:
        """Read a frame that is not mapped; raise UserError where it differs from its checksum."""
        self.check(row, chunk := self.chunk(row))
        return self.frame(chunk)

    def check(self, row: int, chunk: NDArray[np.uint8]) -> None:
        """Raise UserError where a frame differs from its checksum."""
        if not _is_whole(chunk):
            raise UserError(f"frame {self.frames[row]} in {self._file} differs from its checksum; {self._hint}")

    def frame(self, chunk: NDArray[np.uint8]) -> Stored:
        """Return the frame [N, D] of a chunk."""
        return chunk[:-CRC_BYTES].view(self._dtype).reshape(self._shape)

    def chunk(self, row: int) -> NDArray[np.uint8]:
        """Return a frame's bytes with their checksum."""
        start = self._first + row * self._stride
        if self.is_mapped:
            # Through numpy: the checksum's C code takes no memoryview, and a slice of the map itself would be a copy.
            return np.frombuffer(self._map, np.uint8, self._stride, start)
        found, filled = np.empty(self._stride, np.uint8), 0
        while filled < len(found):
            with readable(self._file):
                count = os.preadv(self._descriptor, [found[filled:].data], start + filled)
            if not count:
                raise self._cut()
            filled += count
        return found

    def read_ahead(self, row: int) -> None:
        """Ask the operating system to read a frame in the background."""
        start = self._first + row * self._stride
        if self.is_mapped:
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + self._stride - page)
        else:
            os.posix_fadvise(self._descriptor, start, self._stride, os.POSIX_FADV_WILLNEED)

    def _cut(self) -> UserError:
        return UserError(f"shard {self._file} was cut while it was being read; {self._hint}")


class MappedReader(Reader):
    """Gathers frames from memory maps, or files without. A frame is compared with its checksum the first time that it is read."""

    def __init__(self, path: AnyPath, card: StoreCard) -> None:
        """Open nothing yet."""
        self._path, self._card = path, card
        self._hint = f"repair it with: {command('wmcache', 'repair', path)}"
        self._shards: dict[int, _Shard] = {}
        # Maps take at most half of the file descriptors and addresses that this process may use.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        addresses = address_space_left()
        room = files if addresses is None else min(files, addresses // card.shard_bytes(0))
        self._max_shards = max(1, room // 2)
        self._checked = np.zeros(card.frames, np.bool_)
        self._warned = False

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `Reader.gather`; raise UserError with the shard, and if possible the frame, that is missing or damaged."""
        order = np.argsort(frames, kind="stable")
        shards, rows = np.divmod(frames[order], self._card.frames_per_shard)
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(order)] if len(order) else [0]
        jobs: list[_Job] = []
        for number, (start, stop) in enumerate(itertools.pairwise(bounds), 1):
            shard = self._shard(int(shards[start]))
            view, base = shard.rows(), shard.frames.start
            for i, row in zip(order[start:stop].tolist(), rows[start:stop].tolist(), strict=True):
                if shard.is_mapped and not self._checked[base + row]:
                    shard.check(row, shard.chunk(row))
                    self._checked[base + row] = True
                jobs.append((view, row, i))
            if number % self._max_shards == 0:  # jobs keep their maps open
                self._copy(jobs, out)
                jobs.clear()
        self._copy(jobs, out)

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Ask the operating system to read the frames in the background."""
        for shard, row in zip(*(part.tolist() for part in np.divmod(frames, self._card.frames_per_shard)), strict=True):
            try:
                self._shard(shard).read_ahead(row)
            except UserError:
                return  # the read itself will raise it

    def scan(self, shard: int) -> tuple[Stored, list[int]]:
        """Return all tokens of a shard, and the frames that differ from their checksums; raise UserError as `gather` does."""
        found = self._shard(shard)
        chunks = [found.chunk(row) for row in range(len(found.frames))]
        bad = [frame for frame, chunk in zip(found.frames, chunks, strict=True) if not _is_whole(chunk)]
        return np.stack([found.frame(chunk) for chunk in chunks]), bad

    def _copy(self, jobs: Sequence[_Job], out: Stored) -> None:
        parts = min(COPY_THREADS, len(jobs) * self._card.frame_bytes // BYTES_WORTH_A_THREAD)
        if parts <= 1:
            _copy_rows(jobs, out)
            return
        # numpy copies without the GIL, and one core cannot use all of the memory's bandwidth.
        waiting = [_pool().submit(_copy_rows, jobs[part::parts], out) for part in range(1, parts)]
        _copy_rows(jobs[::parts], out)
        for future in waiting:
            future.result()

    def _shard(self, shard: int) -> _Shard:
        if (known := self._shards.get(shard)) is not None:
            return known
        if len(self._shards) >= self._max_shards:
            for oldest in list(self._shards)[:1]:  # another thread may delete it too
                self._shards.pop(oldest, None)
        file = self._file(shard)
        try:
            with self._open(shard) as stream:
                first = self._first_offset(stream, shard, file)
                found = _Shard(stream, self._card, shard, file, first, self._hint)
        except OSError as error:
            if error.errno in MISSING:
                raise UserError(f"shard {file} does not exist; {self._hint}") from error
            raise unreadable(file, error) from error
        if not (found.is_mapped or self._warned):
            self._warned = True
            tqdm.write(
                f"no memory maps, frames are read one by one; copy it to a local disk: {self._path}", file=sys.stderr
            )
        self._shards[shard] = found
        return found

    def _first_offset(self, stream: IO[bytes], shard: int, file: AnyPath) -> int:
        # Of a sound index, which has all other frames after it at a constant stride.
        size, stride = os.fstat(stream.fileno()).st_size, self._card.frame_bytes + CRC_BYTES
        damaged = UserError(f"the size or the index of shard {file} is damaged; {self._hint}")
        if size != self._card.shard_bytes(shard):
            raise damaged
        stream.seek(size - self._card.frames_per_shard * INDEX_ENTRY_BYTES - CRC_BYTES)
        index = np.frombuffer(stream.read(), np.uint8)
        if not _is_whole(index):
            raise damaged
        frames = self._card.shard_frames(shard)
        offset, sizes = index[:-CRC_BYTES].view("<u8").reshape(-1, 2)[: len(frames)].T
        if (offset == ABSENT).any():
            raise UserError(f"shard {file} lacks frame {frames[int(np.argmax(offset == ABSENT))]}; {self._hint}")
        first = int(offset[0])
        within = first + len(frames) * stride <= size
        if not within or (sizes != stride).any() or (np.diff(offset.astype(np.int64)) != stride).any():
            raise damaged
        return first

    def _file(self, shard: int) -> Path:
        return Path(str(shard_file(self._path, shard)))

    def _open(self, shard: int) -> IO[bytes]:
        return self._file(shard).open("rb")


class ZarrReader(Reader):
    """Gathers frames through the zarr API."""

    def __init__(self, tokens: zarr.Array[Any], card: StoreCard, where: AnyPath) -> None:
        """Read the array of the store at `where`."""
        self._tokens, self._where = tokens, where
        self._fill = np.asarray(FILL[card.dtype], card.dtype)

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `Reader.gather`; raise UserError where a chunk is missing or cannot be decoded."""
        hint = f"see: {command('wmcache', 'verify', self._where)}"
        try:
            # Unique, so that no chunk is fetched or decoded twice.
            unique, indices = np.unique(frames, return_inverse=True)
            found = np.asarray(self._tokens.oindex[unique]) if len(unique) else np.empty_like(out)
        except Exception as error:
            if outside := cause_outside(error):
                raise unreadable(self._where / "tokens", outside) from error
            raise UserError(f"{self._where}/tokens cannot be read ({reason(error)}); {hint}") from error
        lost = np.isnan(found) if found.dtype.kind == "f" else found == self._fill
        if lost.any():
            frame = unique[int(np.argmax(lost.any(axis=(1, 2))))]
            raise UserError(f"{self._where}/tokens lacks frame {frame}; {hint}")
        np.take(found, indices, axis=0, out=out, mode="clip")


class MemoryReader(Reader):
    """Gathers frames from an array in memory."""

    def __init__(self, tokens: Stored) -> None:
        """Take `tokens` [frames, N, D]."""
        self.tokens = tokens

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `Reader.gather`."""
        # The default mode, `raise`, copies through a temporary array.
        np.take(self.tokens, frames, axis=0, out=out, mode="clip")


def _is_whole(chunk: NDArray[np.uint8]) -> bool:
    """Return whether the bytes of a frame or an index match the checksum after them."""
    stored = int.from_bytes(chunk[-CRC_BYTES:].tobytes(), "little")
    return int(google_crc32c.value(chunk[:-CRC_BYTES])) == stored


def _copy_rows(jobs: Iterable[_Job], out: Stored) -> None:
    for view, row, i in jobs:
        out[i] = view[row]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="gather")


# Threads do not survive a fork: the child creates its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
