"""Encoders and stores as a user names them: their paths, how other processes open them, and how stores are declared complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmcache.cache.identity import Identity
from wmcache.cache.joined import SEPARATOR
from wmcache.cache.layout import StoreCard, read_attributes, read_card
from wmcache.cache.store import TokenStore
from wmcache.cache.writer import StoreWriter
from wmcache.common.columns import is_default
from wmcache.common.errors import UserError, command
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.common.reading import reading
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.weights import read_metadata
from wmcache.pipeline.frames import DatasetCard, FrameDataset


def default_weights(dataset: str, encoder: str) -> Path:
    """`$WMCACHE_HOME/encoders/<dataset>-<encoder>.safetensors`."""
    return home() / "encoders" / f"{dataset}-{encoder}.safetensors"


def default_store(dataset: str, encoder: Encoder, dtype: str = "float16") -> Path:
    """`$WMCACHE_HOME/stores/<dataset>/<encoder>-<image size>.zarr`, or `-<image size>-int8.zarr`."""
    suffix = "" if dtype == "float16" else f"-{dtype}"
    return home() / "stores" / dataset / f"{encoder.spec.name}-{encoder.image_size}{suffix}.zarr"


def fitted_weights(dataset: str, fingerprint: str, encoder: str) -> Path | None:
    """Return the default weights of an encoder if they exist; raises UserError if they were fitted on other frames."""
    if not (path := default_weights(dataset, encoder)).exists():
        return None
    with reading(path, f"{path} cannot be read", "restore it, or pass --weights"):
        fitted_on = read_metadata(path).get("dataset")
    if fitted_on and fingerprint not in fitted_on.split(SEPARATOR):
        raise UserError(
            f"{path} was fitted on other frames than those of dataset {dataset}; pass --weights {path} to use it, or "
            "fit to another --out and pass that"
        )
    return path


def create_encoders(
    card: DatasetCard,
    *,
    encoder: str,
    weights: Sequence[str] = (),
    device: str = "auto",
    base_weights: Path | None = None,
    **options: Any,
) -> list[Encoder]:
    """Create encoders, with weights fitted on the dataset where there are such; other arguments and errors as of `encoders.create`.

    Args:
        encoder: names of encoders, separated by commas.
        weights: `PATH` for all encoders that are not fitted, `NAME=PATH` for one.
    """
    wanted = [name.strip() for name in encoder.split(",")]
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--encoder {encoder} has a name twice; name each once")
    files: dict[str, Path] = {}  # by name; the path for all encoders has none
    for word in weights:
        name, _, path = word.partition("=")
        name, path = (name, path) if name in wanted and path else ("", word)
        if name in files:
            raise UserError(f"--weights {word} is the second for {name or 'all encoders'}; write --weights NAME=PATH")
        files[name] = Path(path)
    paths: dict[str, Path | None] = {}
    for name in wanted:
        own = encoders.get_entry(encoders.family_of(name))  # a fitted family's layers have its weights
        of_all = files.get("") if len(wanted) == 1 or own.fit is None else None
        paths[name] = files.get(name) or of_all or fitted_weights(card.name, card.fingerprint, own.spec.name)
    if "" in files and files[""] not in paths.values():
        raise UserError(f"--weights {files['']} fits none of {', '.join(wanted)}; write --weights NAME={files['']}")
    bases = {name: base_weights for name in wanted if encoders.get_entry(name).load is None}  # of adapters
    if base_weights is not None and not bases:
        raise UserError(f"--base-weights {base_weights}: {', '.join(wanted)} has no base encoder; leave it out")
    return [
        encoders.create(name, weights=path, base_weights=bases.get(name), device=device, **options)
        for name, path in paths.items()
    ]


def store_card(dataset: FrameDataset, encoder: Encoder, dtype: str) -> StoreCard:
    """Describe the store of an encoder's tokens."""
    card = dataset.card
    copied = {name: getattr(card, name) for name in ("env", "maze", "image_size", "policy", "fps")}
    if not is_default(card.columns):  # stores of earlier versions stay as they are
        copied["seed"] = card.seed
    return StoreCard(
        encoder=encoder.recipe(),
        dataset={"name": card.name, "path": absolute(dataset.path), **copied},
        token_grid=encoder.token_grid,
        token_dim=encoder.token_dim,
        frames=card.frames,
        frames_per_shard=card.frames_per_shard,
        dtype=dtype,
        columns=None if is_default(card.columns) else card.columns,
        licence=encoder.spec.licence.strip("-"),
    )


def create_store(dataset: FrameDataset, encoder: Encoder, path: AnyPath, dtype: str = "float16") -> StoreWriter:
    """Create the store of an encoder's tokens, or resume it."""
    identity = encoder.identity(dataset.card.fingerprint, dtype)
    return StoreWriter.create(path, store_card(dataset, encoder, dtype), identity, dataset.steps.store_columns())


def open_frames(card: StoreCard, dataset: AnyPath | None) -> FrameDataset:
    """Open the frames of a store, at the path in its card or the given one; raises UserError if they are missing."""
    try:
        return FrameDataset.open(dataset or as_path(str(card.dataset.get("path")).replace("\0", "?")))
    except UserError as error:
        raise UserError(f"the store's frames are needed: {error}; or pass their path as --dataset") from error


def frames_of(store: TokenStore, dataset: AnyPath | None = None) -> FrameDataset:
    """Open the frames of a store as `open_frames` does; raises UserError if they are other ones."""
    frames = open_frames(store.card, dataset)
    require_frames(store, frames)
    return frames


def require_frames(store: TokenStore, frames: FrameDataset) -> None:
    """Raise a UserError unless a store was made of these frames."""
    if frames.card.fingerprint != store.identity.dataset_fingerprint:
        raise UserError(f"{frames.path} does not contain the frames of {store.path}; pass the right --dataset")


@dataclass(frozen=True)
class StoreRecipe:
    """What another process needs to open a store and to create its encoder."""

    encoder: dict[str, Any]
    """Arguments of `encoders.create`."""
    identity: Identity
    path: str

    def open(self, device: str) -> tuple[Encoder, StoreWriter]:
        """Create the encoder, and open the store; raises UserError if the encoder differs here, such as in its weights."""
        encoder = encoders.create(**self.encoder, device=device)
        here = encoder.identity(self.identity.dataset_fingerprint, self.identity.store_dtype)
        if different := "; ".join(self.identity.differences(here)):
            raise UserError(
                f"{encoder.spec.name} differs on this worker ({different}); install the same on all workers"
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
    """Declare a store complete that has all its shards; raises UserError if shards are missing."""
    identity = Identity.from_json(read_attributes(path)["identity"], str(path))
    writer = StoreWriter.resume(path, identity)
    if missing := writer.try_finish():
        first = ", ".join(map(str, missing[:5])) + ", …" * (len(missing) > 5)
        lacking = f"{len(missing)} of {writer.card.num_shards} shards ({first})"
        raise UserError(f"{path} lacks {lacking}; make them with: {command('wmcache', 'repair', path)}")
    return writer.card
