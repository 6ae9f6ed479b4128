"""The token store: a Zarr v3 group that is written in whole shards and complete only when its record says so.

    zarr.json                       attributes: identity, encoder and dataset cards, token grid, completeness, mean and std
    tokens/c/S/0/0                  shard S: the tokens of the frames of tar S, one inner chunk a frame, crc32c on each
    tokens/commits/000012.json      the record of a shard: frames, bytes, sha256 and sums; written after the shard itself
    action state episode step       the step table again, so that a store is all that training needs

Any Zarr reader opens it; `TokenStore.gather` reads it through memory maps (see `reader.py`).
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from wmcache.cache.errors import UserError
from wmcache.cache.files import read_json, sha256_of, write_json
from wmcache.cache.identity import FORMAT_VERSION, Identity
from wmcache.cache.reader import ShardedReader
from wmcache.cache.windows import Windows, split_episodes, window_starts
from zarr.codecs import Crc32cCodec

FORMAT = "wmcache-token-store"
SUMMED_FRAMES = 16
STEP_COLUMNS = ("action", "state", "episode", "step")
RECORDED_PACKAGES = ("torch", "timm", "transformers", "numpy", "zarr", "pillow")

Tokens = NDArray[np.float16]


@dataclass(frozen=True)
class StoreCard:
    """What a store is, beside its identity; nothing here changes a number in it.

    Attributes:
        encoder: how to make the same encoder again: name, weights, options.
        dataset: what the frames show: name, path, environment, maze, image size, fps.
        token_grid: rows and columns of the patch tokens; (1, 1) for a single token.
        token_dim: D.
        frames, frames_per_shard: counts.
    """

    encoder: dict[str, Any]
    dataset: dict[str, Any]
    token_grid: tuple[int, int]
    token_dim: int
    frames: int
    frames_per_shard: int

    @property
    def tokens_per_frame(self) -> int:
        """N."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def num_shards(self) -> int:
        """Shards of `frames_per_shard` frames; the last may be short."""
        return -(-self.frames // self.frames_per_shard)

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens, checksums aside."""
        return self.frames * self.tokens_per_frame * self.token_dim * 2

    def shard_frames(self, shard: int) -> range:
        """The frames of a shard."""
        return range(shard * self.frames_per_shard, min(self.frames, (shard + 1) * self.frames_per_shard))


class StoreWriter:
    """Writes a store. Writers in several processes are safe beside each other as long as no two write the same shard."""

    def __init__(self, path: Path, card: StoreCard, identity: Identity) -> None:
        """Use `StoreWriter.create` or `StoreWriter.resume`."""
        self.path, self.card, self.identity = path, card, identity
        self._tokens = zarr.open_array(path / "tokens", mode="r+")

    @classmethod
    def create(cls, path: Path, card: StoreCard, identity: Identity, steps: Mapping[str, NDArray[Any]]) -> StoreWriter:
        """Start a store, or take up again the one with the same identity.

        Args:
            path: the group's folder, ending in `.zarr`.
            card: what it is.
            identity: what could change a number in it.
            steps: the step table: action [frames, 2], state [frames, 4], episode [frames], step [frames].

        Raises:
            UserError: a store of another identity is there, naming the fields that differ; or the folder is not a store.
        """
        if path.exists():
            return cls.resume(path, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        skeleton = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            _create_arrays(skeleton, card, identity, steps)
            skeleton.rename(path)
        except OSError as error:
            if path.exists():  # somebody else was faster
                return cls.resume(path, identity)
            raise UserError(
                f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
            ) from error
        finally:
            shutil.rmtree(skeleton, ignore_errors=True)
        return cls(path, card, identity)

    @classmethod
    def resume(cls, path: Path, identity: Identity) -> StoreWriter:
        """Take up the store at `path`; raises UserError as `create` does."""
        attributes = read_attributes(path)
        if different := Identity.from_json(attributes["identity"], str(path)).differences(identity):
            raise UserError(f"{path} was extracted with other settings ({'; '.join(different)}); choose another --out")
        return cls(path, read_card(attributes), identity)

    def pending(self) -> list[int]:
        """The shards without a record."""
        return [shard for shard in range(self.card.num_shards) if not self._record(shard).exists()]

    def write_shard(self, shard: int, tokens: Tokens) -> None:
        """Write a whole shard, then its record.

        Args:
            shard: its number.
            tokens: float16 [frames of the shard, N, D].

        Raises:
            UserError: a value is not finite (or overflowed float16), naming the frame; or the disk is full.
        """
        frames = self.card.shard_frames(shard)
        expected = (len(frames), self.card.tokens_per_frame, self.card.token_dim)
        if tokens.shape != expected or tokens.dtype != np.float16:
            raise ValueError(f"shard {shard} takes float16 {expected}, not {tokens.dtype} {tokens.shape}")
        finite = np.isfinite(tokens).all(axis=(1, 2))
        if not finite.all():
            frame = frames[int(np.flatnonzero(~finite)[0])]
            raise UserError(
                f"the encoder gave a value that float16 cannot hold for frame {frame}; check its weights, or try --dtype float32"
            )
        file = shard_file(self.path, shard)
        try:
            # The last shard reaches past the array's end, so zarr would merge it with what is there, torn or not.
            file.unlink(missing_ok=True)
            self._tokens[frames.start : frames.stop] = tokens
            total, squares = channel_sums(tokens)
            record = {
                "frames": [frames.start, frames.stop],
                "bytes": file.stat().st_size,
                "sha256": sha256_of(file),
                "sum": total.tolist(),
                "sum_of_squares": squares.tolist(),
            }
        except OSError as error:
            raise UserError(
                f"cannot write {file}: {error.strerror or error}; free space, then run the same command again"
            ) from error
        write_json(self._record(shard), record)

    def finish(self) -> None:
        """Compute the statistics and declare the store complete.

        Raises:
            UserError: a shard has no record.
        """
        if missing := self.pending():
            raise UserError(
                f"{self.path} lacks {len(missing)} of {self.card.num_shards} shards; run the same wmcache extract again"
            )
        count = self.card.frames * self.card.tokens_per_frame
        records = [read_json(self._record(shard), "extract again") for shard in range(self.card.num_shards)]
        mean = np.sum([record["sum"] for record in records], axis=0) / count
        square = np.sum([record["sum_of_squares"] for record in records], axis=0) / count
        std = np.sqrt(np.maximum(square - mean**2, 0.0))
        group = zarr.open_group(self.path, mode="r+")
        group.attrs.update({"mean": mean.tolist(), "std": std.tolist(), "complete": True})

    def _record(self, shard: int) -> Path:
        return self.path / "tokens" / "commits" / f"{shard:06d}.json"


class TokenStore:
    """A complete store, for reading.

    Attributes:
        path, card, identity: where and what it is.
        mean, std: float32 [D], per channel over all frames and tokens.
        action, state, episode, step: the step table, one row a frame.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        """Use `TokenStore.open`."""
        self.path = path
        self.card = read_card(attributes)
        self.identity = Identity.from_json(attributes["identity"], str(path))
        depth = self.card.token_dim
        self.mean = np.asarray(attributes.get("mean", np.zeros(depth)), dtype=np.float32)
        self.std = np.asarray(attributes.get("std", np.ones(depth)), dtype=np.float32)
        self.complete = bool(attributes.get("complete"))
        self.action, self.state, self.episode, self.step = (_read_column(path, name) for name in STEP_COLUMNS)
        self._reader = ShardedReader(
            lambda shard: shard_file(path, shard),
            frames=self.card.frames,
            frames_per_shard=self.card.frames_per_shard,
            frame_shape=(self.card.tokens_per_frame, depth),
        )

    @classmethod
    def open(cls, path: str | Path, *, allow_incomplete: bool = False) -> TokenStore:
        """Open a store.

        Raises:
            UserError: it is missing, not a store, or incomplete (unless allowed).
        """
        path = Path(path)
        attributes = read_attributes(path)
        if not attributes.get("complete") and not allow_incomplete:
            raise UserError(f"{path} is incomplete; finish it by running its wmcache extract again")
        return cls(path, attributes)

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
            UserError: a shard is missing or damaged.
        """
        return self._reader.gather(frames, out)

    def windows(
        self, history: int = 3, predict: int = 1, frameskip: int = 5, split: str = "all", *, seed: int = 42
    ) -> Windows:
        """All training windows of a split of the episodes.

        Args:
            history, predict: context and target frames of a window.
            frameskip: env steps between the frames of a window.
            split: `train` (90 % of the episodes), `val` (the others) or `all`.
            seed: of the split (DINO-WM: 42).

        Raises:
            UserError: no episode of the split is long enough.
        """
        episodes = split_episodes(int(self.episode[-1]) + 1, split, seed)
        starts, dropped = window_starts(self.episode, episodes, (history + predict) * frameskip)
        if not len(starts):
            raise UserError(
                f"no episode of {self.path} ({split}) has the {(history + predict) * frameskip} frames that a window of "
                f"{history} + {predict} frames, {frameskip} apart, takes; collect longer episodes or lower --history or --frameskip"
            )
        return Windows(self, starts, history, predict, frameskip, dropped)


def channel_sums(tokens: Tokens) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and sum of squares of each channel, float64 [D], in blocks: a whole shard in float64 would be four times its size."""
    total, squares = np.zeros(tokens.shape[-1]), np.zeros(tokens.shape[-1])
    for start in range(0, len(tokens), SUMMED_FRAMES):
        rows = tokens[start : start + SUMMED_FRAMES].reshape(-1, tokens.shape[-1]).astype(np.float64)
        total += rows.sum(0)
        squares += np.einsum("nd,nd->d", rows, rows)
    return total, squares


def shard_file(path: Path, shard: int) -> Path:
    """Where Zarr keeps a shard of the tokens."""
    return path / "tokens" / "c" / str(shard) / "0" / "0"


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the store at `path`.

    Raises:
        UserError: it is missing, damaged, not a store, or of another format.
    """
    mend = "make a store with: wmcache extract"
    if not path.exists():
        raise UserError(f"{path} does not exist; {mend}")
    attributes = read_json(path / "zarr.json", mend).get("attributes", {})
    if attributes.get("format") != FORMAT:
        raise UserError(f"{path} is not a token store; {mend}")
    if attributes.get("format_version") != FORMAT_VERSION:
        found = attributes.get("format_version")
        raise UserError(f"{path} has format {found}, this wmcache reads {FORMAT_VERSION}; extract it again")
    require_identity(attributes, path / "zarr.json", "extract it again")
    return dict(attributes)


def require_identity(values: Mapping[str, Any], where: Path, mend: str) -> None:
    """Refuse, as a UserError, what has no identity and card of a store: a store's attributes, or a run's `identity.json`."""
    if not isinstance(values.get("identity"), dict) or not isinstance(values.get("card"), dict):
        raise UserError(f"{where} has lost the store's identity or card; {mend}")


def read_card(attributes: Mapping[str, Any]) -> StoreCard:
    """The card in a store's attributes."""
    card = attributes["card"]
    try:
        return StoreCard(**{**card, "token_grid": tuple(card["token_grid"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"the store's card is damaged ({error}); extract it again") from error


def _read_column(path: Path, name: str) -> NDArray[Any]:
    """A column of the step table; zarr alone would read a lost chunk as zeros."""
    try:
        array = zarr.open_array(path / name, mode="r")
        if array.nchunks_initialized == array.nchunks:
            return np.asarray(array)
        reason = "a chunk is missing"
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
    raise UserError(f"{path / name} cannot be read ({reason}); extract the store again")


def _create_arrays(path: Path, card: StoreCard, identity: Identity, steps: Mapping[str, NDArray[Any]]) -> None:
    group = zarr.create_group(path, zarr_format=3)
    group.attrs.put(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": False,
            "identity": identity.to_json(),
            "card": asdict(card),
            "versions": _versions(),
        }
    )
    frame = (card.tokens_per_frame, card.token_dim)
    group.create_array(
        "tokens",
        shape=(card.frames, *frame),
        chunks=(1, *frame),
        shards=(card.frames_per_shard, *frame),
        dtype="float16",
        compressors=Crc32cCodec(),
        # A chunk equal to the fill value is not written, and a missing one reads as it: NaN is never written, and never mistaken.
        fill_value=float("nan"),
    )
    for name in STEP_COLUMNS:
        group.create_array(name, data=np.ascontiguousarray(steps[name]), config={"write_empty_chunks": True})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
