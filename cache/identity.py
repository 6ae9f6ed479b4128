"""What makes two stores different."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from wmcache.common.schema import parse

FORMAT_VERSION = 2
RESTORE = "restore it from a copy, or run its wmcache extract again"


@dataclass(frozen=True)
class Identity:
    """Everything that could change a number in a store. Equal identities have equal tokens, up to the noise of the device.

    Attributes:
        weights_source: hub id, or `file`.
        weights_sha256: over names, shapes and bytes of the loaded parameters, and over what a folder's config changes in the arithmetic.
        layer: which features of the network, for example `norm`.
        token_selection: which of its tokens, for example `patch`.
        image_size: side of the square image that the network gets, in pixels.
        resize: filter and method from the frame to that size.
        normalisation: mean and standard deviation, of pixels in [0, 1].
        compute_dtype: of the network, for example `bfloat16`.
    """

    encoder: str
    weights_source: str
    weights_sha256: str
    layer: str
    token_selection: str
    image_size: int
    resize: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    compute_dtype: str
    store_dtype: str
    dataset_fingerprint: str
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, where: str) -> Identity:
        """Read what `to_json` returned; raise UserError, naming the file `where`, for other fields or values."""
        return parse(cls, value, f"the identity in {where}", RESTORE)

    def digest(self) -> str:
        """Return the SHA-256 of its JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Identity) -> list[str]:
        """Return `field: own != other` for each field that differs."""
        return [
            f"{field.name}: {getattr(self, field.name)} != {getattr(other, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
