"""An HDF5 dataset of robomimic -> frame dataset (robomimic.github.io/docs/datasets/overview.html).

data/demo_0/actions     [steps, A]
data/demo_0/obs/NAME    [steps, …]: images, and what the robot's sensors measure
data/demo_0/states      [steps, S]: state of the simulator
data/demo_0/rewards     [steps]
data/demo_0/dones       [steps]
mask/NAME               names of demonstrations: train, valid, better, …
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from wmcache.common.errors import UserError, suggest
from wmcache.common.options import option
from wmcache.pipeline.frames import Frames
from wmcache.pipeline.importers.arrays import Array, choose_image, open_arrays
from wmcache.pipeline.importers.base import IMPORTERS, Source
from wmcache.pipeline.importers.conversions import (
    ACTION,
    PROPRIO,
    ROLES,
    ColumnImporter,
    build_steps,
    describe_columns,
    note,
    number_steps,
)

NAMES = {"actions": "action", "states": "state", "rewards": "reward", "dones": "terminated"}
Demo = dict[str, Array]


@IMPORTERS.register("robomimic")
@dataclass(frozen=True, kw_only=True)
class RobomimicImporter(ColumnImporter):
    """Import an HDF5 FILE of robomimic whose observations have images."""

    metavar: ClassVar[str] = "FILE"
    image_key: str | None = option(None, "Observation to import, as in agentview_image.  [default: the only image]")
    mask: str | None = option(None, "Import the demonstrations of this mask, as in train.  [default: all]")

    def open(self) -> Source:
        """See `Importer.open`; actions are rounded to float32. Demonstrations are in the order of their numbers."""
        path = Path(self.source)
        demos = _demos(open_arrays(path), self.mask, path)
        first = next(iter(demos.values()))
        images = {name.removeprefix("obs/"): array for name, array in first.items() if name.startswith("obs/")}
        key = choose_image(images, self.image_key, "", path)
        left_out = [name for name in first if name.startswith("next_obs/") or first[name].is_image]
        if others := [name for name in left_out if name != f"obs/{key}"]:
            note(f"not imported from {path}: {', '.join(others)}")
        kept = self.kept((name for name in first if name not in left_out), path)
        lengths = [_length(demo, name, [*kept, f"obs/{key}"], first, path) for name, demo in demos.items()]
        plain = {name: NAMES.get(name) or re.sub(r"\W", "_", name.removeprefix("obs/")) for name in kept}
        if len({*plain.values()}) < len(plain):
            raise UserError(
                f"{path}: two of the columns {', '.join(kept)} have the same name; leave one out with --drop"
            )
        values = {plain[name]: np.concatenate([demo[name].read() for demo in demos.values()]) for name in kept}
        # What robots measure is what policies see; `object` is the simulator's.
        sensors = {plain[name]: PROPRIO for name in kept if name.startswith("obs/robot")}
        roles: dict[str, Any] = {**ROLES, "action": ACTION, "state": ("state",), **sensors}
        described = describe_columns(values, roles, path, {plain[name]: name for name in kept})
        steps = build_steps(*number_steps(lengths, path), values, described, path)
        size, names = self.side_of(images[key].shape[1:], f"{key} of {path}"), list(demos)

        def read(episode: int, wanted: range) -> Iterator[Frames]:
            rows = demos[names[episode]][f"obs/{key}"].rows(wanted.start, wanted.stop)
            for step, row in zip(wanted, rows, strict=True):
                where = f"{key} of {names[episode]} in {path}, step {step}"
                yield self.frame_of(row, size, where)

        env = f"robomimic {path.stem}{self.changes}"
        return Source(path, steps, size, read, env, (), "imported from robomimic", self.fps)


def _demos(arrays: dict[str, Array], mask: str | None, path: Path) -> dict[str, Demo]:
    """Return the arrays of each demonstration by name, in the order of the demonstrations' numbers."""
    demos: dict[str, Demo] = {}
    for name, array in arrays.items():
        if found := re.fullmatch(r"data/(demo_\d+)/(.+)", name):
            demos.setdefault(found[1], {})[found[2]] = array
    masks = {name.removeprefix("mask/"): array for name, array in arrays.items() if name.startswith("mask/")}
    if mask is not None:
        if mask not in masks:
            raise UserError(
                f"{path} has no mask {mask!r}; {suggest(mask, list(masks)) if masks else 'leave out --mask'}"
            )
        wanted = {item.decode() if isinstance(item, bytes) else str(item) for item in masks[mask].read().tolist()}
        if unknown := sorted(wanted - demos.keys()):
            raise UserError(f"{path}: mask {mask} names {unknown[0]}, which does not exist; get the file again")
        demos = {name: demo for name, demo in demos.items() if name in wanted}
    if not demos:
        raise UserError(f"{path} has no demonstrations (data/demo_0, ...); it is no dataset of robomimic")
    return dict(sorted(demos.items(), key=lambda item: int(item[0].rpartition("_")[2])))


def _length(demo: Demo, name: str, kept: list[str], first: Demo, path: Path) -> int:
    """Return the steps of a demonstration; raise UserError unless it has all arrays of the first one, with rows of the same shape."""
    if missing := [item for item in kept if item not in demo]:
        raise UserError(f"{path}: {name} has no {missing[0]}, as the first demonstration has; leave it out with --drop")
    if more := sorted(demo.keys() - first.keys()):
        raise UserError(f"{path}: {name} has {more[0]}, the first demonstration has not; remove it from a copy")
    steps = demo[kept[0]].shape[0]
    for item in kept:
        if demo[item].shape != (steps, *first[item].shape[1:]) or not steps:
            raise UserError(f"{path}: {item} of {name} is {demo[item].shape}, not {(steps, *first[item].shape[1:])}")
    return steps
