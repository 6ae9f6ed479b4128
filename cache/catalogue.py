"""Which stores there are, what each is, and how to be rid of one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wmcache.cache.identity import Identity
from wmcache.cache.layout import has_commits, read_attributes, read_card
from wmcache.cache.records import Records
from wmcache.common.errors import UnreadableError, UserError
from wmcache.common.files import sweep, temporary_for
from wmcache.common.paths import AnyPath, as_os_errors, exists, unreadable
from wmcache.common.paths import remove as remove_all


@dataclass(frozen=True)
class Entry:
    """A store at a glance.

    Attributes:
        path: its folder.
        encoder, dataset: names.
        frames, tokens, token_dim, dtype: the shape, [frames, tokens, token_dim], and what it is stored in.
        bytes: on disk.
        shards, shards_done: how many there are, and how many have a record.
        complete: whether it can be trained on.
        fault: why it cannot be read, or nothing.
        damaged: whether that is damage, and not a permission, the disk or the network.
    """

    path: str
    encoder: str = ""
    dataset: str = ""
    frames: int = 0
    tokens: int = 0
    token_dim: int = 0
    dtype: str = ""
    bytes: int = 0
    shards: int = 0
    shards_done: int = 0
    complete: bool = False
    fault: str = ""
    damaged: bool = False

    @property
    def state(self) -> str:
        """`complete`, how far it is, or that it is damaged or unreadable."""
        if self.fault:
            return "damaged" if self.damaged else "unreadable"
        return "complete" if self.complete else f"{self.shards_done} of {self.shards} shards"


def list_stores(folder: AnyPath) -> list[Entry]:
    """All stores under a folder, whatever state they are in; raises UserError where it cannot be reached."""
    try:
        return [look_at(path) for path in sorted(_find(folder), key=str)]
    except OSError as error:
        raise unreadable(folder, error) from error


def _find(folder: AnyPath) -> Iterator[AnyPath]:
    """Folders named as stores, and nothing inside of them."""
    if isinstance(folder, Path):
        for root, names, _ in os.walk(folder):
            for name in [name for name in names if name.endswith(".zarr")]:
                names.remove(name)
                if not name.startswith("."):
                    yield Path(root, name)
        return
    with as_os_errors(folder):
        for root, below, _ in folder.fs.walk(folder.path, detail=True):
            for name in [name for name in below if name.endswith(".zarr")]:
                del below[name]
                yield folder / root.removeprefix(folder.path.rstrip("/")).strip("/") / name


def look_at(path: AnyPath) -> Entry:
    """A store at a glance; its tokens are not read."""
    try:
        attributes = read_attributes(path)
        card, identity = read_card(attributes), Identity.from_json(attributes["identity"], str(path))
    except UserError as error:
        damaged = not isinstance(error, UnreadableError)
        return Entry(str(path), bytes=bytes_on_disk(path), fault=str(error), damaged=damaged)
    return Entry(
        str(path),
        identity.encoder,
        str(card.dataset.get("name", "")),
        card.frames,
        card.tokens_per_frame,
        card.token_dim,
        card.dtype,
        bytes_on_disk(path),
        card.num_shards,
        Records(path, card, identity).count(),
        bool(attributes["complete"]),
    )


def describe(path: AnyPath) -> dict[str, Any]:
    """All that a store says of itself; raises UserError where there is none or its description is damaged."""
    attributes = read_attributes(path)
    glance = asdict(look_at(path))
    return {**glance, **{name: attributes[name] for name in ("identity", "card", "versions")}}


def remove(path: AnyPath) -> int:
    """Delete a store; returns the bytes that are free again.

    Raises:
        UserError: there is nothing, or something that is no store.
    """
    if isinstance(path, Path) and path.is_symlink():
        raise UserError(f"{path} is a link, so it stays; delete the store that it leads to: {path.resolve()}")
    try:
        if not exists(path):
            raise UserError(f"{path} does not exist; list stores with: wmcache ls")
        path = path.resolve() if isinstance(path, Path) else path
        if not has_commits(path) and look_at(path).fault:
            raise UserError(f"{path} is not a token store, so it stays; list stores with: wmcache ls")
        size = bytes_on_disk(path)
        if isinstance(path, Path):
            # In one step, so that no reader ever sees half a store; a kill leaves what the next writer sweeps away.
            grave = temporary_for(path)
            path.rename(grave)
            shutil.rmtree(grave)
            sweep(path.parent)
        else:
            remove_all(path / "zarr.json")  # without which there is no store
            remove_all(path)
    except OSError as error:
        raise UserError(f"cannot delete {path}: {error.strerror or error}; make its folder writable") from error
    return size


def bytes_on_disk(path: AnyPath) -> int:
    """Of all files under a folder; those that somebody moves or deletes meanwhile do not count. Raises OSError."""
    if not isinstance(path, Path):
        with as_os_errors(path):
            return int(path.fs.du(path.path)) if path.fs.exists(path.path) else 0
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += Path(folder, name).stat().st_size
    return total
