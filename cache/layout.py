"""A store on disk: where everything lies, what its records say, and how one tells that something is wrong with them.

    zarr.json                       attributes: identity, card, checksums of the columns, completeness, mean and std; sealed
    tokens/c/S/0/0                  shard S: the tokens of the frames of tar S, one inner chunk a frame, crc32c on each
    tokens/commits/000012.json      the record of a shard: frames, bytes, sha256, sums; written after the shard itself; sealed
    tokens/commits/000012.lock      while somebody works on that shard
    action state episode step       the step table again, so that a store is all that training needs
    scale                           int8 stores: what a step of each channel is worth in each shard, and its middle

A sealed JSON object holds a checksum of itself, so nothing in a store can change a digit without being seen.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import fsspec
import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import Field
from wmcache.cache.errors import UserError, command
from wmcache.cache.files import read_json, require_seal, seal, sha256_of, write_json
from wmcache.cache.identity import FORMAT_VERSION, Identity
from wmcache.cache.schema import Count, Finite, Name, Size, parse
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

FORMAT = "wmcache-token-store"
STEP_COLUMNS = ("action", "state", "episode", "step")
RECORDED_PACKAGES = ("torch", "timm", "transformers", "numpy", "zarr", "pillow")
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MAX_COLUMN_WIDTH = 4096

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


def shard_file(path: Path, shard: int) -> Path:
    """Where Zarr keeps a shard of the tokens."""
    return path / "tokens" / "c" / str(shard) / "0" / "0"


def record_file(path: Path, shard: int) -> Path:
    """Where the record of a shard is."""
    return path / "tokens" / "commits" / f"{shard:06d}.json"


def lock_file(path: Path, shard: int) -> Path:
    """The lock of whoever works on a shard."""
    return record_file(path, shard).with_suffix(".lock")


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the store at `path`.

    Raises:
        DamagedError: they are missing or are not what was written.
        UserError: there is nothing, or no store, or one of another format.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; {NEW}")
    is_ours = has_commits(path)
    try:
        metadata = read_json(path / "zarr.json", AGAIN if is_ours else NEW)
    except UserError as error:
        raise (DamagedError(str(error)) if is_ours else error) from error
    attributes = metadata.get("attributes")
    if is_ours and not (isinstance(attributes, dict) and attributes.get("format") == FORMAT):
        raise DamagedError(f"{path / 'zarr.json'} has lost its attributes; {AGAIN}")
    attributes = check_attributes(attributes if isinstance(attributes, dict) else {}, path)
    if (metadata.get("node_type"), metadata.get("zarr_format")) != ("group", 3):
        raise DamagedError(f"{path / 'zarr.json'} is no longer that of a group; {AGAIN}")
    return attributes


def has_commits(path: Path) -> bool:
    """Whether a folder is, or once was, a token store, whatever its description says now."""
    return (path / "tokens" / "commits").is_dir()


def open_group(path: Path) -> zarr.Group:
    """The group at `path`; raises DamagedError where zarr cannot open it."""
    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:  # (whatever zarr makes of a description that is not its own)
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DamagedError(f"{path / 'zarr.json'} cannot be read ({reason}); {AGAIN}") from error


def check_attributes(attributes: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """The attributes, if they are a store's and whole; raises UserError as `read_attributes` does."""
    file = Path(path) / "zarr.json"
    if attributes.get("format") != FORMAT:
        raise UserError(f"{path} is not a token store; {NEW}")
    try:
        require_seal(attributes, file, AGAIN)
        require_identity(attributes, file, AGAIN)
    except UserError as error:
        raise DamagedError(str(error)) from error
    if (found := attributes.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path} has format {str(found)[:20]}, this wmcache reads {FORMAT_VERSION}; extract it again")
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
    shards: list[str] | None = None


def _require_sense(attributes: _Attributes) -> None:
    """Raise ValueError where parts of the attributes contradict each other."""
    card, columns = attributes.card, set(attributes.columns)
    if not {*STEP_COLUMNS} <= columns <= {*STEP_COLUMNS, "scale"}:
        raise ValueError(f"its columns are {', '.join(sorted(columns))[:80]}")
    if attributes.complete:
        lengths = {len(values or ()) for values in (attributes.mean, attributes.std)}
        if lengths != {card.token_dim} or len(attributes.shards or ()) != card.num_shards:
            raise ValueError("its statistics or the checksums of its shards are not all there")
        if (card.dtype == "int8") != ("scale" in columns):
            raise ValueError(f"its columns do not fit {card.dtype}")


def write_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Replace the attributes of the group at `path`, sealed, in one rename."""
    metadata = read_json(path / "zarr.json", AGAIN)
    known = {name: value for name, value in attributes.items() if name != "checksum"}
    write_json(path / "zarr.json", {**metadata, "attributes": seal(known)})


def require_identity(values: Mapping[str, Any], where: Path, mend: str) -> None:
    """Refuse, as a UserError, what has no identity and card of a store: a store's attributes, or a run's `identity.json`."""
    if not isinstance(values.get("identity"), dict) or not isinstance(values.get("card"), dict):
        raise UserError(f"{where} has lost the store's identity or card; {mend}")


def read_card(attributes: Mapping[str, Any]) -> StoreCard:
    """The card in a store's attributes; raises UserError where its values are no card's."""
    return parse(StoreCard, attributes.get("card"), "the store's card", "extract it again")


@dataclass(frozen=True)
class Record:
    """That a shard is done, written after the shard itself.

    Attributes:
        frames: the first, and the one after the last.
        bytes, sha256: of the shard's file.
        identity: digest of the identity that it was made with.
        sum, sum_of_squares: of each channel over the shard's tokens, for the statistics.
        scale, middle: int8 stores: token = scale * stored + middle, for each channel.
    """

    frames: tuple[int, int]
    bytes: Count
    sha256: str
    identity: str
    sum: list[Finite]
    sum_of_squares: list[Finite]
    scale: list[Finite] | None = None
    middle: list[Finite] | None = None

    def write(self, path: Path, shard: int) -> None:
        """Write it, whole or not at all."""
        write_json(record_file(path, shard), seal(asdict(self)))


def read_record(path: Path, shard: int, card: StoreCard, identity: Identity) -> Record:
    """The record of a shard.

    Raises:
        UserError: it is missing, damaged, or of another shard or identity.
    """
    file = record_file(path, shard)
    mend = f"mend it with: {command('wmcache', 'repair', path)}"
    values = require_seal(read_json(file, mend), file, mend)
    record = parse(Record, {name: value for name, value in values.items() if name != "checksum"}, file, mend)
    lists = [record.sum, record.sum_of_squares] + [record.scale or [], record.middle or []] * (card.dtype == "int8")
    if any(len(values) != card.token_dim for values in lists):
        raise UserError(f"{file} has statistics of another length; {mend}")
    frames = card.shard_frames(shard)
    if record.identity != identity.digest() or record.frames != (frames.start, frames.stop):
        raise UserError(f"{file} is the record of another shard or store; {mend}")
    return record


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
        fill_value=FILL[card.dtype],
        config={"write_empty_chunks": True},
    )
    for name in STEP_COLUMNS:
        create_column(path, name, np.asarray(steps[name]))
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


def create_column(path: Path, name: str, values: NDArray[Any]) -> None:
    """Write a small array in one chunk, over what may be there."""
    group = zarr.open_group(path, mode="r+")
    # zarr skips chunks that equal its fill value, and an all-zero column would look like a lost one.
    group.create_array(
        name,
        data=np.ascontiguousarray(values),
        chunks=values.shape,
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def read_columns(
    group: zarr.Group, card: StoreCard, columns: Mapping[str, Any], where: Path | str
) -> dict[str, NDArray[Any]]:
    """The small arrays, compared with their checksums; zarr alone would read a lost chunk as zeros.

    Raises:
        DamagedError: one is missing, or is not what was written.
    """
    found = {}
    for name, expected in columns.items():
        try:
            array = _array(group, name)
            rows = card.num_shards if name == "scale" else card.frames
            width = array.size // max(1, array.shape[0])
            # Before anything is allocated: the description may be anybody's.
            _require(array.shape[0] == rows, f"it has {array.shape[0]} rows for {rows}")
            _require(width <= MAX_COLUMN_WIDTH or name == "scale", f"it has {width} values a row")
            _require(array.nchunks == array.nchunks_initialized, "a chunk is missing")
            found[name] = np.asarray(array)
            _require(column_sha256(found[name]) == expected, "it differs from its checksum")
        except Exception as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise DamagedError(f"{where}/{name} cannot be relied on ({reason}); {AGAIN}") from error
    if missing := set(STEP_COLUMNS) - set(found):
        raise DamagedError(f"{where} lists no {', '.join(sorted(missing))}; {AGAIN}")
    return found


def column_sha256(values: NDArray[Any]) -> str:
    """Over type, shape and values."""
    digest = hashlib.sha256(f"{values.dtype.str}{values.shape}".encode())
    digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def open_tokens(
    group: zarr.Group, card: StoreCard, attributes: Mapping[str, Any], where: Path | str
) -> zarr.Array[Any]:
    """The array of tokens; raises DamagedError where its description is not what was written, or does not fit the card."""
    try:
        # By its bytes: another codec in it could make other numbers of the same shards.
        digest = hashlib.sha256(_read_bytes(where, "tokens/zarr.json")).hexdigest()
        _require(digest == attributes.get("layout"), "it differs from its checksum")
        tokens = _array(group, "tokens")
        _require(tokens.shape == (card.frames, *card.frame_shape), f"its shape is {tokens.shape}")
        _require(tokens.dtype == card.dtype, f"its type is {tokens.dtype}")
        fill = np.asarray(FILL[card.dtype], card.dtype)
        _require(
            np.array_equal(tokens.fill_value, fill, equal_nan=card.dtype == "float16"), "its fill value is another"
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DamagedError(f"{where}/tokens/zarr.json does not fit the store ({reason}); {AGAIN}") from error
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
        and tokens.metadata.encode_chunk_key((1, 0, 0)) == "c/1/0/0"
    )


def adopt_layout(path: Path) -> None:
    """Accept what has been made of a store's tokens with zarr, compressed, say; `TokenStore` reads it through the zarr API then.

    Whoever calls this vouches for the numbers: `wmcache verify` knows the shards only as they were extracted.
    """
    attributes = read_attributes(path)
    write_attributes(path, {**attributes, "layout": sha256_of(path / "tokens" / "zarr.json")})


def _read_bytes(where: Path | str, name: str) -> bytes:
    if isinstance(where, Path):
        return (where / name).read_bytes()
    with fsspec.open(f"{where}/{name}", "rb") as file:
        return bytes(file.read())


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
