"""wmcache weights: the weights of encoders on this machine, and where they are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from wmcache.commands.command import Command
from wmcache.commands.output import print_json, say
from wmcache.commands.shared import json_option
from wmcache.common.folders import home
from wmcache.common.space import human_bytes


@click.command(cls=Command)
@json_option
def weights(as_json: bool) -> None:
    """List the sources of encoders' weights, and the weights that were fitted here ($WMCACHE_HOME/encoders)."""
    sources, fitted = _sources(), _fitted()
    if as_json:
        print_json({"sources": sources, "fitted": fitted})
        return
    click.echo(f"{'state':>8} {'size':>9} {'revision':12}  source")
    for row in sources:
        size = human_bytes(row["bytes"]) if row["bytes"] else "-"
        say(f"{row['state']:>8} {size:>9} {row['revision'][:12] or '-':12}  {row['source']}")
        click.echo(f"{'':33}{', '.join(row['encoders'])}")
        if row["path"]:
            say(f"{'':33}{row['path']}{row['fault'] and ': '}{row['fault']}")
    click.echo(f"\n{'encoder':>20} {'size':>9} {'dataset':12}  fitted here")
    for row in fitted:
        size = human_bytes(row["bytes"])
        say(f"{row['encoder'] or 'unknown':>20} {size:>9} {row['dataset'][:12] or '-':12}  {row['path']}")
        if row["base"] or row["fault"]:
            where = f" ({row['base_weights']})" if row["base_weights"] else ""
            say(f"{'':45}{row['fault'] or 'on ' + row['base'] + where}")


def _sources() -> list[dict[str, Any]]:
    """A row for each source; encoders of one source share a row, fitted ones have no source."""
    from wmcache.pipeline.encoders import get_entry, specs
    from wmcache.pipeline.encoders.hub import REPOSITORY, look_up

    groups: dict[tuple[str, str], list[str]] = {}
    for spec in specs():
        if get_entry(spec.name).load and REPOSITORY.fullmatch(spec.source):
            groups.setdefault((spec.source, spec.revision), []).append(spec.name)
    rows = []
    for (source, revision), names in sorted(groups.items()):
        found = look_up(source, revision)
        rows.append(
            {
                "source": source,
                "encoders": names,
                "state": "absent" if found is None else "damaged" if found.fault else "present",
                "revision": found.revision if found else revision,
                "bytes": found.bytes if found else 0,
                "path": str(found.path) if found else "",
                "fault": found.fault if found else "",
            }
        )
    return rows


def _fitted() -> list[dict[str, Any]]:
    from wmcache.pipeline.encoders.weights import list_fitted

    return [{**asdict(file), "path": str(file.path)} for file in list_fitted(home() / "encoders")]
