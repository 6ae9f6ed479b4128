"""A store on disk: its card, its attributes, and where its files are.

    zarr.json                       attributes: identity, card, checksums of the columns, completeness, mean and std; sealed.
                                    Also consolidated metadata: copies of the arrays' own, for other readers (xarray); not read here
    tokens/c.S.0.0                  shard S: the tokens of the frames of tar S, one frame in an inner chunk, crc32c on each
    tokens/commits/                 which shards are done: frames, bytes, sha256, sums; see records.py
    episode step action state …     the step table again, so that a store is all that training needs; the card describes its columns
    README.md                       complete stores: a card of these facts, for readers and hubs; never read
    sha256                          complete stores: of each shard's file
    scale                           int8 stores: scale and middle of each channel in each shard

A sealed JSON object contains a checksum of itself, so any changed digit is detected.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from wmcache.cache.identity import FORMAT_VERSION, RESTORE
from wmcache.common.columns import Column, HasColumns
from wmcache.common.errors import MissingError, UnreadableError, UserError, reason
from wmcache.common.folders import did_you_mean
from wmcache.common.jsonfiles import json_digest, read_json, require_seal, seal, write_json
from wmcache.common.paths import AnyPath, cause_outside, exists, files_in, is_local, readable, unreadable
from wmcache.common.schema import Count, Finite, Name, Size, parse

FORMAT = "wmcache-token-store"
STEP_COLUMNS = ("action", "state", "episode", "step")
"""Of a store whose card describes no columns."""
SHARD_COLUMNS = ("sha256", "scale")
"""With a row for each shard instead of each frame."""
RECORDED_PACKAGES = ("torch", "timm", "transformers", "numpy", "zarr", "pillow")
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MOST_SHARDS = 2**26
"""More would take more memory than a machine has, before the store is known to be damaged."""
FILL: dict[str, float] = {"float16": float("nan"), "int8": -128}
"""Store dtype -> a value that no token has, so that a lost chunk is never mistaken for data."""

AGAIN = "run its wmcache extract again"
NEW = "make a store with: wmcache extract"


class DamagedError(UserError):
    """The store's metadata is damaged; an extraction with the same settings writes it again."""


@dataclass(frozen=True)
class StoreCard(HasColumns):
    """What a store is, beside its identity; nothing here changes a number in it.

    Attributes:
        encoder: how to build the same encoder again: name, weights, options.
        dataset: what the frames show: name, path, environment, layout (as `maze`), image size, fps.
        token_grid: rows and columns of the patch tokens; (1, 1) for a single token.
        columns: of the step table; None, and left out of the file, where they are the default (`default_columns`).
        licence: of the encoder's weights; empty where it is unknown.
    """

    encoder: dict[str, Any]
    dataset: dict[str, Any]
    token_grid: tuple[Size, Size]
    token_dim: Size
    frames: Count
    frames_per_shard: Count
    dtype: Annotated[str, Field(pattern="^(float16|int8)$")] = "float16"
    columns: dict[str, Column] | None = None
    licence: str = ""

    def to_json(self) -> dict[str, Any]:
        """See `HasColumns.to_json`; an unknown licence is left out."""
        values = super().to_json()
        return values if self.licence else {name: value for name, value in values.items() if name != "licence"}

    @property
    def layout(self) -> tuple[str, ...]:
        """Lines of text that describe the environment beyond its id, see `EnvSpec`."""
        return tuple(self.dataset.get("maze") or ())

    @property
    def step_columns(self) -> tuple[str, ...]:
        """Names of the arrays with a row for each frame, beside the tokens."""
        return STEP_COLUMNS if self.columns is None else (*sorted(self.columns), "episode", "step")

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
        """Bytes of a frame's tokens, without the checksum."""
        return self.tokens_per_frame * self.token_dim * np.dtype(self.dtype).itemsize

    @property
    def num_shards(self) -> int:
        """Shards of `frames_per_shard` frames; the last may be short."""
        return -(-self.frames // self.frames_per_shard)

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens, without checksums."""
        return self.frames * self.frame_bytes

    def shard_frames(self, shard: int) -> range:
        """Return the frames of a shard."""
        return range(shard * self.frames_per_shard, min(self.frames, (shard + 1) * self.frames_per_shard))

    def shard_bytes(self, shard: int) -> int:
        """Return the size of a shard's file: chunks with a checksum each, then the index with its checksum."""
        chunks = len(self.shard_frames(shard)) * (self.frame_bytes + CRC_BYTES)
        return chunks + self.frames_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES


def shard_file(path: AnyPath, shard: int) -> AnyPath:
    """Return where Zarr keeps a shard of the tokens."""
    return path / "tokens" / f"c.{shard}.0.0"


def shard_number(name: str, shards: int) -> int | None:
    """Return the shard that a file in `tokens/` contains; None for any other file."""
    number = name.removeprefix("c.").removesuffix(".0.0")
    is_shard = number.isdecimal() and name == f"c.{int(number)}.0.0" and int(number) < shards
    return int(number) if is_shard else None


def shard_sizes(path: AnyPath, shards: int) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Return the bytes of each shard's file, int64 [shards], -1 where there is none, and {shard: tag of an object store}; raise OSError."""
    sizes, tags = np.full(shards, -1, np.int64), {}
    for name, found in files_in(path / "tokens", "c."):
        if (shard := shard_number(name, shards)) is not None:
            sizes[shard] = found.bytes
            if found.tag:
                tags[shard] = found.tag
    return sizes, tags


def has_commits(path: AnyPath) -> bool:
    """Return whether a folder is, or was, a token store, even if its metadata is lost; raise OSError."""
    return exists(path / "tokens" / ("commits" if is_local(path) else "zarr.json"))


def read_attributes(path: AnyPath) -> dict[str, Any]:
    """Return the attributes of the store at `path`; raise DamagedError where they are damaged, UserError where there is no store."""
    file = path / "zarr.json"
    with readable(path):
        is_store = has_commits(path)
        if not is_store and not exists(path):
            raise MissingError(f"{path} does not exist; {did_you_mean(path, 'store', NEW)}")
    hint = AGAIN if is_store else NEW
    try:
        metadata = read_json(file, hint)
    except UnreadableError:
        raise
    except UserError as error:
        raise (DamagedError(str(error)) if is_store else error) from error
    attributes = metadata.get("attributes")
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise (DamagedError if is_store else UserError)(f"{file} has no attributes of a token store; {hint}")
    found = attributes.get("format_version")
    try:
        require_seal(attributes, file, AGAIN)
        if found == FORMAT_VERSION:
            read_card(attributes, file)
            parse(_Attributes, attributes, file, AGAIN, exact=False)
    except UserError as error:
        raise DamagedError(str(error)) from error
    if found != FORMAT_VERSION:
        raise UserError(f"{path} has format {found!s:.20}, not {FORMAT_VERSION}; extract into another --out")
    # Stores made before wmcache wrote consolidated metadata may have some from zarr.
    consolidated = attributes.get("consolidated") in (None, json_digest(metadata.get("consolidated_metadata")))
    if not consolidated or (metadata.get("node_type"), metadata.get("zarr_format")) != ("group", 3):
        raise DamagedError(f"{file} is damaged; {AGAIN}")
    return attributes


@dataclass(frozen=True)
class _Attributes:
    complete: bool
    identity: dict[str, Any]
    card: StoreCard
    columns: dict[Name, str]
    layout: str
    versions: dict[str, str]
    mean: list[Finite] | None = None
    std: list[Finite] | None = None
    consolidated: str | None = None

    def __post_init__(self) -> None:
        card, columns = self.card, set(self.columns)
        of_frames = {*card.step_columns}
        known = of_frames <= columns <= {*of_frames, *SHARD_COLUMNS} and card.num_shards <= MOST_SHARDS
        if known and self.complete:
            statistics = {len(values or ()) for values in (self.mean, self.std)} == {card.token_dim}
            known = statistics and "sha256" in columns and (card.dtype == "int8") == ("scale" in columns)
        if not known:
            raise ValueError("columns, statistics or the number of shards are not those of a store")


def write_attributes(path: AnyPath, attributes: Mapping[str, Any]) -> None:
    """Replace the attributes of a store, sealed, and its copies of the arrays' metadata, in one write."""
    metadata = read_json(path / "zarr.json", AGAIN)
    arrays = {name: read_json(path / name / "zarr.json", AGAIN) for name in sorted(("tokens", *attributes["columns"]))}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": arrays}
    known = {name: value for name, value in attributes.items() if name != "checksum"}
    known["consolidated"] = json_digest(consolidated)
    write_json(path / "zarr.json", {**metadata, "consolidated_metadata": consolidated, "attributes": seal(known)})


def read_card(attributes: Mapping[str, Any], where: AnyPath | str = "the store") -> StoreCard:
    """Return the card in a store's attributes; raise UserError, naming `where`, unless it is one."""
    return parse(StoreCard, attributes.get("card"), f"the card in {where}", RESTORE)


def damaged(what: str, where: AnyPath, error: Exception) -> UserError:
    """Return the error of a failed read: DamagedError with `what`, or UnreadableError if the system could not read `where`."""
    if outside := cause_outside(error):
        return unreadable(where, outside)
    return DamagedError(f"{what} ({reason(error)}); {AGAIN}")


def recorded_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute tokens."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
