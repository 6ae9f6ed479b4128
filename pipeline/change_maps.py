"""Change maps beside a token store: frame dataset -> what has changed from frame to frame, on the store's own grid."""

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
    """Make the change maps of a store; run again, it does what is missing.

    Args:
        store: of patch tokens.
        frameskip: env steps between the frames that are compared; what `wmtrain` has.
        dataset: where the frames are now, if not where they were.
        cluster: where, see `cluster.parse_cluster`.

    Returns:
        Their path, see `open_change_maps`.

    Raises:
        UserError: the frames are not to be had, or are others; the tokens are no square of patches; or as `extract`.
    """
    frames = open_frames(store.card, dataset)
    if frames.card.fingerprint != store.identity.dataset_fingerprint:
        raise UserError(f"{frames.path} does not hold the frames of {store.path}; pass the right --dataset")
    out = change_maps_path(store.path, frameskip)
    maps = changes_for(store.card.token_grid, frameskip, device="cpu")
    extract(frames, maps, out, dtype=store.card.dtype, cluster=cluster)
    return out
