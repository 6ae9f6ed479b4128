"""The contract between the side that writes tokens and the side that reads them. Imports nothing of ours."""

from wmcache.cache.errors import UserError
from wmcache.cache.identity import Identity
from wmcache.cache.store import StoreCard, StoreWriter, TokenStore
from wmcache.cache.windows import Windows

__all__ = ["Identity", "StoreCard", "StoreWriter", "TokenStore", "UserError", "Windows"]
