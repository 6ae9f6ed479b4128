"""JSON files: strict, atomic, and sealed with a checksum of their own."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from wmcache.common.errors import MissingError, UserError, reason
from wmcache.common.files import write_whole
from wmcache.common.folders import other_kind
from wmcache.common.paths import AnyPath, cause_outside, is_local, read_bytes, unreadable

MOST_JSON_BYTES = 64_000_000


def read_json(path: AnyPath, hint: str) -> dict[str, Any]:
    """Read a JSON object; errors end with `hint`.

    Raises:
        MissingError: the file does not exist.
        UnreadableError: the system cannot read it.
        UserError: it is not a JSON object.
    """
    try:
        # The size of an object costs another request.
        too_large = is_local(path) and path.stat().st_size > MOST_JSON_BYTES
        if too_large or len(data := read_bytes(path)) > MOST_JSON_BYTES:
            raise UserError(f"{path} has more than {MOST_JSON_BYTES} bytes; {hint}")
        value = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        if found := other_kind(path):
            raise UserError(f"{path.parent} is {found}; pass another path") from None
        raise MissingError(f"{path} does not exist; {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        if outside := cause_outside(error):
            raise unreadable(path, outside) from error
        raise UserError(f"{path} cannot be read ({reason(error)}); {hint}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; {hint}")
    return value


def write_json(path: AnyPath, value: Any) -> None:
    """Write indented JSON atomically; raise UserError where a number is not finite."""
    try:
        text = dump_json(value, indent=2)
    except UserError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    write_whole(path, (text + "\n").encode())


def dump_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return strict JSON; raise UserError with the key where a number is not finite."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError as error:
        if (found := _not_finite(value)) is None:
            raise
        raise UserError(f"{found} must be a finite number") from error


def nulls(value: Any) -> Any:
    """Return the JSON value with null for every number that is not finite; for results, never for settings."""
    if isinstance(value, dict):
        return {name: nulls(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object with a checksum of itself, so that `require_seal` detects any change."""
    return {**value, "checksum": json_digest(value)}


def require_seal(value: dict[str, Any], path: AnyPath, hint: str) -> dict[str, Any]:
    """Return an object that `seal` made; raise UserError with `path` where it was changed."""
    if value.get("checksum") != json_digest({name: item for name, item in value.items() if name != "checksum"}):
        raise UserError(f"{path} differs from its own checksum; {hint}")
    return value


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _not_finite(value: Any, name: str = "the value") -> str | None:
    """Return the key of the first number of a JSON value that is not finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    items = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list | tuple):
        items = [(name, item) for item in value]
    return next((found for key, item in items if (found := _not_finite(item, str(key)))), None)
