"""Safetensors files, on file systems with memory maps and without."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from wmcache.common.paths import NO_MAPS


class Tensors:
    """An open file with the methods of `safetensors.safe_open`; this one is read into memory."""

    def __init__(self, data: bytes) -> None:
        """Take the content of the file."""
        self._tensors: dict[str, Tensor] = load(data)
        self._header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    def metadata(self) -> dict[str, str] | None:  # noqa: D102
        found: dict[str, str] | None = self._header.get("__metadata__")
        return found

    def keys(self) -> list[str]:  # noqa: D102
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:  # noqa: D102
        return self._tensors[name]


@contextmanager
def open_tensors(file: Path) -> Iterator[Tensors]:
    """Open a safetensors file, or read it into memory where it cannot be mapped.

    Raises:
        OSError: the system cannot open it.
        SafetensorError: it is not a safetensors file.
    """
    if can_map(file):
        with safe_open(file, "pt") as tensors:
            yield cast(Tensors, tensors)
    else:
        yield Tensors(file.read_bytes())


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file; raise as `open_tensors`."""
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)


def can_map(file: Path) -> bool:
    """Return whether a file can be mapped into memory; raise OSError where it cannot be opened."""
    # safetensors would report every file that it cannot open as missing.
    with file.open("rb") as stream:
        try:
            mmap.mmap(stream.fileno(), 1, access=mmap.ACCESS_READ).close()
        except ValueError:  # an empty file
            return True
        except OSError as error:
            if error.errno in NO_MAPS:
                return False
            raise
    return True
