"""Folders of results: their default names, and the options by which an evaluation is known."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wmcache.common.errors import UserError
from wmcache.common.jsonfiles import read_json
from wmcache.planner.goals import SOURCES
from wmcache.planner.options import PlanOptions
from wmcache.planner.protocols import PROTOCOLS

LONGEST_NAME = 120


def recorded(options: PlanOptions) -> dict[str, Any]:
    """Return the options by which an evaluation is known."""
    known = asdict(options)
    if not options.strict or options.goals not in SOURCES:  # evaluations from before it existed keep their fingerprint
        del known["strict"]
    return known


def absolute_file(name: str) -> str:
    """Return a file's absolute path; a name that is not a file's stays as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def default_out(run: Path, protocol: str | None, options: PlanOptions) -> Path:
    """Return the folder of an evaluation in its run: named by protocol, sizes and every option that differs from the protocol's."""
    usual = {**asdict(PlanOptions()), **(PROTOCOLS.get(protocol) if protocol else {})}
    known = {**asdict(options), **options.search}
    in_every_name = {"search", "episodes", "budget", "env", *(() if protocol else ("objective", "execute"))}
    differ = {name: value for name, value in known.items() if name not in in_every_name and value != usual.get(name)}
    # Folders of earlier versions have these first.
    first = [name for name in ("solver", "mask", "distance", "goals") if name in differ]
    parts = [protocol or f"{options.objective}-x{options.execute}"]
    parts += [_name_part(name, differ[name]) for name in dict.fromkeys([*first, *differ])]
    parts += [f"{options.episodes}x{options.budget}", _name_part("env", options.env) if options.env else ""]
    name = "-".join(["plan", *filter(None, parts)])
    return run / (name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_digest(name)}")


def _name_part(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    if (name == "goals" and value not in SOURCES) or (name == "env" and Path(value).suffix):
        return f"{Path(value).stem}-{_digest(value)}"  # files of several folders may have the same name
    if name in ("solver", "distance", "objective", "goals", "env"):
        return Path(value).name
    if name == "execute":
        return f"x{value}"
    return f"{flag}-{value.replace(':', '')}" if isinstance(value, str) else f"{flag}{value}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def refuse_other_results(out: Path, options: PlanOptions) -> None:
    """Raise UserError where `out` has results of other options."""
    if not (out / "results.json").exists():
        return
    kept = {"strict": False, **read_json(out / "results.json", "choose another --out").get("options", {})}
    wanted = {"strict": False, **recorded(options)}
    if options.goals not in SOURCES:
        kept["strict"] = False
    different = [f"{name} {kept.get(name)} != {wanted[name]}" for name in wanted if kept.get(name) != wanted[name]]
    if different:
        raise UserError(f"{out} has results of other options: {'; '.join(different)}; choose another: --out {out}-2")
