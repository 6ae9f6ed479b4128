"""A store on disk: where everything lies, what its records say, and how one tells that something is wrong with them.

    zarr.json                       attributes: identity, card, checksums of the columns, completeness, mean and std; sealed.
                                    Also consolidated metadata: copies of the arrays' own, for other readers (xarray); not read here
    tokens/c.S.0.0                  shard S: the tokens of the frames of tar S, one inner chunk a frame, crc32c on each
    tokens/commits/                 which shards are done: frames, bytes, sha256, sums; see records.py
    action state episode step       the step table again, so that a store is all that training needs
    sha256                          complete stores: of each shard's file
    scale                           int8 stores: what a step of each channel is worth in each shard, and its middle

A sealed JSON object holds a checksum of itself, so nothing in a store can change a digit without being seen.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import Field
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from wmcache.cache.identity import FORMAT_VERSION, RESTORE, Identity
from wmcache.common.errors import MissingError, UnreadableError, UserError
from wmcache.common.files import did_you_mean, json_digest, read_json, require_seal, seal, sha256_of, write_json
from wmcache.common.paths import AnyPath, cause_outside, exists, files_in, read_bytes, unreadable, zarr_store
from wmcache.common.schema import Count, Finite, Name, Size, parse

FORMAT = "wmcache-token-store"
STEP_COLUMNS = ("action", "state", "episode", "step")
SHARD_COLUMNS = ("sha256", "scale")
"""With a row for each shard instead of each frame."""
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "tokens": ("frame", "token", "channel"),
    "action": ("frame", "action_dim"),
    "state": ("frame", "state_dim"),
    "episode": ("frame",),
    "step": ("frame",),
    "sha256": ("shard", "byte"),
    "scale": ("shard", "scale_and_middle", "channel"),
}
"""Names of the arrays' dimensions, for xarray; stores made before 2026-10 have none."""
ROWS_IN_A_CHUNK = 2**20
SMALL = 2**22
"""Rows of a column that is read whenever a store is opened, so that damage is said before any work; a longer one is when it is wanted."""
RECORDED_PACKAGES = ("torch", "timm", "transformers", "numpy", "zarr", "pillow")
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MAX_COLUMN_WIDTH = 4096
MOST_SHARDS = 2**26
"""Of a store; what is said to have more is damaged, and would take more memory than there is before anybody noticed."""

FILL: dict[str, float] = {"float16": float("nan"), "int8": -128}
"""Store dtypes, each with a value that no token has: a lost chunk reads as it, and is never mistaken for data."""

AGAIN = "run its wmcache extract again"
NEW = "make a store with: wmcache extract"


class DamagedError(UserError):
    """The store's own description cannot be relied on; an extraction with the same settings writes it anew."""


@dataclass(frozen=True)
class StoreCard:
    """What a store is, beside its identity; nothing here changes a number in it.

    Attributes:
        encoder: how to make the same encoder again: name, weights, options.
        dataset: what the frames show: name, path, environment, maze, image size, fps.
        token_grid: rows and columns of the patch tokens; (1, 1) for a single token.
        token_dim: D.
        frames, frames_per_shard: counts.
        dtype: what tokens are stored in, `float16` or `int8`.
    """

    encoder: dict[str, Any]
    dataset: dict[str, Any]
    token_grid: tuple[Size, Size]
    token_dim: Size
    frames: Count
    frames_per_shard: Count
    dtype: Annotated[str, Field(pattern="^(float16|int8)$")] = "float16"

    @property
    def tokens_per_frame(self) -> int:
        """N."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def frame_shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.tokens_per_frame, self.token_dim

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame's tokens, checksum aside."""
        return self.tokens_per_frame * self.token_dim * np.dtype(self.dtype).itemsize

    @property
    def num_shards(self) -> int:
        """Shards of `frames_per_shard` frames; the last may be short."""
        return -(-self.frames // self.frames_per_shard)

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens, checksums aside."""
        return self.frames * self.frame_bytes

    def shard_frames(self, shard: int) -> range:
        """The frames of a shard."""
        return range(shard * self.frames_per_shard, min(self.frames, (shard + 1) * self.frames_per_shard))

    def shard_bytes(self, shard: int) -> int:
        """The size of a shard's file: chunks with a checksum each, then the index of all places, then its checksum."""
        chunks = len(self.shard_frames(shard)) * (self.frame_bytes + CRC_BYTES)
        return chunks + self.frames_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES


def shard_file(path: AnyPath, shard: int) -> AnyPath:
    """Where Zarr keeps a shard of the tokens."""
    return path / "tokens" / f"c.{shard}.0.0"


def shard_sizes(path: AnyPath, shards: int) -> tuple[NDArray[np.int64], dict[int, str]]:
    """What is there of a store's shards, from one listing.

    Returns:
        Bytes of each shard's file, int64 [shards], -1 where there is none; and shard -> tag, where an object store has one.

    Raises:
        OSError: it cannot be listed.
    """
    sizes, tags = np.full(shards, -1, np.int64), {}
    for name, found in files_in(path / "tokens", "c."):
        number = name.split(".")[1]
        if number.isdecimal() and name == f"c.{int(number)}.0.0" and int(number) < shards:
            sizes[int(number)] = found.bytes
            if found.tag:
                tags[int(number)] = found.tag
    return sizes, tags


def read_attributes(path: AnyPath) -> dict[str, Any]:
    """The attributes of the store at `path`.

    Raises:
        DamagedError: they are missing or are not what was written.
        UserError: there is nothing, or no store, or one of another format.
    """
    try:
        is_ours = has_commits(path)
        if not is_ours and not exists(path):
            raise MissingError(f"{path} does not exist; {did_you_mean(path, 'store', NEW)}")
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        metadata = read_json(path / "zarr.json", AGAIN if is_ours else NEW)
    except UnreadableError:
        raise
    except UserError as error:
        raise (DamagedError(str(error)) if is_ours else error) from error
    attributes = metadata.get("attributes")
    if is_ours and not (isinstance(attributes, dict) and attributes.get("format") == FORMAT):
        raise DamagedError(f"{path / 'zarr.json'} has lost its attributes; {AGAIN}")
    attributes = check_attributes(attributes if isinstance(attributes, dict) else {}, path)
    if (metadata.get("node_type"), metadata.get("zarr_format")) != ("group", 3):
        raise DamagedError(f"{path / 'zarr.json'} is no longer that of a group; {AGAIN}")
    # A store made before it had copies of the arrays' metadata may have been given some by zarr.
    if attributes.get("consolidated") not in (None, json_digest(metadata.get("consolidated_metadata"))):
        raise DamagedError(f"the consolidated metadata in {path / 'zarr.json'} differ from their checksum; {AGAIN}")
    return attributes


def damaged(what: str, where: AnyPath, error: Exception) -> UserError:
    """The error of a part of a store that reading has failed with: damaged, unless the system could not read it.

    Args:
        what: says what is wrong, where.
        where: the file or folder that was read.
        error: what came of reading it.
    """
    if outside := cause_outside(error):
        return unreadable(where, outside)
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return DamagedError(f"{what} ({reason}); {AGAIN}")


def has_commits(path: AnyPath) -> bool:
    """Whether a folder is, or once was, a token store, whatever its description says now; raises OSError."""
    return exists(path / "tokens" / "commits") if isinstance(path, Path) else exists(path / "tokens" / "zarr.json")


def open_group(path: AnyPath) -> zarr.Group:
    """The group at `path`; raises DamagedError where zarr cannot open it."""
    try:
        return zarr.open_group(zarr_store(path), mode="r", use_consolidated=False)
    except Exception as error:  # (whatever zarr makes of a description that is not its own)
        raise damaged(f"{path / 'zarr.json'} cannot be read", path, error) from error


def check_attributes(attributes: dict[str, Any], path: AnyPath) -> dict[str, Any]:
    """The attributes, if they are a store's and whole; raises UserError as `read_attributes` does."""
    file = path / "zarr.json"
    if attributes.get("format") != FORMAT:
        raise UserError(f"{path} is not a token store; {NEW}")
    try:
        require_seal(attributes, file, AGAIN)
        require_identity(attributes, file, AGAIN)
    except UserError as error:
        raise DamagedError(str(error)) from error
    if (found := attributes.get("format_version")) != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {str(found)[:20]}, this wmcache reads {FORMAT_VERSION}; extract into another --out"
        )
    try:
        parse(StoreCard, attributes["card"], f"the card in {file}", AGAIN)
        _require_sense(parse(_Attributes, attributes, file, AGAIN, exact=False))
    except (UserError, ValueError) as error:
        raise DamagedError(str(error) if isinstance(error, UserError) else f"{file}: {error}; {AGAIN}") from error
    return attributes


@dataclass(frozen=True)
class _Attributes:
    """What `zarr.json` must say of a store; read by `parse`."""

    complete: bool
    identity: dict[str, Any]
    card: StoreCard
    columns: dict[Name, str]
    layout: str
    versions: dict[str, str]
    mean: list[Finite] | None = None
    std: list[Finite] | None = None
    consolidated: str | None = None


def _require_sense(attributes: _Attributes) -> None:
    """Raise ValueError where parts of the attributes contradict each other."""
    card, columns = attributes.card, set(attributes.columns)
    if not {*STEP_COLUMNS} <= columns <= {*STEP_COLUMNS, *SHARD_COLUMNS}:
        raise ValueError(f"its columns are {', '.join(sorted(columns))[:80]}")
    if card.num_shards > MOST_SHARDS:
        raise ValueError(f"it has {card.num_shards} shards")
    if attributes.complete:
        lengths = {len(values or ()) for values in (attributes.mean, attributes.std)}
        if lengths != {card.token_dim} or "sha256" not in columns:
            raise ValueError("its statistics or the checksums of its shards are not all there")
        if (card.dtype == "int8") != ("scale" in columns):
            raise ValueError(f"its columns do not fit {card.dtype}")


def write_attributes(path: AnyPath, attributes: Mapping[str, Any]) -> None:
    """Replace the attributes of the group at `path`, sealed, and its copies of the arrays' metadata, in one rename."""
    metadata = read_json(path / "zarr.json", AGAIN)
    arrays = {name: read_json(path / name / "zarr.json", AGAIN) for name in sorted(("tokens", *attributes["columns"]))}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": arrays}
    known = {name: value for name, value in attributes.items() if name != "checksum"}
    known["consolidated"] = json_digest(consolidated)
    write_json(path / "zarr.json", {**metadata, "consolidated_metadata": consolidated, "attributes": seal(known)})


def require_identity(values: Mapping[str, Any], where: AnyPath, hint: str) -> None:
    """Refuse, as a UserError, what has no identity and card of a store: a store's attributes, or a run's `identity.json`."""
    if not isinstance(values.get("identity"), dict) or not isinstance(values.get("card"), dict):
        raise UserError(f"{where} has lost the store's identity or card; {hint}")


def read_card(attributes: Mapping[str, Any]) -> StoreCard:
    """The card in a store's attributes; raises UserError where its values are no card's."""
    return parse(StoreCard, attributes.get("card"), "the store's card", RESTORE)


def create_arrays(path: Path, card: StoreCard, identity: Identity, steps: Mapping[str, NDArray[Any]]) -> None:
    """Write a store without tokens: the group, the arrays' descriptions and the step table."""
    zarr.create_group(path, zarr_format=3)
    group = zarr.open_group(path, mode="r+")
    group.create_array(
        "tokens",
        shape=(card.frames, *card.frame_shape),
        chunks=(1, *card.frame_shape),
        shards=(card.frames_per_shard, *card.frame_shape),
        dtype=card.dtype,
        compressors=Crc32cCodec(),
        # One file a shard, instead of one and two folders.
        chunk_key_encoding={"name": "default", "separator": "."},
        fill_value=FILL[card.dtype],
        config={"write_empty_chunks": True},
        dimension_names=DIMENSIONS["tokens"],
        attributes={"coordinates": "episode step"},  # what xarray takes for coordinates (CF conventions)
    )
    for name in STEP_COLUMNS:
        create_column(path, name, steps[name])
    (path / "tokens" / "commits").mkdir()
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "identity": identity.to_json(),
        "card": asdict(card),
        "columns": {name: column_sha256(steps[name]) for name in STEP_COLUMNS},
        "layout": sha256_of(path / "tokens" / "zarr.json"),
        "versions": _versions(),
    }
    write_attributes(path, attributes)


def create_column(path: AnyPath, name: str, values: NDArray[Any]) -> None:
    """Write a column, over what may be there, a chunk at a time."""
    group = zarr.open_group(zarr_store(path), mode="r+", use_consolidated=False)
    # zarr skips chunks that equal its fill value, and an all-zero column would look like a lost one.
    column = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(min(len(values), ROWS_IN_A_CHUNK), *values.shape[1:]),
        config={"write_empty_chunks": True},
        dimension_names=DIMENSIONS[name],
        overwrite=True,
    )
    for start in range(0, len(values), ROWS_IN_A_CHUNK):
        column[start : start + ROWS_IN_A_CHUNK] = values[start : start + ROWS_IN_A_CHUNK]


def has_column(path: AnyPath, name: str, sha256: str) -> bool:
    """Whether a column is there with just these values, and names of its dimensions."""
    try:
        group = zarr.open_group(zarr_store(path), mode="r", use_consolidated=False)
        column = _array(group, name)
        names = getattr(column.metadata, "dimension_names", None)
        return names == DIMENSIONS[name] and column_sha256(column) == sha256
    except Exception:  # noqa: BLE001 (whatever zarr makes of what is not there, or is broken)
        return False


def read_column(
    group: zarr.Group, card: StoreCard, name: str, columns: Mapping[str, Any], where: AnyPath
) -> NDArray[Any]:
    """A column, compared with its checksum in `columns`; zarr alone would read a lost chunk as zeros.

    Raises:
        DamagedError: it is missing, or is not what was written.
    """
    with _relying_on(where, name):
        values = np.asarray(_column(group, card, name))
        _require(column_sha256(values) == columns.get(name), "it differs from its checksum")
    return values


def check_columns(
    group: zarr.Group, card: StoreCard, columns: Mapping[str, Any], where: AnyPath, *, thoroughly: bool = False
) -> None:
    """Raise DamagedError unless all columns are there as they were written; long ones are read for that only if told so."""
    if missing := set(STEP_COLUMNS) - set(columns):
        raise DamagedError(f"{where} lists no {', '.join(sorted(missing))}; {AGAIN}")
    for name, expected in columns.items():
        with _relying_on(where, name):
            column = _column(group, card, name)
            if thoroughly or column.shape[0] <= SMALL:
                _require(column_sha256(column) == expected, "it differs from its checksum")


def _column(group: zarr.Group, card: StoreCard, name: str) -> zarr.Array[Any]:
    array = _array(group, name)
    rows = card.num_shards if name in SHARD_COLUMNS else card.frames
    width = array.size // max(1, array.shape[0])
    # Before anything is allocated: the description may be anybody's.
    _require(array.shape[0] == rows, f"it has {array.shape[0]} rows for {rows}")
    _require(width <= MAX_COLUMN_WIDTH or name == "scale", f"it has {width} values a row")
    _require(array.nchunks == array.nchunks_initialized, "a chunk is missing")
    return array


@contextmanager
def _relying_on(where: AnyPath, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise damaged(f"{where}/{name} cannot be relied on", where / name, error) from error


def column_sha256(values: NDArray[Any] | zarr.Array[Any]) -> str:
    """Over type, shape and values."""
    digest = hashlib.sha256(f"{values.dtype.str}{values.shape}".encode())
    for start in range(0, values.shape[0], ROWS_IN_A_CHUNK):
        digest.update(np.ascontiguousarray(values[start : start + ROWS_IN_A_CHUNK]).tobytes())
    return digest.hexdigest()


def open_tokens(group: zarr.Group, card: StoreCard, attributes: Mapping[str, Any], where: AnyPath) -> zarr.Array[Any]:
    """The array of tokens; raises DamagedError where its description is not what was written, or does not fit the card."""
    try:
        # By its bytes: another codec in it could make other numbers of the same shards.
        digest = hashlib.sha256(read_bytes(where / "tokens" / "zarr.json")).hexdigest()
        _require(digest == attributes.get("layout"), "it differs from its checksum")
        tokens = _array(group, "tokens")
        _require(tokens.shape == (card.frames, *card.frame_shape), f"its shape is {tokens.shape}")
        if "sha256" in attributes["columns"]:
            rows = _array(group, "sha256").shape[0]
            _require(rows == card.num_shards, f"there are checksums of {rows} shards for {card.num_shards}")
        _require(tokens.dtype == card.dtype, f"its type is {tokens.dtype}")
        fill = np.asarray(FILL[card.dtype], card.dtype)
        _require(
            np.array_equal(tokens.fill_value, fill, equal_nan=card.dtype == "float16"), "its fill value is another"
        )
    except Exception as error:
        file = where / "tokens" / "zarr.json"
        raise damaged(f"{file} does not fit the store", file, error) from error
    return tokens


def is_mappable(tokens: zarr.Array[Any], card: StoreCard) -> bool:
    """Whether frames lie in the files as they lie in memory: no compression, one frame a chunk, the index at the end."""
    codecs = tokens.metadata.codecs if tokens.metadata.zarr_format == 3 else ()
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return False
    sharding = codecs[0]
    plain, summed = sharding.codecs if len(sharding.codecs) == 2 else (None, None)
    return (
        tokens.chunks == (1, *card.frame_shape)
        and tokens.shards == (card.frames_per_shard, *card.frame_shape)
        and _is_little(plain)
        and isinstance(summed, Crc32cCodec)
        and getattr(sharding.index_location, "value", sharding.index_location) == "end"  # an enum up to zarr 3.2
        and len(sharding.index_codecs) == 2
        and _is_little(sharding.index_codecs[0])
        and isinstance(sharding.index_codecs[1], Crc32cCodec)
        and tokens.metadata.encode_chunk_key((1, 0, 0)) == "c.1.0.0"
    )


def adopt_layout(path: Path) -> None:
    """Accept what has been made of a store's tokens with zarr, compressed, say; `TokenStore` reads it through the zarr API then.

    Whoever calls this vouches for the numbers: `wmcache verify` knows the shards only as they were extracted.
    """
    attributes = read_attributes(path)
    write_attributes(path, {**attributes, "layout": sha256_of(path / "tokens" / "zarr.json")})


def _is_little(codec: object) -> bool:
    return isinstance(codec, BytesCodec) and getattr(codec.endian, "value", codec.endian) in (None, "little")


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    member = group[name]
    if not isinstance(member, zarr.Array):
        raise TypeError("it is no array")
    return member


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
