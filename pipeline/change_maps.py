"""Makes the change maps of a token store from its frames: what has changed from frame to frame, on the store's grid."""

from __future__ import annotations

from wmcache.cache.change_maps import change_maps_path
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.pipeline.encoders.changes import changes_for
from wmcache.pipeline.extract import extract
from wmcache.pipeline.repair import open_frames


def derive_change_maps(
    store: TokenStore, frameskip: int = 5, *, dataset: AnyPath | None = None, cluster: str = "local:1"
) -> AnyPath:
    """Make the change maps of a store; run again, it makes the missing ones.

    Args:
        store: of patch tokens.
        frameskip: env steps between the frames that are compared, as of `wmtrain`.
        dataset: path of the frames, if they have moved.
        cluster: where tasks run, see `cluster.parse_cluster`.

    Returns:
        Their path, see `open_change_maps`.

    Raises:
        UserError: the frames are missing or are others, or the tokens are not a square of patches; see also `extract`.
    """
    frames = open_frames(store.card, dataset)
    if frames.card.fingerprint != store.identity.dataset_fingerprint:
        raise UserError(f"{frames.path} does not contain the frames of {store.path}; pass the right --dataset")
    out = change_maps_path(store.path, frameskip)
    maps = changes_for(store.card.token_grid, frameskip, device="cpu")
    extract(frames, maps, out, dtype=store.card.dtype, cluster=cluster)
    return out
