"""The token store, for reading: checked when it is opened, and watched while it is read.

Any Zarr reader opens a store (`zarr.open_group`); `TokenStore` reads it through memory maps and knows its checksums. See `layout.py` for
what lies where, `writer.py` for how it comes to be.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm import tqdm
from wmcache.cache.errors import UserError, command
from wmcache.cache.files import seconds_between_updates
from wmcache.cache.identity import Identity
from wmcache.cache.layout import (
    check_attributes,
    is_mappable,
    open_group,
    open_tokens,
    read_attributes,
    read_card,
    read_columns,
    shard_file,
)
from wmcache.cache.quantise import dequantise
from wmcache.cache.reader import MappedReader, MemoryReader, Reader, Stored, ZarrReader
from wmcache.cache.windows import Windows, split_episodes, window_starts

Tokens = NDArray[np.float16]

MOST_FAULTS = 1000
"""Shards that have to be found missing before nobody looks for more."""


class TokenStore:
    """A store, for reading.

    Attributes:
        path, card, identity: where and what it is.
        complete: whether every shard is done; only then may it be trained on.
        mean, std: float32 [D], per channel over all frames and tokens.
        action, state, episode, step: the step table, one row a frame.
    """

    def __init__(self, path: Path | str, group: zarr.Group, attributes: dict[str, Any], stamp: object) -> None:
        """Use `TokenStore.open`."""
        self.path = path
        self.card = read_card(attributes)
        self.identity = Identity.from_json(attributes["identity"], str(path))
        self.complete = bool(attributes["complete"])
        self.mean = np.asarray(attributes.get("mean", np.zeros(self.card.token_dim)), dtype=np.float32)
        self.std = np.asarray(attributes.get("std", np.ones(self.card.token_dim)), dtype=np.float32)
        self._stamp = stamp
        tokens = open_tokens(group, self.card, attributes, path)
        mappable = isinstance(path, Path) and is_mappable(tokens, self.card)
        if isinstance(path, Path) and mappable and self.complete:
            self._require_shards(path)
        columns = read_columns(group, self.card, attributes["columns"], path)
        self._reader: Reader
        if isinstance(path, Path) and mappable:
            self._reader = MappedReader(path, self.card)
        else:
            self._reader = ZarrReader(tokens, self.card, path)
        self.action, self.state, self.episode, self.step = (
            columns[name] for name in ("action", "state", "episode", "step")
        )
        self.scale = columns.get("scale")
        if self.card.dtype == "int8" and self.scale is None:
            raise UserError(
                f"{path} can be read only when it is complete; finish it by running its wmcache extract again"
            )

    @classmethod
    def open(cls, path: str | Path, *, allow_incomplete: bool = False) -> TokenStore:
        """Open a store.

        Args:
            path: its folder, or the address of one that fsspec can read (`s3://…`), which goes through the zarr API.
            allow_incomplete: read what is there of a store whose extraction has not finished.

        Raises:
            UserError: it is missing, damaged, not a store, or incomplete (unless allowed).
        """
        if isinstance(path, str) and "://" in path:
            try:
                group = zarr.open_group(path, mode="r")
            except Exception as error:  # (whatever the file system of that address raises)
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise UserError(f"{path} cannot be opened ({reason}); check the address and the network") from error
            attributes, stamp = check_attributes(dict(group.attrs), path), None
            place: Path | str = path
        else:
            place = Path(path)
            stamp = _stamp(place)
            attributes = read_attributes(place)
            group = open_group(place)
        if not attributes["complete"] and not allow_incomplete:
            raise UserError(f"{path} is incomplete; finish it by running its wmcache extract again")
        return cls(place, group, attributes, stamp)

    def __len__(self) -> int:
        """Number of frames."""
        return self.card.frames

    def gather(self, frames: NDArray[np.integer], out: Tokens | None = None) -> Tokens:
        """The tokens of some frames, in the given order, duplicates allowed.

        Args:
            frames: [n], numbers in [0, len(self)).
            out: float16 [n, N, D] to fill, so that a batch costs no allocation.

        Returns:
            float16 [n, N, D].

        Raises:
            IndexError: a number is out of range.
            UserError: a shard is missing or damaged, or the store has changed since it was opened.
        """
        if self.scale is None:
            return self.gather_stored(frames, out)
        frames = np.asarray(frames)
        stored = self.gather_stored(frames)
        scale, middle = np.moveaxis(self.scale[frames // self.card.frames_per_shard], 1, 0)
        return dequantise(stored, scale, middle, out)

    def gather_stored(self, frames: NDArray[np.integer], out: Stored | None = None) -> Stored:
        """As `gather`, in the store's own dtype: an int8 store's steps, to be multiplied out where that is cheap."""
        wanted: NDArray[np.int64] = np.asarray(frames, dtype=np.int64)
        if wanted.ndim != 1:
            raise IndexError(f"frames must be a vector, not of shape {wanted.shape}")
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"frames must lie in [0, {len(self)}), not in [{wanted.min()}, {wanted.max()}]")
        if out is None:
            out = np.empty((len(wanted), *self.card.frame_shape), self.card.dtype)
        with self._unchanged():
            self._reader.gather(wanted, out)
        return out

    def prefetch(self, frames: NDArray[np.integer]) -> None:
        """Hint that these frames will be wanted soon, so that the disk can be read meanwhile."""
        self._reader.prefetch(np.asarray(frames, dtype=np.int64))

    def load(self) -> Stored:
        """Read all tokens into memory, in the store's own dtype, [frames, N, D]; `gather` then reads them there.

        Raises:
            UserError: as `gather`; or there is not so much memory.
        """
        if isinstance(self._reader, MemoryReader):
            return self._reader.tokens
        try:
            tokens = np.empty((len(self), *self.card.frame_shape), self.card.dtype)
        except MemoryError as error:
            raise UserError(
                f"there is no memory for all tokens of {self.path}; choose a --residence of disk"
            ) from error
        with tqdm(total=len(self), desc="load", unit=" frames", mininterval=seconds_between_updates()) as bar:
            for shard in range(self.card.num_shards):
                part = self.card.shard_frames(shard)
                self.gather_stored(np.arange(part.start, part.stop), tokens[part.start : part.stop])
                bar.update(len(part))
        self._reader = MemoryReader(tokens)
        return tokens

    def windows(
        self,
        history: int = 3,
        predict: int = 1,
        frameskip: int = 5,
        split: str = "all",
        *,
        seed: int = 42,
        fraction: float = 1.0,
    ) -> Windows:
        """All training windows of a split of the episodes.

        Args:
            history, predict: context and target frames of a window.
            frameskip: env steps between the frames of a window.
            split: `train` (90 % of the episodes), `val` (the others) or `all`.
            seed: of the split (DINO-WM: 42).
            fraction: share of the split's episodes, see `split_episodes`.

        Raises:
            UserError: no episode of the split is long enough.
        """
        episodes = split_episodes(int(self.episode[-1]) + 1, split, seed, fraction)
        starts, dropped = window_starts(self.episode, episodes, (history + predict) * frameskip)
        if not len(starts):
            raise UserError(
                f"no episode of {self.path} ({split}) has the {(history + predict) * frameskip} frames that a window of "
                f"{history} + {predict} frames, {frameskip} apart, takes; collect longer episodes or lower --history or --frameskip"
            )
        return Windows(self, starts, history, predict, frameskip, dropped)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Whatever is read inside was the store that was opened: writers change the attributes before anything else."""
        try:
            yield
        finally:
            if isinstance(self.path, Path) and _stamp(self.path) != self._stamp:
                raise UserError(f"{self.path} was replaced or changed while it was being read; start again")

    def _require_shards(self, path: Path) -> None:
        bad = []
        for shard in range(self.card.num_shards):
            file = shard_file(path, shard)
            try:
                if file.stat().st_size != self.card.shard_bytes(shard):
                    bad.append(file)
            except OSError:
                bad.append(file)
            if len(bad) == MOST_FAULTS:
                break
        if bad:
            raise UserError(
                f"{len(bad)} of {self.card.num_shards} shards are missing or cut short, the first is {bad[0]}; "
                f"mend it with: {command('wmcache', 'repair', path)}"
            )


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Changes whenever the store's attributes are written, or another store takes its place."""
    try:
        found = os.stat(path / "zarr.json")  # noqa: PTH116 (half the time of Path.stat, and it is called for every batch)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
