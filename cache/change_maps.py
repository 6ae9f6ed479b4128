"""Change maps beside a token store: for each frame and patch, which of 2 x 2 cells have changed since an earlier frame."""

from __future__ import annotations

from wmcache.cache.joined import JoinedStore, open_beside
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError, command
from wmcache.common.paths import AnyPath


def change_maps_path(store: AnyPath, frameskip: int) -> AnyPath:
    """Return the path of a store's change maps, of frames so many env steps apart."""
    return store.with_name(f"{store.stem}.changes-{frameskip}.zarr")


def open_change_maps(store: TokenStore, frameskip: int) -> TokenStore:
    """Open a store's change maps, [N, 4] cells a frame; raise UserError where they are missing, or of other frames or another grid."""
    if isinstance(store, JoinedStore):
        return JoinedStore([open_change_maps(part, frameskip) for part in store.parts])
    path = change_maps_path(store.path, frameskip)
    make = command("wmcache", "derive", "change-maps", store.path, "--frameskip", frameskip)
    maps = open_beside(store, path, "change maps", f"make them with: {make}")
    wanted = (store.identity.dataset_fingerprint, store.card.token_grid, "changes", frameskip)
    card, identity = maps.card, maps.identity
    if wanted != (identity.dataset_fingerprint, card.token_grid, identity.encoder, card.encoder.get("lag")):
        raise UserError(f"{path} has other frames or another grid than {store.path}; move it away, then: {make}")
    return maps
