"""Log-variances beside a token store whose tokens are means of Gaussians, so that training can draw latents without a frame."""

from __future__ import annotations

from dataclasses import replace

from wmcache.cache.joined import JoinedStore, open_beside
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath

MAKE = "make them with its wmcache extract, of an encoder that has log-variances (vae, beta-vae)"


def log_variances_path(store: AnyPath) -> AnyPath:
    """Return the path of a store's log-variances."""
    return store.with_name(f"{store.stem}.logvar.zarr")


def open_log_variances(store: TokenStore) -> TokenStore:
    """Open a store's log-variances, [N, D] a frame as its tokens; raise UserError where they are missing, or of another store."""
    if isinstance(store, JoinedStore):
        return JoinedStore([open_log_variances(part) for part in store.parts])
    path = log_variances_path(store.path)
    found = open_beside(store, path, "log-variances", MAKE)
    same = replace(found.identity, encoder=store.identity.encoder, layer=store.identity.layer)
    if different := store.identity.differences(same):
        raise UserError(
            f"{path} is of another store than {store.path} ({'; '.join(different)}); move it away, then {MAKE}"
        )
    return found
