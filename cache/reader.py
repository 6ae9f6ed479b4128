"""Reading frames out of sharded Zarr arrays at the speed of memory.

A Zarr v3 shard with an uncompressed inner chunk a frame ends in an index of (offset, bytes) pairs, 16 bytes each, and a crc32c of 4.
The reader maps the file, reads that index once, and copies frames straight out of the map, where the zarr API pays for a coroutine
and a thread hop with every frame. `zarr.open_group(store)["tokens"]` remains the reference, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from wmcache.cache.errors import UserError

_MISSING = np.uint64(2**64 - 1)
_CRC_BYTES = 4

Tokens = NDArray[np.float16]


class ShardedReader:
    """Gathers frames from the shards of one array; each shard is mapped when it is first needed."""

    def __init__(
        self, shard_file: Callable[[int], Path], *, frames: int, frames_per_shard: int, frame_shape: tuple[int, int]
    ) -> None:
        """Args: `shard_file` tells where a shard lies; the rest is the array's shape (N, D of `frame_shape`)."""
        self._shard_file = shard_file
        self._frames, self._frames_per_shard, self._frame_shape = frames, frames_per_shard, frame_shape
        self._shards: dict[int, Tokens] = {}

    def gather(self, frames: NDArray[np.integer], out: Tokens | None = None) -> Tokens:
        """See `TokenStore.gather`."""
        frames = np.asarray(frames, dtype=np.int64)
        if frames.ndim != 1:
            raise IndexError(f"frames must be a vector, not of shape {frames.shape}")
        if len(frames) and not (frames.min() >= 0 and frames.max() < self._frames):
            raise IndexError(f"frames must lie in [0, {self._frames}), not in [{frames.min()}, {frames.max()}]")
        if out is None:
            out = np.empty((len(frames), *self._frame_shape), np.float16)
        shards, rows = np.divmod(frames, self._frames_per_shard)
        for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            # A plain copy for each frame: np.take would copy through a temporary, and fancy indexing walks the strides.
            out[i] = self._shard(shard)[row]
        return out

    def _shard(self, shard: int) -> Tokens:
        view = self._shards.get(shard)
        if view is None:
            view = self._shards[shard] = self._map(shard)
        return view

    def _map(self, shard: int) -> Tokens:
        """The shard's frames as one strided view [frames, N, D] into the mapped file."""
        file = self._shard_file(shard)
        mend = "extract the store again"
        try:
            data = np.memmap(file, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"shard {file} cannot be read ({error}); {mend}") from error
        index_bytes = 16 * self._frames_per_shard
        frame_bytes = 2 * self._frame_shape[0] * self._frame_shape[1]
        if len(data) < index_bytes + _CRC_BYTES:
            raise UserError(f"shard {file} is cut short; {mend}")
        tail = np.asarray(data[-index_bytes - _CRC_BYTES :])
        if google_crc32c.value(tail[:-_CRC_BYTES].tobytes()) != int(tail[-_CRC_BYTES:].view("<u4")[0]):
            raise UserError(f"the index of shard {file} is damaged; {mend}")
        count = min(self._frames_per_shard, self._frames - shard * self._frames_per_shard)
        offset, size = tail[:-_CRC_BYTES].view("<u8").reshape(-1, 2)[:count].T
        if (offset == _MISSING).any():
            raise UserError(f"shard {file} lacks frame {int(np.argmax(offset == _MISSING))} of its {count}; {mend}")
        stride = frame_bytes + _CRC_BYTES
        if (size != stride).any() or (np.diff(offset.astype(np.int64)) != stride).any():
            raise UserError(f"shard {file} is not laid out as this wmcache writes it; {mend}")
        if int(offset[-1]) + stride > len(data) - len(tail):
            raise UserError(f"shard {file} is cut short; {mend}")
        return np.ndarray(
            (count, *self._frame_shape),
            np.dtype("<f2"),
            buffer=data.data,
            offset=int(offset[0]),
            strides=(stride, 2 * self._frame_shape[1], 2),
        )
