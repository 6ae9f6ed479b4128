"""Stores of a pipeline: their paths and cards, how other processes open them, and how they are declared complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard, read_attributes, read_card
from wmcache.cache.writer import StoreWriter
from wmcache.common.errors import UserError, command
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.frames import FrameDataset


def default_store(dataset: str, encoder: Encoder, dtype: str = "float16") -> Path:
    """Return `$WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr`, or `-<image size>-int8.zarr`."""
    suffix = "" if dtype == "float16" else f"-{dtype}"
    return home() / "stores" / dataset / f"{encoder.spec.name}-{encoder.image_size}{suffix}.zarr"


def store_card(dataset: FrameDataset, encoder: Encoder, dtype: str) -> StoreCard:
    """Describe the store of an encoder's tokens."""
    card = dataset.card
    return StoreCard(
        encoder=encoder.recipe(),
        dataset={
            "name": card.name,
            "path": absolute(dataset.path),
            "env": card.env,
            "maze": card.maze,
            "image_size": card.image_size,
            "policy": card.policy,
            "fps": card.fps,
        },
        token_grid=encoder.token_grid,
        token_dim=encoder.token_dim,
        frames=card.frames,
        frames_per_shard=card.frames_per_shard,
        dtype=dtype,
    )


def create_store(dataset: FrameDataset, encoder: Encoder, path: AnyPath, dtype: str = "float16") -> StoreWriter:
    """Create the store of an encoder's tokens, or resume it."""
    identity = encoder.identity(dataset.card.fingerprint, dtype)
    return StoreWriter.create(path, store_card(dataset, encoder, dtype), identity, dataset.steps.columns())


@dataclass(frozen=True)
class StoreRecipe:
    """What another process needs to open a store and to create its encoder.

    Attributes:
        encoder: arguments of `encoders.create`.
        path: absolute, since workers have other working directories.
    """

    encoder: dict[str, Any]
    identity: Identity
    path: str

    @classmethod
    def of(cls, encoder: Encoder, writer: StoreWriter) -> StoreRecipe:
        """Describe an open store."""
        return cls(encoder.recipe(), writer.identity, absolute(writer.path))

    def open(self, device: str) -> tuple[Encoder, StoreWriter]:
        """Create the encoder, and open the store.

        Raises:
            UserError: the encoder differs here, such as in its weights, or one of them cannot be opened.
        """
        encoder = encoders.create(**self.encoder, device=device)
        here = encoder.identity(self.identity.dataset_fingerprint, self.identity.store_dtype)
        if different := self.identity.differences(here):
            raise UserError(
                f"{encoder.spec.name} differs on this worker ({'; '.join(different)}); install the same files and packages on all workers"
            )
        return encoder, StoreWriter.resume(as_path(self.path), self.identity)


def is_complete(path: AnyPath) -> bool:
    """Return whether a store is complete and has all its shards."""
    try:
        attributes = read_attributes(path)
        identity = Identity.from_json(attributes["identity"], str(path))
        return not has_work(StoreWriter(path, read_card(attributes), identity))
    except (UserError, OSError):  # the extraction reports it
        return False


def has_work(writer: StoreWriter) -> bool:
    """Return whether a store lacks shards, or is not declared complete."""
    return bool(writer.pending()) or not read_attributes(writer.path)["complete"]


def finalize(path: AnyPath) -> StoreCard:
    """Declare a store complete that has all its shards.

    Raises:
        UserError: shards are missing, with the command that extracts them; or the store does not exist.
    """
    identity = Identity.from_json(read_attributes(path)["identity"], str(path))
    writer = StoreWriter.resume(path, identity)
    if missing := writer.try_finish():
        first = ", ".join(map(str, missing[:5])) + ", …" * (len(missing) > 5)
        raise UserError(
            f"{path} lacks {len(missing)} of {writer.card.num_shards} shards ({first}); make them with: {_extract_command(writer)}"
        )
    return writer.card


def _extract_command(writer: StoreWriter) -> str:
    recipe, name, dataset = writer.card.encoder, writer.card.encoder.get("name"), writer.card.dataset.get("path")
    if not name or not dataset:
        return "the wmcache extract that started it"
    words = ["wmcache", "extract", "--dataset", dataset, "--encoder", name]
    # An adapter has the preprocessing of its base.
    preprocessing = ("image_size", "normalisation", "filter", "lag") if encoders.get_entry(name).load else ()
    defaults = encoders.get_spec(name)
    for setting in ("weights", "base_weights", *preprocessing, "dtype"):
        if recipe.get(setting) not in (None, getattr(defaults, setting, None)):
            words += [f"--{setting.replace('_', '-')}", recipe[setting]]
    if writer.card.dtype != "float16":
        words += ["--store-dtype", writer.card.dtype]
    return command(*words, "--out", writer.path)
