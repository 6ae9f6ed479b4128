"""wmcache ls, info, verify, finalize, repair, preview, rm: the contents of token stores, and whether they are sound."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.output import say, show
from wmcache.commands.shared import (
    ANY_PATH,
    file_option,
    json_option,
    moved_dataset_option,
    source_options,
    store_argument,
)
from wmcache.common.errors import UserError, command, one_line
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath, beside, is_local
from wmcache.common.space import human_bytes


@click.command("ls", cls=Command)
@click.argument("folder", type=ANY_PATH, required=False)
@json_option
def list_(folder: AnyPath | None) -> None:
    """List the token stores under FOLDER ($WMCACHE_HOME/stores)."""
    from wmcache.cache.catalogue import list_stores

    if folder and is_local(folder) and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass one that has stores in it")
    entries = list_stores(folder or home() / "stores")
    lines = [f"{'state':>16} {'size':>9} {'frames':>8} {'tokens':>10} {'dtype':>8}  store"]
    for entry in entries:
        size, shape = human_bytes(entry.bytes), f"{entry.tokens} x {entry.token_dim}"
        lines.append(f"{entry.state:>16} {size:>9} {entry.frames:>8} {shape:>10} {entry.dtype:>8}  {entry.path}")
    show([asdict(entry) for entry in entries], lines)


@click.command(cls=Command)
@store_argument
@json_option
def info(store: AnyPath) -> None:
    """Show the settings, the identity and the state of a token store."""
    from wmcache.cache.catalogue import describe

    values = describe(store)
    groups = ("identity", "card", "versions")
    rows = {name: value for name, value in values.items() if name not in groups}
    rows |= {f"{group}.{name}": value for group in groups for name, value in values[group].items()}
    for name, column in rows.pop("card.columns", {}).items():
        size = " x ".join(map(str, column["shape"])) or "1"
        rows[f"column {name}"] = f"{', '.join(column['roles'])}: {column['dtype']}, {size}"
    show(values, (f"{name:28} {value}" for name, value in rows.items()))


@click.command(cls=Command)
@store_argument
@click.option("--deep", is_flag=True, help="Also encode a sample of the frames again, and compare.")
@source_options
@json_option
def verify(store: AnyPath, deep: bool, **source: Any) -> None:
    """Compare every byte of a token store with its records; exit status 1 if something is wrong."""
    if deep:
        from wmcache.pipeline.repair import verify_deep

        found = verify_deep(store, **source)
    else:
        from wmcache.cache.verify import verify as run

        found = run(store)
    lines = [f"{store}: {found.shards_done} of {found.shards} shards as they were written, {found.frames} frames"]
    lines += [f"fault: {fault.file}: {fault.reason}" for fault in found.faults]
    lines += [f"left over, harmless: {file}" for file in found.leftovers]
    if found.drift:
        lines.append(", ".join(f"{name} {value:.6f}" for name, value in found.drift.items()))
    show({**asdict(found), "sound": found.sound}, lines)
    if not found.sound:
        state = "damaged" if found.faults else "incomplete"
        raise UserError(f"{store} is {state}; repair it with: {command('wmcache', 'repair', store)}")


@click.command(cls=Command)
@store_argument
def finalize(store: AnyPath) -> None:
    """Declare a token store complete, once all slices of its shards are done; exit status 1 if shards are missing."""
    from wmcache.pipeline.stores import finalize as run

    card = run(store)
    say(f"{store}: complete, {card.frames} frames in {card.num_shards} shards")


@click.command(cls=Command)
@store_argument
@source_options
def repair(store: AnyPath, **source: Any) -> None:
    """Rebuild the missing and damaged shards of a token store."""
    from wmcache.pipeline.repair import repair as run

    found = run(store, **source)
    say(f"{store}: complete; {len(found.faults)} faults repaired" if found.faults else f"{store}: complete")


@click.command(cls=Command)
@store_argument
@moved_dataset_option
@click.option("--count", type=click.IntRange(1, 64), default=8, help="Frames to draw.")
@file_option("--out", help="The PNG to write.  [default: STORE, with .png for .zarr]")
def preview(store: AnyPath, out: Path | None, **settings: Any) -> None:
    """Draw frames of a store beside their tokens, the first three principal components as colours."""
    from wmcache.pipeline.pictures import preview as run

    out = out or beside(store, ".png")
    frames = run(store, out, **settings)
    say(f"{out}: frames {', '.join(map(str, frames))}")


@click.command(cls=Command)
@store_argument
@click.option("--yes", is_flag=True, help="Delete without asking.")
def rm(store: AnyPath, yes: bool) -> None:
    """Delete a token store."""
    from wmcache.cache.catalogue import check_removable, remove

    check_removable(store)
    if not yes:
        click.confirm(one_line(f"delete {store}?"), abort=True)
    say(f"{store}: deleted, {human_bytes(remove(store))} free again")
