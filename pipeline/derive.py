"""Token store -> another store, equal to one extracted from the frames: run another head on its features, or make its change maps."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmcache.cache.change_maps import change_maps_path
from wmcache.cache.identity import Identity
from wmcache.cache.store import TokenStore
from wmcache.cache.writer import StoreWriter
from wmcache.cluster.tasks import WorkerTask, report, run_tasks
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, absolute, as_path, exists
from wmcache.common.space import require_space
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import Select
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.pipeline.extract import extract
from wmcache.pipeline.stores import StoreRecipe, fitted_weights, frames_of, has_work

PREPROCESSING = ("image_size", "resize", "normalisation", "compute_dtype", "store_dtype")


def create_for(
    source: TokenStore, name: str, *, weights: Path | None, base_weights: Path | None, device: str
) -> Encoder:
    """Create an encoder on the backbone of a store, with that store's preprocessing; raises UserError for another backbone.

    Without weights, it has the store's; an adapter those fitted on the store's dataset.
    """
    entry, base = encoders.get_entry(name), encoders.get_entry(str(source.card.encoder.get("name")))
    if base.load is None:
        raise UserError(f"{source.path} has tokens of the adapter {base.spec.name}; derive from a store of its base")
    if entry.load not in (None, base.load):
        raise UserError(f"{name} is not on {base.spec.name}, the backbone of {source.path}; extract it from the frames")
    if entry.load is None:
        dataset = str(source.card.dataset["name"])
        weights = weights or fitted_weights(dataset, source.identity.dataset_fingerprint, name)
        return encoders.create(name, weights=weights, base_weights=base_weights, device=device)
    recipe = {**source.card.encoder, "name": name}
    return encoders.create_again(recipe, weights=weights, base_weights=base_weights, device=device)


def derive(
    source: TokenStore,
    encoder: Encoder,
    out: AnyPath,
    *,
    dtype: str = "float16",
    batch: int = 256,
    cluster: str = "local:1",
    device: str | None = None,
) -> bool:
    """Make an encoder's store from another store's features; run again, it makes only missing shards.

    `source` has the layers or the patch tokens of the encoder's own backbone; other arguments are those of `extract_together`. Returns
    whether there was anything to do.
    """
    require_features(source, encoder)
    grid, dim = encoder.token_grid, encoder.token_dim
    made: dict[str, Any] = {
        "token_grid": grid,
        "token_dim": dim,
        "dtype": dtype,
        "licence": encoder.spec.licence.strip("-"),
    }
    card = replace(source.card, encoder=encoder.recipe(), **made)
    if not exists(out):
        require_space(out, card.token_bytes, f"the store of {card.frames} frames")
    identity = encoder.identity(source.identity.dataset_fingerprint, dtype)
    writer = StoreWriter.create(out, card, identity, source.step_columns())
    if not has_work(writer):
        return False
    pending = writer.pending()
    writer.reopen([])
    recipe = StoreRecipe(encoder.recipe(), identity, absolute(out))
    device, key = device or str(encoder.device), uuid.uuid4().hex
    task = DeriveShard(absolute(source.path), source.identity, recipe, device, batch, key)
    total = sum(len(card.shard_frames(shard)) for shard in pending)
    label = f"derive {encoder.spec.name}"
    run_tasks(task.with_state((source, encoder, writer)), pending, cluster=cluster, total=total, label=label)
    writer.finish()
    return True


@dataclass(frozen=True)
class DeriveShard(WorkerTask[int, tuple[TokenStore, Encoder, StoreWriter]]):
    """Make the tokens of a shard from the source's; attributes as of `ExtractShard`."""

    source: str
    source_identity: Identity
    store: StoreRecipe
    device: str
    batch: int
    key: str

    def setup(self) -> tuple[TokenStore, Encoder, StoreWriter]:
        """Open both stores, and load the encoder."""
        source = TokenStore.open(as_path(self.source))
        if source.identity != self.source_identity:
            raise UserError(f"{self.source} was replaced while it was being read; run the command again")
        return source, *self.store.open(self.device)

    def run(self, state: tuple[TokenStore, Encoder, StoreWriter], item: int) -> int:
        """Make a shard, unless it is done; returns its frames."""
        source, encoder, writer = state
        frames = writer.card.shard_frames(item)
        with writer.claim(item, wait=True):
            if not writer.is_done(item):
                select = require_features(source, encoder)
                tokens = np.empty((len(frames), *encoder.frame_shape), np.float16)
                for start in range(0, len(frames), self.batch):
                    part = source.gather(np.asarray(frames[start : start + self.batch]))
                    same = encoder.head.base_selection == select.selection
                    features = select.restore(torch.from_numpy(part).to(encoder.device), same=same)
                    tokens[start : start + len(part)] = encoder.tokens(features).cpu().numpy()
                    report(len(part))
                writer.write_shard(item, tokens)
        return len(frames)


def require_features(source: TokenStore, encoder: Encoder) -> Select:
    """Check that a store has the features that the encoder's head reads; returns how its tokens were selected."""
    mine, found = encoder.spec.name, source.identity
    wanted = encoder.identity(found.dataset_fingerprint)
    # The rest of the identity differs: it describes the head.
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in PREPROCESSING}
    pairs |= {
        "backbone": (found.weights_sha256, encoder.backbone_sha256),
        "lag": (source.card.encoder.get("lag", 0), encoder.lag),
    }
    if differing := [f"{name} {one} != {other}" for name, (one, other) in pairs.items() if one != other]:
        raise UserError(
            f"{mine} cannot be derived from {source.path} ({'; '.join(differing)}); extract it from the frames"
        )
    select = Select(encoder.backbone, encoders.get_spec(str(source.card.encoder.get("name"))).token_selection)
    if encoder.head.base_selection == select.selection:
        return select
    missing = [encoder.backbone.described[layer] for layer in encoder.head.layers if layer not in select.layers]
    if encoder.head.prefix and not select.prefix:
        missing.append("the class token")
    if missing or select.selection not in ("patch", "layers"):
        needed = f"{mine} is made of {', '.join(missing) or 'patches'}"
        raise UserError(
            f"{source.path} has only {select.selection} tokens, {needed}; extract it or the backbone's layers from the frames"
        )
    return select


def derive_change_maps(
    store: TokenStore, frameskip: int = 5, *, dataset: AnyPath | None = None, cluster: str = "local:1"
) -> AnyPath:
    """Make the change maps of a store of patch tokens, or the missing ones: what has changed since `frameskip` env steps before.

    Returns their path, see `open_change_maps`; raises UserError if the frames are missing or are others, or as `extract`.
    """
    frames, out = frames_of(store, dataset), change_maps_path(store.path, frameskip)
    maps = changes_for(store.card.token_grid, frameskip, device="cpu")
    extract(frames, maps, out, dtype=store.card.dtype, cluster=cluster)
    return out
