"""Tar shards of frames, decoded from memory: nothing is unpacked, and no link is followed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wmcache.common.cpus import available_cpus
from wmcache.common.errors import UserError, reason
from wmcache.common.paths import AnyPath

DECODERS = min(8, available_cpus())
AGAIN = "restore it or collect again"

Frames = NDArray[np.uint8]


def largest_png(size: int) -> int:
    """Upper bound for the bytes of a frame: PNG hardly ever takes more than the pixels."""
    return 2 * size * size * 3 + 2**20


def encode_png(frame: Frames) -> bytes:
    """Encode losslessly; level 1 takes half the time of the default and a few percent more space."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes, size: int, where: str) -> Frames:
    """Decode a square RGB frame, after its declared size and mode were checked; `where` is for errors."""
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (size, size) or image.mode != "RGB":
            raise UserError(f"{where} is {image.size} {image.mode}, not ({size}, {size}) RGB; {AGAIN}")
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not a readable PNG ({reason(error)}); {AGAIN}") from error


def decode_tar(data: bytes, keys: Sequence[str], size: int, tar: AnyPath) -> Frames:
    """Decode all frames of a tar, uint8 [len(keys), size, size, 3]; raises UserError for other members or another order."""
    pngs: list[bytes] = []
    for name, png in _members(tar, data, largest_png(size)):
        if len(pngs) == len(keys) or name != f"{keys[len(pngs)]}.png":
            raise UserError(f"{tar}: member {name[:80]!r} is not the expected frame {len(pngs)}; {AGAIN}")
        pngs.append(png)
    if len(pngs) != len(keys):
        raise UserError(f"{tar} has {len(pngs)} frames instead of {len(keys)}; {AGAIN}")
    frames = np.empty((len(keys), size, size, 3), np.uint8)

    def decode(row: int) -> None:
        frames[row] = decode_png(pngs[row], size, f"{tar}: {keys[row]}.png")

    with ThreadPoolExecutor(DECODERS) as pool:  # Pillow decodes without the interpreter's lock
        list(pool.map(decode, range(len(keys))))
    return frames


def _members(tar: AnyPath, data: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of the members: plain files of at most `most` bytes each."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse() or member.size > most:
                    raise UserError(f"{tar}: member {member.name[:80]!r} is not a frame; {AGAIN}")
                file = archive.extractfile(member)
                yield member.name, file.read() if file else b""
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{tar} is a damaged tar file ({reason(error)}); {AGAIN}") from error
