"""wmcache weights: the weights of encoders on this machine, and where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.output import show
from wmcache.commands.shared import json_option
from wmcache.common.folders import home
from wmcache.common.space import human_bytes


@click.command(cls=Command)
@json_option
def weights() -> None:
    """List the sources of encoders' weights, and the weights that were fitted here ($WMCACHE_HOME/encoders)."""
    from wmcache.pipeline.encoders.weights import list_fitted

    sources = _sources()
    fitted = [{**asdict(file), "path": str(file.path)} for file in list_fitted(home() / "encoders")]
    show({"sources": sources, "fitted": fitted}, _lines(sources, fitted))


def _lines(sources: list[dict[str, Any]], fitted: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'state':>8} {'size':>9} {'revision':12}  source"
    for row in sources:
        size = human_bytes(row["bytes"]) if row["bytes"] else "-"
        yield f"{row['state']:>8} {size:>9} {row['revision'][:12] or '-':12}  {row['source']}"
        yield f"{'':33}{', '.join(row['encoders'])}"
        if row["path"]:
            yield f"{'':33}{row['path']}{row['fault'] and ': '}{row['fault']}"
    yield ""
    yield f"{'encoder':>20} {'size':>9} {'dataset':12}  fitted here"
    for row in fitted:
        size = human_bytes(row["bytes"])
        yield f"{row['encoder'] or 'unknown':>20} {size:>9} {row['dataset'][:12] or '-':12}  {row['path']}"
        if row["base"] or row["fault"]:
            where = f" ({row['base_weights']})" if row["base_weights"] else ""
            yield f"{'':45}{row['fault'] or 'on ' + row['base'] + where}"


def _sources() -> list[dict[str, Any]]:
    from wmcache.pipeline.encoders import get_entry, specs
    from wmcache.pipeline.encoders.hub import REPOSITORY, look_up

    groups: dict[tuple[str, str], list[str]] = {}
    for spec in specs():
        if get_entry(spec.name).load and REPOSITORY.fullmatch(spec.source):
            groups.setdefault((spec.source, spec.revision), []).append(spec.name)
    rows = []
    for (source, revision), names in sorted(groups.items()):
        found = look_up(source, revision)
        state = "absent" if found is None else "damaged" if found.fault else "present"
        known: dict[str, Any] = {"path": "", "revision": revision, "bytes": 0, "fault": ""}
        if found:
            known = {**asdict(found), "path": str(found.path)}
        rows.append({"source": source, "encoders": names, "state": state, **known})
    return rows
