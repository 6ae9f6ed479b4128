"""The token store, for reading: checked when it is opened, and watched while it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from tqdm import tqdm

from wmcache.cache.arrays import SMALL, is_mappable, open_group, open_tokens, read_column
from wmcache.cache.identity import Identity
from wmcache.cache.layout import AGAIN, read_attributes, read_card, shard_file, shard_sizes
from wmcache.cache.mirror import MirroredReader
from wmcache.cache.quantise import dequantise
from wmcache.cache.reader import MappedReader, MemoryReader, Reader, Stored, ZarrReader
from wmcache.cache.windows import Goals, Windows, episode_pieces, split_episodes, window_starts
from wmcache.common.columns import Column, Role, action_bounds, default_columns, join_role
from wmcache.common.errors import UserError, command
from wmcache.common.paths import MISSING, AnyPath, absolute, as_path, is_local, readable, stamp, unreadable
from wmcache.common.progress import seconds_between_updates

if TYPE_CHECKING:
    from wmcache.cache.torch_dataset import WindowDataset

Tokens = NDArray[np.float16]


class TokenStore:
    """A store, for reading.

    Attributes:
        complete: whether every shard is done; only then can it be trained on.
        mean, std: float32 [D], per channel over all frames and tokens.
        scale: int8 stores: float32 [shards, 2, D], scale and middle of each channel, see `quantise`; else None.
    """

    def __init__(
        self, path: AnyPath, group: zarr.Group, attributes: dict[str, Any], stamped: object, *, mirrored: bool
    ) -> None:
        """Use `TokenStore.open`."""
        self.path = path
        self.card = read_card(attributes)
        self.identity = Identity.from_json(attributes["identity"], str(path))
        self.complete = bool(attributes["complete"])
        self.mean = np.asarray(attributes.get("mean", np.zeros(self.card.token_dim)), dtype=np.float32)
        self.std = np.asarray(attributes.get("std", np.ones(self.card.token_dim)), dtype=np.float32)
        self._group, self._checksums, self._stamp = group, attributes["columns"], stamped
        self._columns: dict[str, NDArray[Any]] = {}
        tokens = open_tokens(group, self.card, attributes, path)
        mappable = is_mappable(tokens, self.card)
        if mappable and self.complete:
            self._require_shards()
        self._reader: Reader
        if mappable and is_local(path):
            self._reader = MappedReader(path, self.card)
        elif mappable and mirrored and self.complete:
            self._reader = MirroredReader(path, self.card, self._column("sha256"))
        else:
            self._reader = ZarrReader(tokens, self.card, path)
        if self.card.frames <= SMALL:
            for name in self.card.step_columns:
                self.column(name)
        self.scale = self._column("scale") if "scale" in self._checksums else None
        if self.card.dtype == "int8" and self.scale is None:
            raise UserError(f"{path} is incomplete; {AGAIN}")

    @classmethod
    def open(cls, path: str | AnyPath, *, allow_incomplete: bool = False, mirrored: bool = False) -> TokenStore:
        """Open a store at a path or URL; raise UserError where it is missing, damaged, not a store, or incomplete (unless allowed).

        Args:
            mirrored: keep complete shards of a remote store in local files, to read all of it many times, instead of fetching frames.
        """
        where = as_path(path)
        stamped = _stamp(where)
        attributes = read_attributes(where)
        group = open_group(where)
        if not attributes["complete"] and not allow_incomplete:
            raise UserError(f"{path} is incomplete; {AGAIN}")
        return cls(where, group, attributes, stamped, mirrored=mirrored)

    @cached_property
    def columns(self) -> dict[str, Column]:
        """What the columns are, by name."""
        if self.card.columns is not None:
            return self.card.columns
        return default_columns(self.column("action").shape[1], self.column("state").shape[1])

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the step table, [frames, …]; raises KeyError for an unknown one."""
        if name not in self.card.step_columns:
            raise KeyError(name)
        if name not in self._columns:
            self._columns[name] = self._column(name)
        return self._columns[name]

    def step_columns(self) -> dict[str, NDArray[Any]]:
        """Return all columns of the step table, as `StoreWriter.create` takes them."""
        return {name: self.column(name) for name in self.card.step_columns}

    def role(self, role: Role, dtype: str | None = None) -> NDArray[Any] | None:
        """Return the columns of a role one after another, [frames, numbers]; None where no column has it."""
        return join_role({name: self.column(name) for name in self.columns}, self.columns, role, dtype)

    @cached_property
    def action(self) -> NDArray[Any]:
        """float32 [frames, A]: taken at that frame; A = 0 where the store has none."""
        joined = self.role("action", "float32")
        return np.zeros((len(self), 0), np.float32) if joined is None else joined

    @cached_property
    def bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lowest and highest actions, float32 [A] each; those in the store where the bounds are unknown."""
        return action_bounds({name: self.column(name) for name in self.columns}, self.columns)

    @property
    def discrete(self) -> bool:
        """Whether actions are one-hot."""
        return any(column.discrete for column in self.columns.values() if "action" in column.roles)

    @cached_property
    def proprio(self) -> NDArray[Any] | None:
        """float32 [frames, P]: what models and policies see of that frame beside its image; None where the store has none."""
        return self.role("proprio", "float32")

    @cached_property
    def state(self) -> NDArray[Any] | None:
        """[frames, S], float64 in datasets of today: of that frame; None where the store has none."""
        return self.role("state")

    def require_state(self) -> NDArray[Any]:
        """Return `state`; raises UserError where there is none."""
        if self.state is None:
            raise UserError(f"{self.path} has no state, which this needs; collect or import data with a state")
        return self.state

    @cached_property
    def reward(self) -> NDArray[Any] | None:
        """float32 [frames]: of the env step that starts at that frame; None where the store has none."""
        return self._scalar("reward", "float32")

    @cached_property
    def terminated(self) -> NDArray[Any] | None:
        """bool [frames]: whether that env step ends the episode for good; None where the store does not know."""
        return self._scalar("terminated", "bool")

    @cached_property
    def truncated(self) -> NDArray[Any] | None:
        """bool [frames]: whether that env step is the last one that was recorded; None where the store does not know."""
        return self._scalar("truncated", "bool")

    def _scalar(self, role: Role, dtype: str) -> NDArray[Any] | None:
        joined = self.role(role, dtype)
        return None if joined is None else joined[:, 0]

    @property
    def episode(self) -> NDArray[Any]:
        """int32 [frames], ascending."""
        return self.column("episode")

    @property
    def step(self) -> NDArray[Any]:
        """int32 [frames], from 0 in each episode."""
        return self.column("step")

    def _column(self, name: str) -> NDArray[Any]:
        return read_column(self._group, self.card, name, self._checksums, self.path)

    def __len__(self) -> int:
        """Number of frames."""
        return self.card.frames

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return int(self.episode[-1]) + 1

    def gather(self, frames: NDArray[np.integer], out: Tokens | None = None) -> Tokens:
        """Return the tokens of frames [n], float16 [n, N, D], in the given order and with duplicates; in `out`, if given.

        Raises:
            UserError: a shard is missing or damaged, or the store has changed since it was opened.
        """
        if self.scale is None:
            return self.gather_stored(frames, out)
        stored = self.gather_stored(frames)
        scale, middle = np.moveaxis(self.scale[self.shard_of(np.asarray(frames))], 1, 0)
        return dequantise(stored, scale, middle, out)

    def gather_stored(self, frames: NDArray[np.integer], out: Stored | None = None) -> Stored:
        """As `gather`, in the store's own dtype: int8 tokens are to be dequantised on the device."""
        wanted: NDArray[np.int64] = np.asarray(frames, dtype=np.int64)
        if wanted.ndim != 1:
            raise IndexError(f"frames must be a vector, not of shape {wanted.shape}")
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"frames must be in [0, {len(self)}), not in [{wanted.min()}, {wanted.max()}]")
        out = np.empty((len(wanted), *self.card.frame_shape), self.card.dtype) if out is None else out
        with self._unchanged():
            self._reader.gather(wanted, out)
        return out

    def shard_of(self, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shard of each frame, a row of `scale`."""
        return frames // self.card.frames_per_shard

    def prefetch(self, frames: NDArray[np.integer]) -> None:
        """Start to read frames from disk that will be gathered soon."""
        self._reader.prefetch(np.asarray(frames, dtype=np.int64))

    def load(self, *, quiet: bool = False) -> Stored:
        """Read all tokens into memory, in the store's own dtype, [frames, N, D]; `gather` then reads them there."""
        if isinstance(self._reader, MemoryReader):
            return self._reader.tokens
        try:
            tokens: Stored = np.empty((len(self), *self.card.frame_shape), self.card.dtype)
        except MemoryError as error:
            raise UserError(f"too little memory for all tokens of {self.path}; choose a --residence of disk") from error
        update = seconds_between_updates()
        with tqdm(total=len(self), desc="load", unit=" frames", mininterval=update, disable=quiet) as bar:
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
        goals: Goals | None = None,
        whole: bool = False,
        measured: bool = False,
    ) -> Windows:
        """Return all training windows of a split (see `split_episodes`); raise UserError where no episode is long enough.

        With `goals`, at least one goal follows each window. With `measured`, rewards and ends of all its frames are known, where the store
        has such. With `whole`, windows are whole episodes from their first frames on, cut into pieces of at most `history` + `predict`
        frames (see `episode_pieces`), and no longer than the longest piece.
        """
        episodes = self.split(split, seed, fraction)
        if whole:
            starts, lengths, dropped = episode_pieces(self.episode, episodes, history + predict, frameskip)
            self._require_windows(starts, split, 2 * frameskip)
            return Windows(self, starts, int(lengths.max()) - predict, predict, frameskip, dropped, lengths=lengths)
        span = (history + predict) * frameskip + (goals is not None)
        starts, dropped = window_starts(self.episode, episodes, span)
        if measured and (self.reward is not None or self.terminated is not None):
            starts = starts[self._are_measured(starts + span - 1)]
        self._require_windows(starts, split, span)
        return Windows(self, starts, history, predict, frameskip, dropped, goals=goals)

    def _are_measured(self, frames: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the env step that starts at each frame was taken: it has a frame after it, or ended its episode."""
        ends = np.append(self.episode[1:] != self.episode[:-1], True)
        if self.terminated is not None:
            ends &= ~self.terminated
        measured: NDArray[np.bool_] = ~ends[frames]
        return measured

    def _require_windows(self, starts: NDArray[np.int64], split: str, span: int) -> None:
        if not len(starts):
            raise UserError(
                f"no episode of {self.path} ({split}) has the {span} frames of a window; "
                "collect longer episodes, or lower --frameskip or the frames of a window: --history, or the model's own option"
            )

    def torch_dataset(
        self,
        history: int = 3,
        predict: int = 1,
        frameskip: int = 5,
        split: str = "all",
        *,
        seed: int = 42,
        fraction: float = 1.0,
        whole: bool = False,
    ) -> WindowDataset:
        """Return windows as a `torch.utils.data.Dataset`; arguments and errors as of `windows`."""
        from wmcache.cache.torch_dataset import WindowDataset  # imports torch

        return WindowDataset(
            self.windows(history, predict, frameskip, split, seed=seed, fraction=fraction, whole=whole)
        )

    def open_again(self) -> TokenStore:
        """Return the store for another process; tokens in memory are shared with a fork.

        Raises:
            UserError: another store is at its path now.
        """
        if isinstance(self._reader, MemoryReader):
            return self
        again, arguments = self.__reduce__()
        found: TokenStore = again(*arguments)
        return found

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Let `pickle` store the path: another process opens the store again, see `open_again`."""
        mirrored = isinstance(self._reader, MirroredReader)
        return _open_same, (absolute(self.path), self.identity, self.complete, mirrored)

    def longest_episode(self, split: str = "all", *, seed: int = 42) -> int:
        """Return the frames of the longest episode of a split, see `windows`."""
        lengths = np.bincount(self.episode)
        return int(lengths[self.split(split, seed)].max())

    def split(self, split: str, seed: int = 42, fraction: float = 1.0) -> NDArray[np.int64]:
        """Return the episodes of a split, see `split_episodes`."""
        return split_episodes(self.episodes, split, seed, fraction)

    def frames_of(self, split: str, seed: int = 42, fraction: float = 1.0) -> NDArray[np.int64]:
        """Return the frames of a split, ascending."""
        return np.flatnonzero(np.isin(self.episode, self.split(split, seed, fraction)))

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Raise UserError where the store changed since it was opened: writers change the attributes before anything else."""
        try:
            yield
        finally:
            # Mirrored shards are known by their checksums, so the server is not asked.
            now = self._stamp if isinstance(self._reader, MirroredReader) else _stamp(self.path)
            # A server that does not answer has failed the read itself.
            if now != self._stamp and (now is not None or is_local(self.path)):
                raise UserError(f"{self.path} was replaced or changed while it was being read; run the command again")

    def _require_shards(self) -> None:
        with readable(self.path):
            sizes, _ = shard_sizes(self.path, self.card.num_shards)
        expected = np.full(self.card.num_shards, self.card.shard_bytes(0))
        expected[-1] = self.card.shard_bytes(self.card.num_shards - 1)
        if len(bad := np.flatnonzero(sizes != expected)):
            first, repair = shard_file(self.path, int(bad[0])), command("wmcache", "repair", self.path)
            count = f"{len(bad)} of {self.card.num_shards}"
            raise UserError(f"{count} shards are missing or cut short, such as {first}; repair it with: {repair}")


def _open_same(path: str, identity: Identity, complete: bool, mirrored: bool) -> TokenStore:
    found = TokenStore.open(path, allow_incomplete=not complete, mirrored=mirrored)
    if different := "; ".join(identity.differences(found.identity)):
        raise UserError(f"{path} was replaced by another store ({different}); run the command again")
    return found


def _stamp(path: AnyPath) -> object:
    file = path / "zarr.json"
    try:
        return stamp(file)
    except OSError as error:
        if is_local(path) and error.errno not in MISSING:
            raise unreadable(file, error) from error
        return None
