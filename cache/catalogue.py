"""Which stores there are, what each is, and how to delete one."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Any

from wmcache.cache.identity import Identity
from wmcache.cache.layout import has_commits, read_attributes, read_card
from wmcache.cache.records import Records
from wmcache.common.errors import UnreadableError, UserError, reason
from wmcache.common.files import sweep, temporary_for
from wmcache.common.paths import AnyPath, exists, folders_below, is_local, readable, usage
from wmcache.common.paths import remove as remove_all


@dataclass(frozen=True)
class Entry:
    """A store in a list; `fault` is why it cannot be read, `damaged` whether that is damage, and not permissions, disk or network."""

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
        """`complete`, `damaged`, `unreadable` or the shards that are done."""
        if self.fault:
            return "damaged" if self.damaged else "unreadable"
        return "complete" if self.complete else f"{self.shards_done} of {self.shards} shards"


def list_stores(folder: AnyPath) -> list[Entry]:
    """Return all stores under a folder, damaged ones too; raise UserError where it cannot be read."""
    with readable(folder):
        found = [path for path in folders_below(folder, ".zarr") if not path.name.startswith(".")]
        return [summarise(path) for path in sorted(found, key=str)]


def summarise(path: AnyPath) -> Entry:
    """Return a store's entry, without reading tokens."""
    try:
        attributes = read_attributes(path)
        card, identity = read_card(attributes), Identity.from_json(attributes["identity"], str(path))
    except UserError as error:
        damaged = not isinstance(error, UnreadableError)
        return Entry(str(path), bytes=usage(path), fault=str(error), damaged=damaged)
    return Entry(
        str(path),
        identity.encoder,
        str(card.dataset.get("name", "")),
        card.frames,
        card.tokens_per_frame,
        card.token_dim,
        card.dtype,
        usage(path),
        card.num_shards,
        Records(path, card, identity).count(),
        bool(attributes["complete"]),
    )


def describe(path: AnyPath) -> dict[str, Any]:
    """Return a store's entry, identity, card and versions; raise UserError where there is none or its metadata is damaged."""
    attributes = read_attributes(path)
    return {**asdict(summarise(path)), **{name: attributes[name] for name in ("identity", "card", "versions")}}


def check_removable(path: AnyPath) -> None:
    """Raise UserError unless a path is a store, whole or damaged, and not a link."""
    is_link = is_local(path) and path.is_symlink()
    if is_link or not exists(path) or (not has_commits(path.resolve()) and summarise(path.resolve()).fault):
        raise UserError(f"{path} is not a token store and was not deleted; list stores with: wmcache ls")


def remove(path: AnyPath) -> int:
    """Delete a store, and return the bytes that are free again; raise UserError as `check_removable`, or where it cannot be deleted."""
    check_removable(path)
    try:
        path = path.resolve()
        size = usage(path)
        if is_local(path):
            # In one step, so that readers never see half a store. The next writer sweeps what a kill leaves.
            renamed = temporary_for(path)
            path.rename(renamed)
            shutil.rmtree(renamed)
            sweep(path.parent)
        else:
            remove_all(path / "zarr.json")  # without which there is no store
            remove_all(path)
    except OSError as error:
        raise UserError(f"cannot delete {path}: {reason(error)}; make its folder writable") from error
    return size
