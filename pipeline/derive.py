"""Token store -> token store, without an image: whatever a head makes of features that are cached already.

From a store of a backbone's layers: its patch tokens, its class token, their mean, and adapters fitted on them. What comes out is what
extraction from the frames would have given, and has the same identity.
"""

from __future__ import annotations

import functools
import json
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wmcache.cache.store import TokenStore
from wmcache.cache.writer import StoreWriter
from wmcache.cluster.tasks import report, run_tasks
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath, absolute, as_path, exists
from wmcache.common.space import require_space
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import Select
from wmcache.pipeline.extract import Job, load_encoders, open_writer, remember_encoders
from wmcache.pipeline.fit import default_weights


def create_for(
    source: TokenStore, name: str, *, weights: Path | None, base_weights: Path | None, device: str
) -> Encoder:
    """An encoder on the backbone of a store, set up as that store's was.

    Args:
        source: the store.
        name: of the encoder.
        weights: of the encoder; None takes the store's, or for an adapter those fitted on the store's dataset.
        base_weights, device: as in `encoders.create`.

    Raises:
        UserError: it is on another backbone; or as `encoders.create`.
    """
    entry, there = encoders.get_entry(name), encoders.get_entry(str(source.card.encoder.get("name")))
    if there.load is None:
        raise UserError(f"{source.path} holds tokens of the adapter {there.spec.name}; derive from a store of its base")
    if entry.load not in (None, there.load):
        raise UserError(
            f"{name} is not on the backbone of {source.path}, which holds {there.spec.name}; extract it from the frames"
        )
    if entry.load is None:
        fitted = default_weights(str(source.card.dataset["name"]), name)
        return encoders.create(
            name, weights=weights or (fitted if fitted.exists() else None), base_weights=base_weights, device=device
        )
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
) -> None:
    """Make an encoder's store of the features that another store holds; run again, it does only the shards that are not there yet.

    Args:
        source: of the layers, or of the patch tokens, of the encoder's own backbone.
        encoder: whose head is run.
        out: the new store's folder.
        dtype: what tokens are stored in, `float16` or `int8`.
        batch: frames in each call of the head.
        cluster, device: as for `extract_together`.

    Raises:
        UserError: the source is of another backbone or preprocessing, or lacks what the head reads; or as `extract`.
    """
    require_features(source, encoder)
    card = replace(
        source.card,
        encoder=encoder.recipe(),
        token_grid=encoder.token_grid,
        token_dim=encoder.token_dim,
        dtype=dtype,
    )
    if not exists(out):
        require_space(out, card.token_bytes, f"the store of {card.frames} frames")
    steps = {name: getattr(source, name) for name in ("action", "state", "episode", "step")}
    identity = encoder.identity(source.identity.dataset_fingerprint, dtype)
    writer = StoreWriter.create(out, card, identity, steps)

    if pending := writer.pending():
        writer.reopen([])
        total = sum(len(card.shard_frames(shard)) for shard in pending)
        job = Job(json.dumps(encoder.recipe()), json.dumps(identity.to_json()), absolute(out), uuid.uuid4().hex)
        device = device or str(encoder.device)
        task = functools.partial(derive_shard, absolute(source.path), source.identity.digest(), job, device, batch)
        remember_encoders([encoder])
        run_tasks(task, pending, cluster=cluster, total=total, label=f"derive {encoder.spec.name}")
    writer.finish()


def derive_shard(source: str, identity: str, job: Job, device: str, batch: int, shard: int) -> int:
    """The task: make and write one shard, unless that is done; returns its frames.

    Raises:
        UserError: the source is not the one of that identity any more, or the shard could not be read or written.
    """
    writer = open_writer(job)
    frames = writer.card.shard_frames(shard)
    with writer.claim(shard, wait=True):
        if not writer.is_done(shard):
            store, (encoder,) = _open_source(source, identity, job.run), load_encoders([job], [job], device)
            select = require_features(store, encoder)
            tokens = np.empty((len(frames), *encoder.frame_shape), np.float16)
            for start in range(0, len(frames), batch):
                part = store.gather(np.arange(frames.start + start, min(frames.start + start + batch, frames.stop)))
                features = select.restore(torch.from_numpy(part).to(encoder.device))
                tokens[start : start + len(part)] = encoder.tokens(features).cpu().numpy()
                report(len(part))
            writer.write_shard(shard, tokens)
    return len(frames)


@functools.lru_cache(maxsize=1)
def _open_source(path: str, identity: str, run: str) -> TokenStore:  # noqa: ARG001 (a part of the cache's key)
    store = TokenStore.open(as_path(path))
    if store.identity.digest() != identity:
        raise UserError(f"{path} has become another store; run the same command again")
    return store


def require_features(source: TokenStore, encoder: Encoder) -> Select:
    """What the source's tokens were selected by.

    Raises:
        UserError: they are not what the encoder's head would read, were the encoder run on the frames.
    """
    name = str(source.card.encoder.get("name"))
    wanted, there = encoder.identity(source.identity.dataset_fingerprint), source.identity
    differing = [
        f"{field} {getattr(there, field)} != {getattr(wanted, field)}"
        for field in ("image_size", "resize", "normalisation", "compute_dtype", "store_dtype")
        if getattr(there, field) != getattr(wanted, field)
    ]
    if there.weights_sha256 != encoder.backbone_sha256:
        differing.insert(0, f"{name} from {there.weights_source} is not its backbone")
    if source.card.encoder.get("lag", 0) != encoder.lag:
        differing.append(f"lag {source.card.encoder.get('lag', 0)} != {encoder.lag}")
    if differing:
        raise UserError(
            f"{encoder.spec.name} cannot be derived from {source.path} ({'; '.join(differing)}); extract it from the frames"
        )
    select = Select(encoder.backbone, encoders.get_spec(name).token_selection)
    missing = [encoder.backbone.described[layer] for layer in encoder.head.layers if layer not in select.layers]
    if encoder.head.prefix and not select.prefix:
        missing.append("the class token")
    if missing or select.selection not in ("patch", "layers"):
        raise UserError(
            f"{source.path} holds {select.selection} tokens alone, but {encoder.spec.name} is made of {', '.join(missing) or 'patches'}; "
            f"extract the backbone's layers first, or {encoder.spec.name} from the frames"
        )
    return select
