"""Several stores of one encoder, read as one: for data that grows by whole datasets (rounds)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmcache.cache.identity import Identity
from wmcache.cache.reader import MemoryReader, Reader, Stored
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UnreadableError, UserError
from wmcache.common.paths import AnyPath, as_path

Int = NDArray[np.int64]

SEPARATOR = "+"
"""Between the fingerprints of the datasets in a joined store's identity."""


class JoinedStore(TokenStore):
    """The frames and episodes of several stores one after another, in the given order.

    Each store is split into train and val episodes by itself, so no episode changes its split when a store is added. `mean` and `std` are
    those of all frames. `identity` is that of the first store with the fingerprints of all datasets, joined by `+`; `path` and the rest of
    `card` are the first store's.

    Attributes:
        parts: the stores.
    """

    def __init__(self, parts: Sequence[TokenStore]) -> None:
        """Join open stores; raises UserError where a store is given twice, or encoder, grid or columns differ."""
        first = parts[0]
        fingerprints = [part.identity.dataset_fingerprint for part in parts]
        for number, part in enumerate(parts):
            same = replace(part.identity, dataset_fingerprint=fingerprints[0])
            different = first.identity.differences(same)
            if dict(part.columns) != dict(first.columns) or part.card.token_grid != first.card.token_grid:
                different.append("other columns or another token grid")
            if different:
                raise UserError(f"{part.path} cannot be joined with {first.path}: {'; '.join(different)}")
            if fingerprints[number] in fingerprints[:number]:
                raise UserError(f"{part.path} has the frames of another store that is given; name each dataset once")
        self.parts = tuple(parts)
        self.path, self.complete = first.path, all(part.complete for part in parts)
        self.card = replace(first.card, frames=sum(map(len, parts)))
        self.identity = replace(first.identity, dataset_fingerprint=SEPARATOR.join(fingerprints))
        self._columns, self._stamp = {}, first._stamp
        self._starts = np.cumsum([0, *map(len, parts)])
        self._reader = _JoinedReader(self)
        self._shard_starts = np.cumsum([0, *(part.card.num_shards for part in parts)])
        self.scale = None if first.scale is None else np.concatenate([np.asarray(part.scale) for part in parts])
        share = np.diff(self._starts)[:, None] / len(self)
        mean = (share * [part.mean for part in parts]).sum(0)
        square = (share * [np.square(part.std, dtype=np.float64) + np.square(part.mean) for part in parts]).sum(0)
        self.mean = mean.astype(np.float32)
        self.std = np.sqrt(np.maximum(square - np.square(mean), 0)).astype(np.float32)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """See `TokenStore.__reduce__`."""
        return JoinedStore, (self.parts,)

    def open_again(self) -> TokenStore:
        """See `TokenStore.open_again`."""
        in_memory = isinstance(self._reader, MemoryReader)
        return self if in_memory else JoinedStore([part.open_again() for part in self.parts])

    def _column(self, name: str) -> NDArray[Any]:
        values = [part.column(name) for part in self.parts]
        if name == "episode":
            before = np.cumsum([0, *(part.episodes for part in self.parts)])
            values = [value + np.int32(offset) for value, offset in zip(values, before, strict=False)]
        return np.concatenate(values)

    def split(self, split: str, seed: int = 42, fraction: float = 1.0) -> Int:
        """See `TokenStore.split`; of each store by itself."""
        before = np.cumsum([0, *(part.episodes for part in self.parts)])
        chosen = [part.split(split, seed, fraction) for part in self.parts]
        return np.concatenate([episodes + offset for episodes, offset in zip(chosen, before, strict=False)])

    def shard_of(self, frames: Int) -> Int:
        """See `TokenStore.shard_of`; shards are numbered through all stores."""
        part = self._part_of(frames)
        sizes = np.array([part.card.frames_per_shard for part in self.parts])
        shards: Int = self._shard_starts[part] + (frames - self._starts[part]) // sizes[part]
        return shards

    def by_part(self, frames: Int) -> Iterator[tuple[TokenStore, Int, Int]]:
        """Yield each store that has some of the frames [n], their numbers in it, and their places among the n."""
        part = self._part_of(frames)
        for number in np.unique(part).tolist():
            places = np.flatnonzero(part == number)
            yield self.parts[number], frames[places] - self._starts[number], places

    def _part_of(self, frames: Int) -> Int:
        return np.searchsorted(self._starts, frames, side="right") - 1


class _JoinedReader(Reader):
    """Reads from the store that has each frame."""

    def __init__(self, store: JoinedStore) -> None:
        self.store = store

    def gather(self, frames: Int, out: Stored) -> None:
        for part, numbers, places in self.store.by_part(frames):
            if len(places) == len(frames):
                part.gather_stored(numbers, out)
            else:
                out[places] = part.gather_stored(numbers)

    def prefetch(self, frames: Int) -> None:
        for part, numbers, _ in self.store.by_part(frames):
            part.prefetch(numbers)


def grows(before: Identity, now: Identity) -> bool:
    """Return whether a store is another one with more stores joined after it."""
    longer = now.dataset_fingerprint.startswith(before.dataset_fingerprint + SEPARATOR)
    return longer and replace(now, dataset_fingerprint=before.dataset_fingerprint) == before


def open_beside(store: TokenStore, path: AnyPath, what: str, hint: str) -> TokenStore:
    """Open a store beside another one; raise UserError with what it is and a hint where it cannot be used."""
    try:
        return TokenStore.open(path, mirrored=True)
    except UnreadableError:
        raise
    except UserError as error:
        raise UserError(f"the {what} of {store.path} cannot be used ({error}); {hint}") from error


def open_stores(paths: Sequence[str | AnyPath], *, mirrored: bool = False) -> TokenStore:
    """Open one store, or several of one encoder as one; see `TokenStore.open`."""
    parts = [TokenStore.open(as_path(path), mirrored=mirrored) for path in paths]
    return parts[0] if len(parts) == 1 else JoinedStore(parts)
