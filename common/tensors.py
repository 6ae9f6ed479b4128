"""Safetensors files, on file systems with memory maps and without."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from wmcache.common.paths import NO_MAPS


class Tensors(Protocol):
    """An open file, as `safetensors.safe_open` has it."""

    def metadata(self) -> dict[str, str] | None:
        """What was saved beside the tensors."""
        ...

    def keys(self) -> list[str]:
        """Names of the tensors."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """One of them."""
        ...


class _InMemory:
    def __init__(self, data: bytes) -> None:
        self._tensors: dict[str, Tensor] = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        self._metadata: dict[str, str] | None = header.get("__metadata__")

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


@contextmanager
def open_tensors(file: Path) -> Iterator[Tensors]:
    """Open a safetensors file; where it cannot be mapped it is read into memory.

    Raises:
        OSError: the system cannot open it.
        SafetensorError: it is not such a file.
    """
    if can_map(file):
        with safe_open(file, "pt") as tensors:
            yield cast(Tensors, tensors)
    else:
        yield _InMemory(file.read_bytes())


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises as `open_tensors`."""
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)


def can_map(file: Path) -> bool:
    """Whether the file system of a file maps it into memory; raises OSError where it cannot be opened."""
    # Opened here: safetensors says of every file that it cannot open that it is missing.
    with file.open("rb") as stream:
        try:
            mmap.mmap(stream.fileno(), 1, access=mmap.ACCESS_READ).close()
        except OSError as error:
            if error.errno in NO_MAPS:
                return False
            raise
        except ValueError:  # an empty file
            pass
    return True
