"""Writing a store: whole shards, each followed by its record; complete only when its attributes say so."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from wmcache.cache.identity import Identity
from wmcache.cache.layout import (
    SHARD_COLUMNS,
    STEP_COLUMNS,
    DamagedError,
    StoreCard,
    check_columns,
    column_sha256,
    create_arrays,
    create_column,
    has_column,
    open_group,
    open_tokens,
    read_attributes,
    read_card,
    shard_file,
    shard_sizes,
    write_attributes,
)
from wmcache.cache.quantise import quantise
from wmcache.cache.records import Record, Records, commits, lock_file
from wmcache.common.errors import MissingError, UnreadableError, UserError
from wmcache.common.files import atomic_write, exclusive, not_written, sha256_of, sweep, sync, temporary_for
from wmcache.common.paths import (
    MISSING,
    AnyPath,
    exists,
    is_local,
    put,
    read_bytes,
    remove,
    require_name,
    size_of,
    top_names,
    unreadable,
    upload,
)

BLOCK = 16
"""Frames converted at once, so that no shard is ever held in a wider type as a whole."""

Tokens = NDArray[np.float16]


class LackingError(UserError):
    """A store that was to be finished lacks shards, or holds some that two writers have mixed up."""


class StoreWriter:
    """Writes a store. Writers in several processes work beside each other: whoever claims a shard does it, the others wait or pass on.

    An object store has no locks, so no claims: two writers may do a shard twice there, and `finish` finds it where that has mixed them up.
    """

    def __init__(self, path: AnyPath, card: StoreCard, identity: Identity) -> None:
        """Use `StoreWriter.create` or `StoreWriter.resume`."""
        self.path, self.card, self.identity = path, card, identity
        self._records = Records(path, card, identity)
        self._layout = read_bytes(path / "tokens" / "zarr.json")

    @classmethod
    def create(
        cls, path: AnyPath, card: StoreCard, identity: Identity, steps: Mapping[str, NDArray[Any]]
    ) -> StoreWriter:
        """Start a store, or take up again the one with the same identity, repair its description where that is damaged.

        Args:
            path: the group's place, ending in `.zarr`.
            card: what it is.
            identity: what could change a number in it.
            steps: the step table: action [frames, 2], state [frames, 4], episode [frames], step [frames].

        Raises:
            UserError: a store of another identity is there, naming the fields that differ; or the folder is not a store.
        """
        require_name(path)
        if (there := cls._take_up(path, card, identity)) is not None:
            return there
        with exclusive(path.with_name(f".{path.name}.lock"), path):
            with _writing(path):
                described = exists(path / "zarr.json")
            if (there := cls._take_up(path, card, identity)) is not None:  # somebody else was faster
                return there
            with _writing(path), _skeleton(path) as skeleton:
                create_arrays(skeleton, card, identity, steps)
                _replace_description(path, skeleton, damaged=described)
        return cls(path, card, identity)

    @classmethod
    def _take_up(cls, path: AnyPath, card: StoreCard, identity: Identity) -> StoreWriter | None:
        """The store of this identity that is there; None where there is nothing, or one whose description has to be repaired."""
        with _writing(path):
            if isinstance(path, Path):
                if not path.exists():
                    return None
            elif not exists(path / "zarr.json"):
                # Of a creator that died there may be parts; a store is deleted with all that is below it.
                if strange := top_names(path) - {"tokens", *STEP_COLUMNS, *SHARD_COLUMNS}:
                    raise UserError(
                        f"{path} is not a token store, and has {sorted(strange)[0]!r} in it; choose another --out"
                    )
                return None
        try:
            there = cls.resume(path, identity)
        except DamagedError:
            _require_ours(path, card, identity)
            return None
        shapes = {(it.frames, it.frames_per_shard, it.token_grid, it.token_dim, it.dtype) for it in (there.card, card)}
        return there if len(shapes) == 1 else None

    @classmethod
    def resume(cls, path: AnyPath, identity: Identity) -> StoreWriter:
        """Take up the store at `path`.

        Raises:
            DamagedError: its description cannot be relied on; `create` writes it anew.
            UserError: it is missing, not a store, or of another identity, naming the fields that differ.
        """
        attributes = read_attributes(path)
        if different := Identity.from_json(attributes["identity"], str(path)).differences(identity):
            raise UserError(f"{path} was extracted with other settings ({'; '.join(different)}); choose another --out")
        card, group = read_card(attributes), open_group(path)
        open_tokens(group, card, attributes, path)
        check_columns(group, card, attributes["columns"], path)
        return cls(path, card, identity)

    def pending(self) -> list[int]:
        """The shards that are not done: without a sound record, or without a file of the right size."""
        with _writing(self.path):
            sizes, _ = shard_sizes(self.path, self.card.num_shards)
            recorded = self._records.recorded()
        missing: list[int] = np.flatnonzero((recorded < 0) | (recorded != sizes)).tolist()
        return missing

    def is_done(self, shard: int) -> bool:
        """Whether a shard has its record and its file; raises UserError where they cannot be read."""
        file = shard_file(self.path, shard)
        try:
            return size_of(file) == self._records.read(shard).bytes
        except UnreadableError:
            raise
        except UserError:
            return False
        except OSError as error:
            if error.errno in MISSING:
                return False
            raise unreadable(file, error) from error

    def claimed(self) -> set[int]:
        """The shards that somebody is at just now."""
        return {shard for shard in self._records.claimed() if self.is_claimed(shard)}

    def is_claimed(self, shard: int) -> bool:
        """Whether somebody is at it just now."""
        with self.claim(shard) as ours:
            return not ours

    @contextmanager
    def claim(self, shard: int, *, wait: bool = False) -> Iterator[bool]:
        """Hold a shard against all other writers; the operating system ends the claim of a process that dies.

        Args:
            shard: its number.
            wait: for whoever holds it now.

        Yields:
            Whether it is ours.

        Raises:
            UserError: the store cannot be written.
        """
        with exclusive(lock_file(self.path, shard), self.path, wait=wait) as held:
            yield held

    def _description(self) -> AbstractContextManager[bool]:
        """Hold the attributes and columns against all other writers."""
        return exclusive(commits(self.path) / "description.lock", self.path)

    def write_shard(self, shard: int, tokens: Tokens) -> None:
        """Write a whole shard, then its record.

        Args:
            shard: its number.
            tokens: float16 [frames of the shard, N, D].

        Raises:
            UserError: a value is not finite (or overflowed float16), naming the frame; or the disk is full.
        """
        frames = self.card.shard_frames(shard)
        expected = (len(frames), *self.card.frame_shape)
        if tokens.shape != expected or tokens.dtype != np.float16:
            raise ValueError(f"shard {shard} takes float16 {expected}, not {tokens.dtype} {tokens.shape}")
        total, squares = channel_sums(tokens)
        if not np.isfinite(squares).all():  # one value that is not finite makes its channel's sum so
            frame = frames[int(np.argmin(np.isfinite(tokens).all(axis=(1, 2))))]
            raise UserError(
                f"the encoder gave a value that float16 cannot hold for frame {frame}; check its weights, or try --dtype float32"
            )
        stored, scale, middle = quantise(tokens) if self.card.dtype == "int8" else (tokens, None, None)
        with _writing(self.path):
            if not is_local(self.path) and self.is_done(shard):
                return  # by somebody who, without locks, was at it as well
            # Whatever stands here without a claim is torn, outdated, or a dead writer's.
            self._records.drop(shard)
            for folder in (self.path / "tokens", commits(self.path)):
                if isinstance(folder, Path):
                    sweep(folder)
            data, place, tag = self._encode(shard, stored), shard_file(self.path, shard), None
            if isinstance(place, Path):
                with atomic_write(place) as file:
                    file.write(data)
            else:
                tag = put(place, data)
            self._record(
                shard, len(data), hashlib.sha256(data).hexdigest(), total, squares, scale=scale, middle=middle, tag=tag
            )

    def _encode(self, shard: int, stored: NDArray[Any]) -> bytes:
        """A shard's file, as zarr writes it."""
        files = {"zarr.json": default_buffer_prototype().buffer.from_bytes(self._layout)}
        frames = self.card.shard_frames(shard)
        zarr.open_array(MemoryStore(files), mode="r+")[frames.start : frames.stop] = stored
        return files[shard_file(self.path, shard).name].to_bytes()

    def record(self, shard: int, tokens: Tokens) -> None:
        """Write the record of a float16 shard that has lost it; `tokens` are those that its file holds."""
        file = shard_file(self.path, shard)
        with _writing(self.path):
            self._record(shard, size_of(file), sha256_of(file), *channel_sums(tokens))

    def _record(
        self,
        shard: int,
        size: int,
        sha256: str,
        total: NDArray[np.float64],
        squares: NDArray[np.float64],
        *,
        scale: NDArray[np.float32] | None = None,
        middle: NDArray[np.float32] | None = None,
        tag: str | None = None,
    ) -> None:
        frames = self.card.shard_frames(shard)
        record = Record(
            frames=(frames.start, frames.stop),
            bytes=size,
            sha256=sha256,
            identity=self.identity.digest(),
            sum=total.tolist(),
            sum_of_squares=squares.tolist(),
            scale=None if scale is None else scale.tolist(),
            middle=None if middle is None else middle.tolist(),
            tag=tag,
        )
        self._records.write(shard, record)

    def finish(self) -> None:
        """Compute the statistics and declare the store complete; a complete store is left alone.

        Raises:
            LackingError: a shard has no record, or two writers have done it at once and left a mixture.
            UserError: the disk is full.
        """
        again = "run the same wmcache extract again"
        if missing := self.pending():
            first = ", ".join(map(str, missing[:5])) + ", …" * (len(missing) > 5)
            raise LackingError(f"{self.path} lacks {len(missing)} of {self.card.num_shards} shards ({first}); {again}")
        if read_attributes(self.path)["complete"]:
            return
        with self._description(), _writing(self.path):
            attributes = read_attributes(self.path)
            if attributes["complete"]:  # somebody else was faster
                return
            _, tags = shard_sizes(self.path, self.card.num_shards)
            total, squares = np.zeros(self.card.token_dim), np.zeros(self.card.token_dim)
            sha256, scales = [], []
            for block in self._records.thousands():
                for shard, tag in zip(block.shard.tolist() if tags else (), block.tag, strict=False):
                    if tag.any() and tags.get(shard) not in (None, tag.tobytes().hex()):
                        self._records.drop(shard)
                        raise LackingError(f"shard {shard} of {self.path} was written by two at once; {again}")
                total += block.sum.sum(0)
                squares += block.sum_of_squares.sum(0)
                sha256.append(block.sha256)
                scales.append(np.stack([block.scale, block.middle], 1))
            count = self.card.frames * self.card.tokens_per_frame
            mean = total / count
            std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
            columns = {"sha256": np.concatenate(sha256)}
            if self.card.dtype == "int8":
                columns["scale"] = np.concatenate(scales)
            known = dict(attributes["columns"])
            for name, values in columns.items():
                known[name] = column_sha256(values)
                if not has_column(
                    self.path, name, known[name]
                ):  # of whoever finishes it at the same time, without locks
                    create_column(self.path, name, values)
            complete = {"columns": known, "mean": mean.tolist(), "std": std.tolist(), "complete": True}
            try:
                write_attributes(self.path, {**attributes, **complete})
            except MissingError as error:  # without locks, another process that finishes it replaces a column
                raise LackingError(f"{error}") from error

    def reopen(self, shards: list[int]) -> None:
        """Declare the store incomplete, then drop these shards; whoever reads the store meanwhile is told that it changed."""
        if read_attributes(self.path)["complete"]:
            with self._description(), _writing(self.path):
                attributes = read_attributes(self.path)
                # Without the columns that `finish` writes: whoever dies there leaves them half written.
                columns = {name: attributes["columns"][name] for name in STEP_COLUMNS}
                write_attributes(self.path, {**attributes, "columns": columns, "complete": False})
        for shard in shards:
            with self.claim(shard, wait=True), _writing(self.path):
                self._records.drop(shard)
                remove(shard_file(self.path, shard))


@contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    """Errors of the disk, and of files inside a store that no user has heard of, as one line about the store."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error
    except UnreadableError:
        raise
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise not_written(path, error.__cause__) from error
        raise


@contextmanager
def _skeleton(path: AnyPath) -> Iterator[Path]:
    """A folder for a store without tokens, beside its place where that can be renamed; gone at the end."""
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="wmcache-") as folder:
            yield Path(folder) / path.name
        return
    sweep(path.parent)
    skeleton = temporary_for(path)
    shutil.rmtree(skeleton, ignore_errors=True)  # of a dead process that had our number
    try:
        yield skeleton
    finally:
        shutil.rmtree(skeleton, ignore_errors=True)


def channel_sums(tokens: Tokens) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and sum of squares of each channel, float64 [D]."""
    total, squares = np.zeros(tokens.shape[-1]), np.zeros(tokens.shape[-1])
    for start in range(0, len(tokens), BLOCK):
        rows = tokens[start : start + BLOCK].reshape(-1, tokens.shape[-1]).astype(np.float64)
        total += rows.sum(0)
        squares += np.einsum("nd,nd->d", rows, rows)
    return total, squares


def _require_ours(path: AnyPath, card: StoreCard, identity: Identity) -> None:
    """Raise UserError unless a shard's record, or what is left of the attributes, says that the damaged store has this identity."""
    try:
        attributes = read_attributes(path)
    except DamagedError as error:
        with _writing(path):
            if (Records(path, card, identity).recorded() >= 0).any():
                return
        raise UserError(f"{path} is damaged, and no record in it is of these settings; choose another --out") from error
    if different := Identity.from_json(attributes["identity"], str(path)).differences(identity):
        raise UserError(f"{path} was extracted with other settings ({'; '.join(different)}); choose another --out")


def _replace_description(path: AnyPath, skeleton: Path, *, damaged: bool) -> None:
    """Move a store without tokens into place: as the new store, or over the description of the one that is there."""
    if not isinstance(path, Path):
        # Where there was none, there may be one by now, of somebody who was faster.
        if damaged:
            remove(path / "zarr.json")
        upload(skeleton, path, last="zarr.json")
        return
    if not path.exists():
        skeleton.rename(path)
        sync(path.parent)
        return
    for name in STEP_COLUMNS:
        shutil.rmtree(path / name, ignore_errors=True)
        (skeleton / name).rename(path / name)
    (path / "tokens").mkdir(exist_ok=True)
    for name in ("tokens/zarr.json", "zarr.json"):  # last the one without which there is no store
        (skeleton / name).replace(path / name)
    sync(path)
