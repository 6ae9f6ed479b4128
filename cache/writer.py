"""Writing a store: whole shards, each followed by its record; complete only when its attributes say so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from wmcache.cache.errors import UserError, command
from wmcache.cache.files import exclusive, sha256_of, sweep, sync, temporary_for
from wmcache.cache.identity import Identity
from wmcache.cache.layout import (
    STEP_COLUMNS,
    DamagedError,
    Record,
    StoreCard,
    column_sha256,
    create_arrays,
    create_column,
    lock_file,
    open_group,
    open_tokens,
    read_attributes,
    read_card,
    read_columns,
    read_record,
    record_file,
    shard_file,
    write_attributes,
)
from wmcache.cache.quantise import quantise

BLOCK = 16
"""Frames converted at once, so that no shard is ever held in a wider type as a whole."""

Tokens = NDArray[np.float16]


class StoreWriter:
    """Writes a store. Writers in several processes work beside each other: whoever claims a shard does it, the others wait or pass on."""

    def __init__(self, path: Path, card: StoreCard, identity: Identity) -> None:
        """Use `StoreWriter.create` or `StoreWriter.resume`."""
        self.path, self.card, self.identity = path, card, identity
        self._tokens = zarr.open_array(path / "tokens", mode="r+")

    @classmethod
    def create(cls, path: Path, card: StoreCard, identity: Identity, steps: Mapping[str, NDArray[Any]]) -> StoreWriter:
        """Start a store, or take up again the one with the same identity, mending its description where that is damaged.

        Args:
            path: the group's folder, ending in `.zarr`.
            card: what it is.
            identity: what could change a number in it.
            steps: the step table: action [frames, 2], state [frames, 4], episode [frames], step [frames].

        Raises:
            UserError: a store of another identity is there, naming the fields that differ; or the folder is not a store.
        """
        if (there := cls._take_up(path, card, identity)) is not None:
            return there
        with exclusive(path.with_name(f".{path.name}.lock"), path):
            if (there := cls._take_up(path, card, identity)) is not None:  # somebody else was faster
                return there
            sweep(path.parent)
            skeleton = temporary_for(path)
            shutil.rmtree(skeleton, ignore_errors=True)  # of a dead process that had our number
            try:
                with _writing(path):
                    create_arrays(skeleton, card, identity, steps)
                    _replace_description(path, skeleton)
            finally:
                shutil.rmtree(skeleton, ignore_errors=True)
        return cls(path, card, identity)

    @classmethod
    def _take_up(cls, path: Path, card: StoreCard, identity: Identity) -> StoreWriter | None:
        """The store of this identity that is there; None where there is nothing, or one whose description has to be mended."""
        if not path.exists():
            return None
        try:
            return cls.resume(path, identity)
        except DamagedError:
            _require_ours(path, card, identity)
            return None

    @classmethod
    def resume(cls, path: Path, identity: Identity) -> StoreWriter:
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
        read_columns(group, card, attributes["columns"], path)
        return cls(path, card, identity)

    def pending(self) -> list[int]:
        """The shards that are not done: without a sound record, or without a file of the right size."""
        return [shard for shard in range(self.card.num_shards) if not self.is_done(shard)]

    def is_done(self, shard: int) -> bool:
        """Whether a shard has its record and its file."""
        try:
            record = read_record(self.path, shard, self.card, self.identity)
            return shard_file(self.path, shard).stat().st_size == record.bytes
        except (UserError, OSError):
            return False

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
        return exclusive(record_file(self.path, 0).with_name("description.lock"), self.path)

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
        file, record = shard_file(self.path, shard), record_file(self.path, shard)
        with _writing(self.path):
            # Whatever stands here without a claim is torn, outdated, or a dead writer's; and the last shard reaches past the
            # array's end, so zarr would merge it with the old one.
            record.unlink(missing_ok=True)
            shutil.rmtree(file.parent, ignore_errors=True)
            sweep(record.parent)
            self._tokens[frames.start : frames.stop] = stored
            sync(file)
            sync(file.parent)
            self._record(shard, total, squares, scale, middle)

    def record(self, shard: int, tokens: Tokens) -> None:
        """Write the record of a float16 shard that has lost it; `tokens` are those that its file holds."""
        self._record(shard, *channel_sums(tokens), None, None)

    def _record(
        self,
        shard: int,
        total: NDArray[np.float64],
        squares: NDArray[np.float64],
        scale: NDArray[np.float32] | None,
        middle: NDArray[np.float32] | None,
    ) -> None:
        frames, file = self.card.shard_frames(shard), shard_file(self.path, shard)
        Record(
            frames=(frames.start, frames.stop),
            bytes=file.stat().st_size,
            sha256=sha256_of(file),
            identity=self.identity.digest(),
            sum=total.tolist(),
            sum_of_squares=squares.tolist(),
            scale=None if scale is None else scale.tolist(),
            middle=None if middle is None else middle.tolist(),
        ).write(self.path, shard)

    def finish(self) -> None:
        """Compute the statistics and declare the store complete; a complete store is left alone.

        Raises:
            UserError: a shard has no record; or the disk is full.
        """
        if missing := self.pending():
            raise UserError(
                f"{self.path} lacks {len(missing)} of {self.card.num_shards} shards; run the same wmcache extract again"
            )
        if read_attributes(self.path)["complete"]:
            return
        with self._description(), _writing(self.path):
            attributes = read_attributes(self.path)
            records = [read_record(self.path, shard, self.card, self.identity) for shard in range(self.card.num_shards)]
            count = self.card.frames * self.card.tokens_per_frame
            mean = np.sum([record.sum for record in records], axis=0) / count
            square = np.sum([record.sum_of_squares for record in records], axis=0) / count
            std = np.sqrt(np.maximum(square - mean**2, 0.0))
            columns = dict(attributes["columns"])
            if self.card.dtype == "int8":
                scale = np.array([[record.scale, record.middle] for record in records], np.float32)
                create_column(self.path, "scale", scale)
                columns["scale"] = column_sha256(scale)
            complete = {
                "columns": columns,
                "shards": [record.sha256 for record in records],
                "mean": mean.tolist(),
                "std": std.tolist(),
                "complete": True,
            }
            write_attributes(self.path, {**attributes, **complete})

    def reopen(self, shards: list[int]) -> None:
        """Declare the store incomplete, then drop these shards; whoever reads the store meanwhile is told that it changed."""
        if read_attributes(self.path)["complete"]:
            with self._description(), _writing(self.path):
                write_attributes(self.path, {**read_attributes(self.path), "complete": False})
        for shard in shards:
            with self.claim(shard, wait=True):
                record_file(self.path, shard).unlink(missing_ok=True)
                shutil.rmtree(shard_file(self.path, shard).parent, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the disk, and of files inside a store that no user has heard of, as one line about the store."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free space, then run the same command again") from error
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            reason = error.__cause__.strerror or error.__cause__
            raise UserError(f"cannot write {path}: {reason}; free space, then run the same command again") from error
        raise


def channel_sums(tokens: Tokens) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and sum of squares of each channel, float64 [D]."""
    total, squares = np.zeros(tokens.shape[-1]), np.zeros(tokens.shape[-1])
    for start in range(0, len(tokens), BLOCK):
        rows = tokens[start : start + BLOCK].reshape(-1, tokens.shape[-1]).astype(np.float64)
        total += rows.sum(0)
        squares += np.einsum("nd,nd->d", rows, rows)
    return total, squares


def _require_ours(path: Path, card: StoreCard, identity: Identity) -> None:
    """Raise UserError unless a shard's record, or what is left of the attributes, says that the damaged store has this identity."""
    try:
        attributes = read_attributes(path)
    except DamagedError as error:
        for shard in range(card.num_shards):
            if record_file(path, shard).exists():
                try:
                    read_record(path, shard, card, identity)
                except UserError:
                    continue
                return
        raise UserError(
            f"{path} is damaged, and no record in it is of these settings; delete it with: {command('wmcache', 'rm', path)}"
        ) from error
    if different := Identity.from_json(attributes["identity"], str(path)).differences(identity):
        raise UserError(f"{path} was extracted with other settings ({'; '.join(different)}); choose another --out")


def _replace_description(path: Path, skeleton: Path) -> None:
    """Move a store without tokens into place: as the new store, or over the description of the one that is there."""
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
