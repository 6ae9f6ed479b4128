"""Validating JSON from outside: every value is checked before it is used."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath

T = TypeVar("T")

Count = Annotated[int, Field(gt=0, lt=2**40)]
"""Frames, shards, bytes: more than a disk can store is refused."""
Size = Annotated[int, Field(gt=0, le=2**16)]
"""Tokens, channels, pixels of a single frame."""
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^/\x00-\x1f]+$")]
"""A name that may become part of a path."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


def parse(
    kind: Callable[..., T],
    value: object,
    where: AnyPath | str,
    hint: str,
    *,
    exact: bool = True,
    fault: str = "is damaged",
) -> T:
    """Return plain JSON values as an instance of a dataclass, without conversions.

    Raises:
        UserError: `value` is not of that kind, or with `exact` has unknown fields: `{where} {fault} (…); {hint}`.
    """
    if exact and isinstance(value, dict) and (unknown := set(value) - {field.name for field in fields(kind)}):  # type: ignore[arg-type]
        raise UserError(f"{where} {fault} (unknown fields: {', '.join(sorted(unknown))[:80]!r}); {hint}")
    try:
        parsed: T = adapter_of(kind).validate_json(json.dumps(value), strict=True)
    except RecursionError as error:
        raise UserError(f"{where} {fault} (nested too deeply); {hint}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        found = f"{'.'.join(map(str, first['loc']))[:80]!r}: {first['msg'][:120]}"
        raise UserError(f"{where} {fault} ({found}); {hint}") from error
    return parsed


@functools.cache
def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator of a type."""
    return TypeAdapter(kind)
