"""A store far away, read through local files: whole shards, as they are wanted, in `$WMCACHE_HOME/mirror`.

A shard's file is named by its SHA-256, so stores, runs and processes share the folder, and nothing in it is ever out of date. Beyond
`$WMCACHE_MIRROR_BYTES` (as in 200GB; 80 % of what is free there by default) the files go that have not been used for longest; who has one
mapped keeps it until they let go of it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.layout import StoreCard, shard_file
from wmcache.cache.reader import MappedReader, Stored
from wmcache.common.errors import UserError, one_line
from wmcache.common.files import atomic_write, exclusive, free_space, home, human_bytes, sha256_of, sweep
from wmcache.common.paths import AnyPath, read_bytes, unreadable

SHARE_OF_FREE = 0.8
FETCHES = 4
"""Shards on their way at once."""
ATTEMPTS = 10
"""How often a shard is fetched that others push out before it is mapped."""


class MirroredReader(MappedReader):
    """Gathers frames from memory maps of local copies, each compared with its checksum when it comes, and when a process first uses it."""

    def __init__(self, store: AnyPath, card: StoreCard, sha256: NDArray[np.uint8]) -> None:
        """Args: the store and its card; `sha256` uint8 [shards, 32] of its shards.

        Raises:
            UserError: the bound of the mirror is no number of bytes, or is too small for a shard.
        """
        super().__init__(store, card)
        self._sha256 = sha256
        self._folder = home() / "mirror"
        self._most = most_bytes(self._folder)
        if self._most < card.shard_bytes(0):
            raise UserError(
                f"{self._folder} may hold {human_bytes(self._most)}, and a shard of {store} has {human_bytes(card.shard_bytes(0))}; "
                "free space there, or raise WMCACHE_MIRROR_BYTES"
            )
        if self._most < card.num_shards * card.shard_bytes(0):
            tqdm.write(
                one_line(
                    f"{self._folder} may hold {human_bytes(self._most)} of the {human_bytes(card.token_bytes)} of {store}: shards will be "
                    "fetched again and again; free space there, or raise WMCACHE_MIRROR_BYTES"
                ),
                file=sys.stderr,
            )
            # Files that are pushed out while they are mapped still take room.
            self._max_maps = max(1, min(self._max_maps, self._most // card.shard_bytes(0) // 2))
        self._sound: set[int] = set()

    def gather(self, frames: NDArray[np.int64], out: Stored) -> None:
        """See `MappedReader.gather`; also raises UserError where a shard cannot be fetched."""
        self._fetch_all(np.unique(frames // self._card.frames_per_shard).tolist())
        super().gather(frames, out)

    def prefetch(self, frames: NDArray[np.int64]) -> None:
        """Fetch what these frames are in, then as `MappedReader.prefetch`."""
        try:
            self._fetch_all(np.unique(frames // self._card.frames_per_shard).tolist())
        except UserError:
            return  # a hint; the read itself will say what is wrong
        super().prefetch(frames)

    def _file(self, shard: int) -> Path:
        return self._folder / f"{self._digest(shard)}.shard"

    def _digest(self, shard: int) -> str:
        return bytes(self._sha256[shard]).hex()

    def _fetch_all(self, shards: Iterable[int]) -> None:
        wanted = [shard for shard in shards if shard not in self._maps and shard not in self._sound]
        if len(wanted) > 1:
            with ThreadPoolExecutor(FETCHES, thread_name_prefix="mirror") as pool:
                for _ in pool.map(self._fetch, wanted):
                    pass

    def _open(self, shard: int) -> IO[bytes]:
        for _ in range(ATTEMPTS):
            self._fetch(shard)
            try:
                return self._file(shard).open("rb")
            except FileNotFoundError:
                self._sound.discard(shard)  # somebody else needed the room
        raise UserError(
            f"{self._folder} is too small for those who share it; free space there, or raise WMCACHE_MIRROR_BYTES"
        )

    def _fetch(self, shard: int) -> None:
        """Make sure that a shard's file is there and sound."""
        file = self._file(shard)
        with exclusive(file.with_suffix(".lock"), self._folder):
            if not self._is_there(shard, file):
                there = shard_file(self._path, shard)
                try:
                    data = read_bytes(there)
                except OSError as error:
                    raise unreadable(there, error) from error
                if hashlib.sha256(data).hexdigest() != self._digest(shard):
                    raise UserError(f"{there} differs from its checksum; {self._mend}")
                self._keep(file, data)
            self._sound.add(shard)

    def _is_there(self, shard: int, file: Path) -> bool:
        """Whether its file is there and sound, which then was used just now; others may delete it at any moment."""
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
            known = sorted((found.st_mtime_ns, found.st_size, path) for path, found in files_of(self._folder))
            total = sum(size for _, size, _ in known)
            for _, size, path in known:
                if total + len(data) <= self._most:
                    break
                path.unlink(missing_ok=True)
                total -= size
            with atomic_write(file) as stream:
                stream.write(data)


def files_of(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The shards in a mirror; nobody may be writing there."""
    return [(path, path.stat()) for path in folder.glob("*.shard")]


def most_bytes(folder: Path) -> int:
    """What a mirror may hold; raises UserError where the setting is no number of bytes."""
    if setting := os.environ.get("WMCACHE_MIRROR_BYTES"):
        from dask.utils import parse_bytes  # costs what a reader of local stores need not pay

        try:
            most = int(parse_bytes(setting))
        except (ValueError, OverflowError):
            most = 0
        if most < 1:
            raise UserError(f"WMCACHE_MIRROR_BYTES is {setting!r}; write a number of bytes, as in 200GB")
        return most
    held = sum(found.st_size for _, found in files_of(folder)) if folder.exists() else 0
    return int(SHARE_OF_FREE * ((free_space(folder) or 0) + held))
