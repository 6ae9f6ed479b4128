"""Reading frames out of sharded Zarr arrays at the speed of memory.

A Zarr v3 shard with an uncompressed inner chunk a frame ends in an index of (offset, bytes) pairs, 16 bytes each, and a crc32c of 4;
each chunk ends in a crc32c of its own. `MappedReader` maps the files, reads each index once, and copies frames straight out of the map,
where the zarr API pays for a coroutine and a thread hop with every frame. `ZarrReader` is that API: the way for stores that are
compressed or far away, and the reference that a test holds the mapped reader against.
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
from typing import IO, Any, Protocol

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.layout import CRC_BYTES, FILL, INDEX_ENTRY_BYTES, StoreCard, shard_file
from wmcache.common.cpus import available_cpus
from wmcache.common.errors import UserError, command
from wmcache.common.memory import address_space_left
from wmcache.common.paths import MISSING, NO_MAPS, AnyPath, cause_outside, unreadable

COPY_THREADS = min(4, available_cpus())
BYTES_WORTH_A_THREAD = 4_000_000
ABSENT = np.uint64(2**64 - 1)
"""The offset, in a shard's index, of a chunk that was not written."""

Stored = NDArray[Any]
"""Tokens in the store's dtype, [n, N, D]."""


class Reader(Protocol):
    """Fetches frames as they are stored."""

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """Fill out[i] with frame frames[i]; the numbers are known to be in range."""
        ...

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Hint that these frames will be wanted soon."""
        ...


class _Rows(Protocol):
    """Frames of a shard, by their row in it."""

    def __getitem__(self, row: int, /) -> Any:
        """The frame [N, D]."""
        ...


class _PlainShard:
    """A shard on a file system without memory maps: each frame is read, and compared with its checksum, whenever it is wanted."""

    def __init__(self, descriptor: int, file: AnyPath, card: StoreCard, shard: int, first: int, hint: str) -> None:
        """Use an open file.

        Args:
            descriptor: of the file; closed at the end.
            file: where it is, for errors.
            card: of the store.
            shard: its number.
            first: offset of the first frame.
            hint: what to do about a damaged shard.
        """
        self._descriptor, self._file, self._card, self._first, self._hint = descriptor, file, card, first, hint
        self._base = shard * card.frames_per_shard

    def __del__(self) -> None:
        os.close(self._descriptor)

    def __getitem__(self, row: int) -> Stored:
        """A frame [N, D]; raises UserError where it differs from its checksum or cannot be read."""
        chunk = self.chunk(row)
        if not _is_whole(chunk):
            raise UserError(f"frame {self._base + row} in {self._file} differs from its checksum; {self._hint}")
        return self.frame(chunk)

    def chunk(self, row: int) -> NDArray[np.uint8]:
        """A frame and its checksum, as they are in the file."""
        found = np.empty(self._card.frame_bytes + CRC_BYTES, np.uint8)
        filled, start = 0, self._first + row * len(found)
        while filled < len(found):
            try:
                count = os.preadv(self._descriptor, [found[filled:].data], start + filled)
            except OSError as error:
                raise unreadable(self._file, error) from error
            if not count:
                raise UserError(f"shard {self._file} was cut while it was being read; {self._hint}")
            filled += count
        return found

    def frame(self, chunk: NDArray[np.uint8]) -> Stored:
        """The frame [N, D] in a chunk."""
        return chunk[:-CRC_BYTES].view(np.dtype(self._card.dtype).newbyteorder("<")).reshape(self._card.frame_shape)

    def read_ahead(self, row: int) -> None:
        """Ask the operating system to read a frame while this process does something else."""
        stride = self._card.frame_bytes + CRC_BYTES
        os.posix_fadvise(self._descriptor, self._first + row * stride, stride, os.POSIX_FADV_WILLNEED)


class MappedReader:
    """Gathers frames from memory maps. Each frame's checksum is compared the first time that it is read, by this reader.

    Where the file system refuses maps, each frame is read from the file instead.
    """

    def __init__(self, path: AnyPath, card: StoreCard) -> None:
        """Args: the store's folder and card."""
        self._path, self._card = path, card
        self._stride = card.frame_bytes + CRC_BYTES
        self._maps: dict[int, tuple[mmap.mmap | _PlainShard, int]] = {}
        # Of the file descriptors and the addresses that this process may use, maps take half; the rest is for others.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        addresses = address_space_left()
        room = files if addresses is None else min(files, addresses // card.shard_bytes(0))
        self._max_maps = max(1, room // 2)
        self._checked = np.zeros(card.frames, np.bool_)
        self._plain = False

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `Reader.gather`.

        Raises:
            UserError: a shard is missing or damaged; it names the shard, and the frame where it can.
        """
        order = np.argsort(frames, kind="stable")
        shards, rows = np.divmod(frames[order], self._card.frames_per_shard)
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(order)] if len(order) else [0]
        jobs: list[tuple[_Rows, int, int]] = []
        held = 0
        for start, stop in itertools.pairwise(bounds):
            shard = int(shards[start])
            if held == self._max_maps:  # what waits to be copied keeps its maps alive
                self._copy(jobs, out)
                jobs.clear()
                held = 0
            held += 1
            data, first = self._map(shard)
            if isinstance(data, _PlainShard):
                wanted = zip(rows[start:stop].tolist(), order[start:stop].tolist(), strict=True)
                jobs += [(data, row, i) for row, i in wanted]
                continue
            view = self._view(shard, data, first)
            base = shard * self._card.frames_per_shard
            for i, row in zip(order[start:stop].tolist(), rows[start:stop].tolist(), strict=True):
                if not self._checked[base + row]:
                    self._check(shard, row, data, first)
                jobs.append((view, row, i))
        self._copy(jobs, out)

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Ask the operating system to read the frames that are not in memory yet, while this process does something else."""
        for shard, row in zip(*(part.tolist() for part in np.divmod(frames, self._card.frames_per_shard)), strict=True):
            try:
                data, first = self._map(shard)
            except UserError:
                return  # a hint; the read itself will say what is wrong
            if isinstance(data, _PlainShard):
                data.read_ahead(row)
                continue
            start = first + row * self._stride
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            data.madvise(mmap.MADV_WILLNEED, page, start + self._stride - page)

    def scan(self, shard: int) -> tuple[Stored, list[int]]:
        """All of a shard, and those of its frames that differ from their checksums; raises UserError as `gather` does."""
        data, first = self._map(shard)
        frames = self._card.shard_frames(shard)
        if isinstance(data, _PlainShard):
            chunks = [data.chunk(row) for row in range(len(frames))]
            bad = [frame for frame, chunk in zip(frames, chunks, strict=True) if not _is_whole(chunk)]
            return np.stack([data.frame(chunk) for chunk in chunks]), bad
        bad = [frame for frame in frames if not _is_whole(self._chunk(frame - frames.start, data, first))]
        return self._view(shard, data, first), bad

    def _copy(self, jobs: Sequence[tuple[_Rows, int, int]], out: Stored) -> None:
        parts = min(COPY_THREADS, len(jobs) * self._card.frame_bytes // BYTES_WORTH_A_THREAD)
        if parts <= 1:
            _copy_rows(jobs, out)
            return
        # numpy copies without the interpreter's lock, and one core cannot use all of a memory's bandwidth.
        waiting = [_pool().submit(_copy_rows, jobs[part::parts], out) for part in range(1, parts)]
        _copy_rows(jobs[::parts], out)
        for future in waiting:
            future.result()

    def _view(self, shard: int, data: mmap.mmap, first: int) -> Stored:
        """The shard's frames as one strided array [frames, N, D] over the map."""
        if data.size() != len(data):
            raise UserError(f"shard {self._file(shard)} was cut while it was being read; {self._mend}")
        n, d = self._card.frame_shape
        dtype = np.dtype(self._card.dtype).newbyteorder("<")
        shape, strides = (len(self._card.shard_frames(shard)), n, d), (self._stride, d * dtype.itemsize, dtype.itemsize)
        return np.ndarray(shape, dtype, buffer=data, offset=first, strides=strides)

    def _chunk(self, row: int, data: mmap.mmap, first: int) -> NDArray[np.uint8]:
        """A frame and its checksum."""
        # Through numpy: the checksum's C code takes no memoryview, and a slice of the map itself would be a copy.
        return np.frombuffer(data, np.uint8, self._stride, first + row * self._stride)

    def _check(self, shard: int, row: int, data: mmap.mmap, first: int) -> None:
        frame = shard * self._card.frames_per_shard + row
        if not _is_whole(self._chunk(row, data, first)):
            raise UserError(f"frame {frame} in {self._file(shard)} differs from its checksum; {self._mend}")
        self._checked[frame] = True

    def _map(self, shard: int) -> tuple[mmap.mmap | _PlainShard, int]:
        """The shard's file, mapped where its file system does that, and the offset of its first frame.

        Raises:
            UnreadableError: the system cannot read it.
            UserError: it is missing, or is not a whole shard.
        """
        if (known := self._maps.get(shard)) is not None:
            return known
        if len(self._maps) >= self._max_maps:
            for oldest in list(self._maps)[:1]:  # another thread may be here too
                self._maps.pop(oldest, None)
        file = self._file(shard)
        try:
            with self._open(shard) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != self._card.shard_bytes(shard):
                    raise UserError(
                        f"shard {file} has {size} bytes instead of {self._card.shard_bytes(shard)}; {self._mend}"
                    )
                index = self._card.frames_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES
                stream.seek(size - index)
                first = self._first(stream.read(index), size, shard, file)
                data: mmap.mmap | _PlainShard
                try:
                    data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    if error.errno not in NO_MAPS:
                        raise
                    if not self._plain:
                        tqdm.write(
                            f"{self._path} is on a file system without memory maps ({error.strerror}): frames are read one by one; "
                            "a copy on a local disk is read faster",
                            file=sys.stderr,
                        )
                    self._plain = True
                    data = _PlainShard(os.dup(stream.fileno()), file, self._card, shard, first, self._mend)
        except OSError as error:
            if error.errno in MISSING:
                raise UserError(f"shard {file} does not exist; {self._mend}") from error
            raise unreadable(file, error) from error
        found = data, first
        self._maps[shard] = found
        return found

    def _first(self, index: bytes, size: int, shard: int, file: AnyPath) -> int:
        """The offset of the first frame, once the index says that all others follow at a constant stride.

        Args:
            index: the end of the file, with its checksum.
            size: of the file.
            shard, file: for the errors.
        """
        entries = index[:-CRC_BYTES]
        if google_crc32c.value(entries) != int.from_bytes(index[-CRC_BYTES:], "little"):
            raise UserError(f"the index of shard {file} is damaged; {self._mend}")
        count = len(self._card.shard_frames(shard))
        offset, sizes = np.frombuffer(entries, "<u8").reshape(-1, 2)[:count].T
        if (offset == ABSENT).any():
            frame = shard * self._card.frames_per_shard + int(np.argmax(offset == ABSENT))
            raise UserError(f"shard {file} lacks frame {frame}; {self._mend}")
        first = int(offset[0])
        within = first + count * self._stride <= size
        if not within or (sizes != self._stride).any() or (np.diff(offset.astype(np.int64)) != self._stride).any():
            raise UserError(f"shard {file} is not laid out as this wmcache writes it; {self._mend}")
        return first

    def _file(self, shard: int) -> AnyPath:
        """Where a shard is."""
        return shard_file(self._path, shard)

    def _open(self, shard: int) -> IO[bytes]:
        """A shard's file, to be mapped; raises OSError."""
        return Path(str(self._file(shard))).open("rb")

    @property
    def _mend(self) -> str:
        return f"hint it with: {command('wmcache', 'repair', self._path)}"


class ZarrReader:
    """Gathers frames through the zarr API."""

    def __init__(self, tokens: zarr.Array[Any], card: StoreCard, where: AnyPath) -> None:
        """Args: the array, the store's card and its place."""
        self._tokens, self._where = tokens, where
        self._fill = np.asarray(FILL[card.dtype], card.dtype)

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `Reader.gather`; raises UserError where a chunk is missing or cannot be decoded."""
        hint = f"see: {command('wmcache', 'verify', self._where)}"
        try:
            # Ascending and without repetition, so that no chunk is fetched or decoded twice.
            unique, place = np.unique(frames, return_inverse=True)
            found = np.asarray(self._tokens.oindex[unique]) if len(unique) else np.empty_like(out)
        except Exception as error:
            if outside := cause_outside(error):
                raise unreadable(self._where / "tokens", outside) from error
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{self._where}/tokens cannot be read ({reason}); {hint}") from error
        lost = np.isnan(found) if found.dtype.kind == "f" else found == self._fill
        if lost.any():
            frame = unique[int(np.argmax(lost.any(axis=(1, 2))))]
            raise UserError(f"{self._where}/tokens lacks frame {frame}; {hint}")
        np.take(found, place, axis=0, out=out, mode="clip")

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Nothing: zarr has no such hint."""


class MemoryReader:
    """Gathers frames from an array that holds all of them."""

    def __init__(self, tokens: Stored) -> None:
        """Args: `tokens` [frames, N, D]."""
        self.tokens = tokens

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `Reader.gather`."""
        # `clip` only because the numbers are known to be in range: without it np.take copies through a temporary.
        np.take(self.tokens, frames, axis=0, out=out, mode="clip")

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Nothing: they are here."""


def _is_whole(chunk: NDArray[np.uint8]) -> bool:
    """Whether a frame's bytes equal the checksum that follows them."""
    stored = int.from_bytes(chunk[-CRC_BYTES:].tobytes(), "little")
    return int(google_crc32c.value(chunk[:-CRC_BYTES])) == stored


def _copy_rows(jobs: Iterable[tuple[_Rows, int, int]], out: Stored) -> None:
    for view, row, i in jobs:
        out[i] = view[row]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="gather")


# Threads do not survive a fork: a child that read before its parent forked makes its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
