"""Reading a remote store through local files: complete shards, fetched when they are needed, in `$WMCACHE_HOME/mirror`.

A shard's file is named by its SHA-256, so stores, runs and processes share the folder, and its files never become outdated. Above
`$WMCACHE_MIRROR_BYTES` (as in 200GB; by default 80 % of the free space) the least recently used files are deleted.
"""

from __future__ import annotations

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.layout import StoreCard, shard_file
from wmcache.cache.reader import MappedReader, Stored
from wmcache.common.errors import UserError, one_line
from wmcache.common.files import atomic_write, sha256_of, sweep
from wmcache.common.folders import home
from wmcache.common.locks import exclusive
from wmcache.common.paths import AnyPath, free_space, read_bytes, readable
from wmcache.common.space import human_bytes

SHARE_OF_FREE = 0.8
FETCHES = 4
"""Shards that are fetched at once."""
ATTEMPTS = 10
"""How often a shard is fetched that other processes delete before it is mapped."""
HINT = "free space there, or raise WMCACHE_MIRROR_BYTES"


class MirroredReader(MappedReader):
    """Gathers frames from memory maps of local copies, compared with their checksums on arrival and when a process first uses them."""

    def __init__(self, store: AnyPath, card: StoreCard, sha256: NDArray[np.uint8]) -> None:
        """Take the checksums of the store's shards, uint8 [shards, 32]; raise UserError where there is no room for one shard."""
        super().__init__(store, card)
        self._sha256 = sha256
        self._folder = home() / "mirror"
        self._most = most_bytes(self._folder)
        room, shard = human_bytes(self._most), card.shard_bytes(0)
        if self._most < shard:
            raise UserError(f"{self._folder} has room for {room}, a shard of {store} has {human_bytes(shard)}; {HINT}")
        if self._most < card.num_shards * shard:
            line = f"{self._folder} has room for {room}, shards of {store} will be fetched repeatedly; {HINT}"
            tqdm.write(one_line(line), file=sys.stderr)
            # Deleted files take room while they are mapped.
            self._max_shards = max(1, min(self._max_shards, self._most // shard // 2))
        self._sound: set[int] = set()

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `MappedReader.gather`; also raise UserError where a shard cannot be fetched."""
        self._fetch_all(frames)
        super().gather(frames, out)

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Fetch the shards of these frames, then see `MappedReader.prefetch`."""
        try:
            self._fetch_all(frames)
        except UserError:
            return  # the read itself will raise it
        super().prefetch(frames)

    def _file(self, shard: int) -> Path:
        return self._folder / f"{self._digest(shard)}.shard"

    def _digest(self, shard: int) -> str:
        return bytes(self._sha256[shard]).hex()

    def _fetch_all(self, frames: NDArray[np.int64]) -> None:
        shards = np.unique(frames // self._card.frames_per_shard).tolist()
        wanted = [shard for shard in shards if shard not in self._shards and shard not in self._sound]
        if len(wanted) > 1:
            with ThreadPoolExecutor(FETCHES, thread_name_prefix="mirror") as pool:
                list(pool.map(self._fetch, wanted))

    def _open(self, shard: int) -> IO[bytes]:
        for _ in range(ATTEMPTS):
            self._fetch(shard)
            try:
                return self._file(shard).open("rb")
            except FileNotFoundError:
                self._sound.discard(shard)  # deleted by another process, for room
        raise UserError(f"{self._folder} is too small for the processes that share it; {HINT}")

    def _fetch(self, shard: int) -> None:
        file = self._file(shard)
        with exclusive(file.with_suffix(".lock"), self._folder):
            if not self._is_sound(shard, file):
                remote = shard_file(self._path, shard)
                with readable(remote):
                    data = read_bytes(remote)
                if hashlib.sha256(data).hexdigest() != self._digest(shard):
                    raise UserError(f"{remote} differs from its checksum; {self._hint}")
                self._keep(file, data)
            self._sound.add(shard)

    def _is_sound(self, shard: int, file: Path) -> bool:
        """Return whether a file is sound, and mark it as used; another process may delete it at any moment."""
        try:
            if shard in self._sound or sha256_of(file) == self._digest(shard):
                os.utime(file)
                return True
        except FileNotFoundError:
            self._sound.discard(shard)
        return False

    def _keep(self, file: Path, data: bytes) -> None:
        with exclusive(self._folder / "room.lock", self._folder):
            sweep(self._folder)
            file.unlink(missing_ok=True)
            known = sorted((found.st_mtime_ns, found.st_size, path) for path, found in _copies(self._folder))
            total = sum(size for _, size, _ in known)
            for _, size, path in known:
                if total + len(data) <= self._most:
                    break
                path.unlink(missing_ok=True)
                total -= size
            with atomic_write(file) as stream:
                stream.write(data)


def _copies(folder: Path) -> list[tuple[Path, os.stat_result]]:
    return [(path, path.stat()) for path in folder.glob("*.shard")]


def most_bytes(folder: Path) -> int:
    """Return what a mirror may take; raise UserError where WMCACHE_MIRROR_BYTES is not a number of bytes."""
    if setting := os.environ.get("WMCACHE_MIRROR_BYTES"):
        from dask.utils import parse_bytes  # slow to import

        try:
            most = int(parse_bytes(setting))
        except (ValueError, OverflowError):
            most = 0
        if most < 1:
            raise UserError(f"WMCACHE_MIRROR_BYTES is not a number of bytes, as in 200GB: {setting!r}")
        return most
    held = sum(found.st_size for _, found in _copies(folder))
    return int(SHARE_OF_FREE * ((free_space(folder) or 0) + held))
