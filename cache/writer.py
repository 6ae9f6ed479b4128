"""Writing a store: complete shards, each followed by its record; the store is complete when its attributes say so."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from wmcache.cache.arrays import check_columns, create_arrays, open_group, open_tokens, write_column
from wmcache.cache.identity import Identity
from wmcache.cache.layout import (
    AGAIN,
    SHARD_COLUMNS,
    DamagedError,
    StoreCard,
    read_attributes,
    read_card,
    shard_file,
    shard_sizes,
    write_attributes,
)
from wmcache.cache.quantise import quantise
from wmcache.cache.readme import store_readme
from wmcache.cache.records import Record, Records, commits, lock_file
from wmcache.common.columns import default_columns
from wmcache.common.errors import MissingError, UnreadableError, UserError
from wmcache.common.files import not_written, sha256_of, sweep, sync, temporary_for, write_whole
from wmcache.common.locks import exclusive
from wmcache.common.paths import (
    MISSING,
    AnyPath,
    exists,
    is_local,
    names_in,
    read_bytes,
    remove,
    require_name,
    size_of,
    unreadable,
    upload,
)
from wmcache.common.readme import NAME as README
from wmcache.common.readme import write_readme

BLOCK = 16
"""Frames converted at once, so that no shard is copied to a wider type as a whole."""

Tokens = NDArray[np.float16]
Sums = NDArray[np.float64]


class LackingError(UserError):
    """A store that cannot be finished: shards are missing, or were written by two writers at once."""


class StoreWriter:
    """Writes a store. Writers in several processes share the work: one claims a shard, the others wait for it or skip it.

    An object store has no claims: there `finish` detects files and records of two writers that do not belong together.
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
        """Start a store with the columns of a step table, or resume that of this identity; write its metadata again where it is damaged.

        Raises:
            UserError: a store of another identity exists, naming the fields that differ; or the folder is not a store.
        """
        require_name(path)
        if (found := cls._existing(path, card, identity)) is not None:
            return found
        with exclusive(path.with_name(f".{path.name}.lock"), path):
            with _writing(path):
                described = exists(path / "zarr.json")
            if (found := cls._existing(path, card, identity)) is not None:  # another process was faster
                return found
            with _writing(path), _skeleton(path) as skeleton:
                create_arrays(skeleton, card, identity, steps)
                _replace_metadata(path, skeleton, card, described=described)
        return cls(path, card, identity)

    @classmethod
    def _existing(cls, path: AnyPath, card: StoreCard, identity: Identity) -> StoreWriter | None:
        # None where there is none, or where its metadata has to be written again.
        with _writing(path):
            if not exists(path if is_local(path) else path / "zarr.json"):
                names = set(names_in(path))
                # Objects appear one by one: a creator that died may have left some.
                if other := names - {"zarr.json", "tokens", README, *card.step_columns, *SHARD_COLUMNS}:
                    raise UserError(f"{path} is not a token store, it contains {min(other)!r}; choose another --out")
                if "zarr.json" not in names:  # else another process has just written it
                    return None
        try:
            found = cls.resume(path, identity)
        except DamagedError:
            _require_same_damaged(path, card, identity)
            return None
        shapes = {(it.frames, it.frames_per_shard, it.token_grid, it.token_dim, it.dtype) for it in (found.card, card)}
        return found if len(shapes) == 1 else None

    @classmethod
    def resume(cls, path: AnyPath, identity: Identity) -> StoreWriter:
        """Open the store at `path` to write what it lacks; raise DamagedError, or UserError as `create`."""
        attributes = read_attributes(path)
        _require_same(attributes, identity, path)
        card, group = read_card(attributes), open_group(path)
        open_tokens(group, card, attributes, path)
        check_columns(group, card, attributes["columns"], path)
        return cls(path, card, identity)

    def pending(self) -> list[int]:
        """Return the shards that are not done: without a sound record, or without a file of its size."""
        return self._list()[0]

    def _list(self) -> tuple[list[int], dict[int, str]]:
        with _writing(self.path):
            sizes, tags = shard_sizes(self.path, self.card.num_shards)
            recorded = self._records.recorded()
        missing: list[int] = np.flatnonzero((recorded < 0) | (recorded != sizes)).tolist()
        return missing, tags

    def is_done(self, shard: int) -> bool:
        """Return whether a shard has its record and its file; raise UserError where they cannot be read."""
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
        """Return the shards that a process works on now."""
        found = set()
        for shard in self._records.claimed():
            with self.claim(shard) as is_free:
                found |= set() if is_free else {shard}
        return found

    def claim(self, shard: int, *, wait: bool = False) -> AbstractContextManager[bool]:
        """Hold a shard against all other writers, if it is free or with `wait`; enter to learn whether it is held."""
        return exclusive(lock_file(self.path, shard), self.path, wait=wait)

    def write_shard(self, shard: int, tokens: Tokens) -> None:
        """Write a complete shard, float16 [frames of the shard, N, D], then its record.

        Raises:
            UserError: a value is not finite (or overflowed float16), naming the frame; or the disk is full.
        """
        frames = self.card.shard_frames(shard)
        expected = (len(frames), *self.card.frame_shape)
        if tokens.shape != expected or tokens.dtype != np.float16:
            raise ValueError(f"shard {shard} takes float16 {expected}, not {tokens.dtype} {tokens.shape}")
        total, squares = channel_sums(tokens)
        if not np.isfinite(squares).all():  # not finite if one value of the channel is not
            frame = frames[int(np.argmin(np.isfinite(tokens).all(axis=(1, 2))))]
            raise UserError(
                f"tokens are not finite in float16: frame {frame}; check the weights, or try --dtype float32"
            )
        stored, scale, middle = quantise(tokens) if self.card.dtype == "int8" else (tokens, None, None)
        with _writing(self.path):
            if not is_local(self.path) and self.is_done(shard):
                return  # by another writer, as there are no claims
            # An unclaimed file is torn, outdated, or left by a process that died.
            self._records.drop(shard)
            sweep(self.path / "tokens")
            sweep(commits(self.path))
            # The file as zarr writes it.
            files = {"zarr.json": default_buffer_prototype().buffer.from_bytes(self._layout)}
            zarr.open_array(MemoryStore(files), mode="r+")[frames.start : frames.stop] = stored
            data = files[shard_file(self.path, shard).name].to_bytes()
            tag = write_whole(shard_file(self.path, shard), data)
            record = self._record(shard, len(data), hashlib.sha256(data).hexdigest(), total, squares)
            if scale is not None and middle is not None:
                record = replace(record, scale=scale.tolist(), middle=middle.tolist())
            self._records.write(shard, replace(record, tag=tag))

    def record(self, shard: int, tokens: Tokens) -> None:
        """Write the record of a float16 shard that has lost it; `tokens` are those in its file."""
        file = shard_file(self.path, shard)
        with _writing(self.path):
            self._records.write(shard, self._record(shard, size_of(file), sha256_of(file), *channel_sums(tokens)))

    def _record(self, shard: int, size: int, sha256: str, total: Sums, squares: Sums) -> Record:
        frames = self.card.shard_frames(shard)
        identity = self.identity.digest()
        return Record((frames.start, frames.stop), size, sha256, identity, total.tolist(), squares.tolist())

    def finish(self) -> None:
        """Compute the statistics and declare the store complete; raise LackingError where shards are missing, or of two writers."""
        if missing := self.try_finish():
            first = ", ".join(map(str, missing[:5])) + ", …" * (len(missing) > 5)
            raise LackingError(f"{self.path} lacks {len(missing)} of {self.card.num_shards} shards ({first}); {AGAIN}")

    def try_finish(self) -> list[int]:
        """Finish the store unless shards are missing; return those. Raise as `finish`."""
        missing, tags = self._list()
        if missing or read_attributes(self.path)["complete"]:
            return missing
        with self._metadata_lock(), _writing(self.path):
            attributes = read_attributes(self.path)
            if attributes["complete"]:  # another process was faster
                return []
            columns, statistics = self._summarise(tags)
            checksums = {name: write_column(self.path, name, values) for name, values in columns.items()}
            known = {"columns": {**attributes["columns"], **checksums}, **statistics, "complete": True}
            self._write_readme()
            try:
                write_attributes(self.path, {**attributes, **known})
            except MissingError as error:  # without locks, another process that finishes it replaces a column
                raise LackingError(str(error)) from error
        return []

    def _write_readme(self) -> None:
        columns = self.card.columns
        if columns is None:
            group = open_group(self.path)
            action, state = (group[name] for name in ("action", "state"))
            assert isinstance(action, zarr.Array)
            assert isinstance(state, zarr.Array)
            columns = default_columns(action.shape[1], state.shape[1])
        write_readme(self.path, store_readme(self.card, self.identity, columns))

    def _summarise(self, tags: Mapping[int, str]) -> tuple[dict[str, NDArray[Any]], dict[str, list[float]]]:
        total, squares = np.zeros(self.card.token_dim), np.zeros(self.card.token_dim)
        sha256, scales = [], []
        for block in self._records.thousands():
            for shard, tag in zip(block.shard.tolist() if tags else (), block.tag, strict=False):
                if tag.any() and tags.get(shard) not in (None, tag.tobytes().hex()):
                    self._records.drop(shard)
                    raise LackingError(f"shard {shard} of {self.path} was written by two processes at once; {AGAIN}")
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
        return columns, {"mean": mean.tolist(), "std": std.tolist()}

    def reopen(self, shards: list[int]) -> None:
        """Declare the store incomplete, then delete these shards; a process that reads it meanwhile gets an error."""
        if read_attributes(self.path)["complete"]:
            with self._metadata_lock(), _writing(self.path):
                attributes = read_attributes(self.path)
                # Without the columns of `finish`, which may be left half written by a process that dies.
                columns = {name: attributes["columns"][name] for name in self.card.step_columns}
                write_attributes(self.path, {**attributes, "columns": columns, "complete": False})
        for shard in shards:
            with self.claim(shard, wait=True), _writing(self.path):
                self._records.drop(shard)
                remove(shard_file(self.path, shard))

    def _metadata_lock(self) -> AbstractContextManager[bool]:
        return exclusive(commits(self.path) / "description.lock", self.path)


@contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    """Turn errors of the disk about files inside a store into one line about the store."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, UnreadableError) or not isinstance(cause, OSError):
            raise
        raise not_written(path, cause) from error


def channel_sums(tokens: Tokens) -> tuple[Sums, Sums]:
    """Return sum and sum of squares of each channel, float64 [D]."""
    total, squares = np.zeros(tokens.shape[-1]), np.zeros(tokens.shape[-1])
    for start in range(0, len(tokens), BLOCK):
        rows = tokens[start : start + BLOCK].reshape(-1, tokens.shape[-1]).astype(np.float64)
        total += rows.sum(0)
        squares += np.einsum("nd,nd->d", rows, rows)
    return total, squares


def _require_same(attributes: Mapping[str, Any], identity: Identity, path: AnyPath) -> None:
    if different := Identity.from_json(attributes["identity"], str(path)).differences(identity):
        raise UserError(f"{path} was extracted with other settings ({'; '.join(different)}); choose another --out")


def _require_same_damaged(path: AnyPath, card: StoreCard, identity: Identity) -> None:
    """Raise UserError unless the attributes, or else a shard's record, show that a damaged store has this identity."""
    try:
        _require_same(read_attributes(path), identity, path)
    except DamagedError as error:
        with _writing(path):
            if (Records(path, card, identity).recorded() >= 0).any():
                return
        raise UserError(f"{path} is damaged, and no record in it is of these settings; choose another --out") from error


@contextmanager
def _skeleton(path: AnyPath) -> Iterator[Path]:
    """Yield a folder for a store without tokens, beside its path where that can be renamed; deleted at the end."""
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="wmcache-") as folder:
            yield Path(folder) / path.name
        return
    sweep(path.parent)
    skeleton = temporary_for(path)
    shutil.rmtree(skeleton, ignore_errors=True)  # of a dead process that had this number
    try:
        yield skeleton
    finally:
        shutil.rmtree(skeleton, ignore_errors=True)


def _replace_metadata(path: AnyPath, skeleton: Path, card: StoreCard, *, described: bool) -> None:
    """Move a store without tokens to its path: as a new store, or over the metadata of the one that exists."""
    if not is_local(path):
        if described:
            remove(path / "zarr.json")
        upload(skeleton, path, last="zarr.json")  # keeps one that another process has uploaded meanwhile
    elif not path.exists():
        skeleton.rename(path)
        sync(path.parent)
    else:
        for name in card.step_columns:
            shutil.rmtree(path / name, ignore_errors=True)
            (skeleton / name).rename(path / name)
        (path / "tokens").mkdir(exist_ok=True)
        for name in ("tokens/zarr.json", "zarr.json"):  # last the one without which there is no store
            (skeleton / name).replace(path / name)
        sync(path)
