"""Cells: the parts of a study. A cell's key is the SHA-256 of its settings and its inputs' keys, down to the dataset's fingerprint.

Its result appears in `cells/<stage>-<key>.json` when it is done. Its product is in `encoders/`, `stores/`, `runs/`, `plans/` or `probes/`
under the same key, so a cell that was killed resumes where its own work can.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from wmcache.common.errors import UserError
from wmcache.common.files import sha256_of
from wmcache.common.jsonfiles import read_json
from wmcache.common.paths import AnyPath
from wmcache.envs import find_maze
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders.weights import require_weights, weights_file
from wmcache.pipeline.options import EncoderOptions
from wmcache.planner.goals import SOURCES
from wmcache.planner.options import PlanOptions
from wmcache.planner.results import absolute_file, recorded
from wmcache.study.options import EncoderChoice, StudyOptions

FORMAT = 1
"""Of results; raised when a cell's work changes, and with it the meaning of its numbers."""

PRODUCTS = {
    "fit": ("encoders", ".safetensors"),
    "extract": ("stores", ".zarr"),
    "probe": ("probes", ".png"),
    "train": ("runs", ""),
    "plan": ("plans", ""),
}
"""Stage -> folder and suffix of its product."""

ENCODER_OPTIONS = tuple(item.name for item in fields(EncoderOptions))


@dataclass(frozen=True, eq=False)
class Cell:
    """A part of a study; label and files are not a part of its key, so files may move.

    Attributes:
        stage: in PRODUCTS.
        name: of the encoder.
        settings: plain JSON values; of files the SHA-256 of their content.
        inputs: role -> the cell whose result it takes.
        files: setting -> path.
    """

    stage: str
    name: str
    label: str
    settings: dict[str, Any]
    inputs: Mapping[str, Cell] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """Equal for cells with equal results."""
        inputs = {role: cell.key for role, cell in self.inputs.items()}
        known = json.dumps([FORMAT, self.stage, self.settings, inputs], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def ancestors(self) -> list[Cell]:
        """All cells that it depends on, and itself; each after its own inputs."""
        found = {other.key: other for cell in self.inputs.values() for other in cell.ancestors()}
        return [*found.values(), self]


@dataclass(frozen=True)
class Workspace:
    """The study's folder, the dataset, and the device and batch size of encoders."""

    out: Path
    dataset: AnyPath
    device: str
    batch: int

    def file(self, cell: Cell) -> Path:
        """The result of a cell that is done."""
        return self.out / "cells" / f"{cell.stage}-{cell.key}.json"

    def log(self, cell: Cell) -> Path:
        """The output of a cell's work."""
        return self.out / "logs" / f"{cell.stage}-{cell.key}.log"

    def product(self, cell: Cell) -> Path:
        """The file or folder that a cell makes."""
        folder, suffix = PRODUCTS[cell.stage]
        return self.out / folder / f"{cell.name}-{cell.key}{suffix}"

    def is_started(self, cell: Cell) -> bool:
        """Whether a part of its product exists."""
        path = self.product(cell)
        return path.exists() or path.with_name(f".{path.name}.partial").exists()

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result; None if it is not done."""
        file = self.file(cell)
        return read_json(file, "move it away, and run the study again") if file.exists() else None


@dataclass(frozen=True)
class Branch:
    """The cells of an encoder and a seed; `train` by fraction, `plan` by fraction and the evaluation's name."""

    choice: EncoderChoice
    seed: int
    extract: Cell
    probe: Cell
    train: dict[float, Cell]
    plan: dict[tuple[float, str], Cell]

    def cells(self) -> list[Cell]:
        """All of them, each after its inputs."""
        return [*self.extract.ancestors(), self.probe, *self.train.values(), *self.plan.values()]


def make_branches(options: StudyOptions, fingerprint: str) -> list[Branch]:
    """Make the cells of a study of that dataset; raise UserError where weights, goals or a maze do not exist."""
    return [_branch(choice, seed, options, fingerprint) for choice in options.encoders for seed in options.seeds]


def _branch(choice: EncoderChoice, seed: int, options: StudyOptions, fingerprint: str) -> Branch:
    what = f"{choice.label}, seed {seed}"
    extract = _extract_cell(choice, seed, options, fingerprint)
    probe = Cell("probe", choice.name, f"probe {what}", {"frames": options.probe_frames}, {"extract": extract})
    trains, plans = {}, {}
    for fraction in reversed(options.fractions):
        settings = {**asdict(options.train), "seed": seed, "episodes_fraction": fraction}
        label = f"{what}, {fraction:.0%} of the episodes"
        trains[fraction] = Cell("train", choice.name, f"train {label}", settings, {"extract": extract})
        for plan in options.plan:
            settings, files = _plan_settings(plan.options)
            inputs = {"train": trains[fraction], "extract": extract}
            plans[fraction, plan.name] = Cell("plan", choice.name, f"{plan.name} {label}", settings, inputs, files)
    return Branch(choice, seed, extract, probe, trains, plans)


def _extract_cell(choice: EncoderChoice, seed: int, options: StudyOptions, fingerprint: str) -> Cell:
    entry = encoders.get_entry(choice.name)
    inputs: dict[str, Cell] = {}
    if choice.weights is None and entry.load is None:
        inputs["base"] = _extract_cell(_base_of(choice, entry.base, options), seed, options, fingerprint)
    family = encoders.family_of(choice.name)
    if choice.weights is None and encoders.get_entry(family).fit:
        fit = asdict(encoders.fit_options(family, {**choice.fit, "seed": seed}))
        fitting = {"name": family, "options": fit, "max_frames": choice.max_frames, "dataset": fingerprint}
        inputs["fit"] = Cell("fit", family, f"fit {choice.label}, seed {seed}", fitting, dict(inputs))
    files = {"weights": choice.weights, "base_weights": choice.base_weights}
    settings = {
        "name": choice.name,
        **{name: path and _weights_digest(path) for name, path in files.items()},
        **{name: getattr(choice, name) for name in ENCODER_OPTIONS},
        "store_dtype": choice.store_dtype,
        "dataset": fingerprint,
    }
    known = {name: absolute_file(path) for name, path in files.items() if path}
    return Cell("extract", choice.name, f"extract {choice.label}", settings, inputs, known)


def _plan_settings(options: PlanOptions) -> tuple[dict[str, Any], dict[str, str]]:
    settings, files = recorded(options), {}
    if options.env:
        files["env"] = absolute_file(options.env)
        settings["env"] = list(find_maze(options.env).rows)
    if options.goals not in SOURCES:
        files["goals"] = absolute_file(options.goals)
        if not Path(options.goals).is_file():
            raise UserError(f"goals {options.goals} are neither {', '.join(SOURCES)} nor a file; fix the study's file")
        settings["goals"] = sha256_of(Path(options.goals))
    return settings, files


def _base_of(choice: EncoderChoice, default: str, options: StudyOptions) -> EncoderChoice:
    """The base that an adapter is fitted on, with the settings of the study's own encoder of that family if there is one."""
    name = choice.base or default
    family = encoders.family_of(name)
    of_study = (other for other in (*options.encoders, *options.others) if other.name == family)
    known = next(of_study, EncoderChoice(name=family))
    return EncoderChoice(
        name=name,
        label=f"{name} for {choice.label}",
        weights=choice.base_weights or known.weights,
        fit={} if choice.base_weights else known.fit,
        max_frames=known.max_frames,
        **{part: getattr(choice, part) for part in ENCODER_OPTIONS},
    )


@functools.lru_cache
def _weights_digest(path: str) -> str:
    return sha256_of(weights_file(require_weights(Path(path))))
