"""Cells: the parts of a study, each with a name that says all that it depends on, and how each is done.

A cell's key is the SHA-256 of its settings and its inputs' keys, down to the dataset's fingerprint. Its result appears in
`cells/<stage>-<key>.json` when it is done, and is read from there ever after; what it makes lies in `encoders/`, `stores/`, `runs/`,
`plans/` and `probes/` under the same key, so a cell that was killed goes on where its own work can.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from wmcache.cache.store import TokenStore
from wmcache.common.device import choose_device, choose_dtype
from wmcache.common.errors import UserError
from wmcache.common.files import make_folder, sha256_of
from wmcache.common.jsonfiles import nulls, read_json, write_json
from wmcache.common.paths import AnyPath
from wmcache.envs import find_maze
from wmcache.pipeline import encoders
from wmcache.pipeline.derive import derive
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.weights import require_weights, weights_file
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.fit import fit, fit_adapter
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.probe import probe
from wmcache.pipeline.probe_picture import draw_probe
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate
from wmcache.planner.goals import SOURCES
from wmcache.planner.judge import THRESHOLDS
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_episodes
from wmcache.planner.results import recorded
from wmcache.study.options import EncoderChoice, StudyOptions
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train, validation_windows
from wmcache.trainer.validation import rollout_errors, skills

FORMAT = 1
"""Of results; raised when a cell's work, and with it what its numbers mean, changes."""

PLACES = {
    "fit": ("encoders", ".safetensors"),
    "extract": ("stores", ".zarr"),
    "probe": ("probes", ".png"),
    "train": ("runs", ""),
    "plan": ("plans", ""),
}
"""Stage -> the folder of what it makes, and how its name ends."""

AS_CREATED = ("image_size", "normalisation", "filter", "lag", "dtype")
TIMED_FRAMES = 64
VARIANCE_FRAMES = 512


@dataclass(frozen=True, eq=False)
class Cell:
    """A part of a study.

    Attributes:
        stage: in PLACES.
        name: of the encoder, a part of file names.
        label: for people; not a part of the key.
        settings: plain JSON values; of files the SHA-256 of what is in them.
        inputs: role -> the cell whose result it takes.
        files: setting -> where the file is; not a part of the key, so files may move.
    """

    stage: str
    name: str
    label: str
    settings: dict[str, Any]
    inputs: Mapping[str, Cell] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """Equal for cells of equal results."""
        inputs = {role: cell.key for role, cell in self.inputs.items()}
        known = json.dumps([FORMAT, self.stage, self.settings, inputs], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def ancestors(self) -> list[Cell]:
        """All that it depends on, itself last; each after its own inputs."""
        found = {other.key: other for cell in self.inputs.values() for other in cell.ancestors()}
        return [*found.values(), self]


@dataclass(frozen=True)
class Workshop:
    """Where cells are done.

    Attributes:
        out: the study's folder. dataset: the frames'.
        device: of encoders. batch: frames in each call of one.
    """

    out: Path
    dataset: AnyPath
    device: str
    batch: int

    def file(self, cell: Cell) -> Path:
        """Where a cell's result is when it is done."""
        return self.out / "cells" / f"{cell.stage}-{cell.key}.json"

    def log(self, cell: Cell) -> Path:
        """Where what it prints goes."""
        return self.out / "logs" / f"{cell.stage}-{cell.key}.log"

    def place(self, cell: Cell) -> Path:
        """Of what a cell makes."""
        folder, suffix = PLACES[cell.stage]
        return self.out / folder / f"{cell.name}-{cell.key}{suffix}"

    def is_begun(self, cell: Cell) -> bool:
        """Whether something of what it makes is there."""
        place = self.place(cell)
        return place.exists() or place.with_name(f".{place.name}.partial").exists()

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result; None where it is not done."""
        file = self.file(cell)
        return read_json(file, "move it away, and run the study again") if file.exists() else None


@dataclass(frozen=True)
class Branch:
    """The cells of an encoder and a seed.

    Attributes:
        choice: the encoder. seed: of fit and training.
        extract, probe: its store, and the figures of it.
        train: fraction -> run. plan: (fraction, name of the evaluation) -> episodes.
    """

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
    """The cells of a study of the dataset of that fingerprint.

    Raises:
        UserError: weights, goals or a maze that are named are not there.
    """
    branches = []
    for choice in options.encoders:
        for seed in options.seeds:
            what = f"{choice.label}, seed {seed}"
            extract = _extract_cell(choice, seed, options, fingerprint)
            trains, plans = {}, {}
            for fraction in reversed(options.fractions):
                settings = {**asdict(options.train), "seed": seed, "episodes_fraction": fraction}
                label = f"{what}, {fraction:.0%} of the episodes"
                trains[fraction] = Cell("train", choice.name, f"train {label}", settings, {"extract": extract})
                for plan in options.plan:
                    inputs = {"train": trains[fraction], "extract": extract}
                    plans[fraction, plan.name] = Cell(
                        "plan", choice.name, f"{plan.name} {label}", *_plan_settings(plan.options, inputs)
                    )
            probing = Cell(
                "probe", choice.name, f"probe {what}", {"frames": options.probe_frames}, {"extract": extract}
            )
            branches.append(Branch(choice, seed, extract, probing, trains, plans))
    return branches


def _extract_cell(choice: EncoderChoice, seed: int, options: StudyOptions, fingerprint: str) -> Cell:
    """The store of an encoder; before it its fit, and for an adapter its base's store."""
    entry = encoders.get_entry(choice.name)
    inputs: dict[str, Cell] = {}
    if choice.weights is None and entry.load is None:
        inputs["base"] = _extract_cell(_base_of(choice, entry.base, options), seed, options, fingerprint)
    family = encoders.family_of(choice.name)
    if choice.weights is None and encoders.get_entry(family).fit:
        fitting = {
            "name": family,
            "options": asdict(encoders.fit_options(family, {**choice.fit, "seed": seed})),
            "max_frames": choice.max_frames,
            "dataset": fingerprint,
        }
        inputs["fit"] = Cell("fit", family, f"fit {choice.label}, seed {seed}", fitting, dict(inputs))
    files = {"weights": choice.weights, "base_weights": choice.base_weights}
    settings = {
        "name": choice.name,
        **{name: path and _digest(weights_file(require_weights(Path(path)))) for name, path in files.items()},
        **{name: getattr(choice, name) for name in AS_CREATED},
        "store_dtype": choice.store_dtype,
        "dataset": fingerprint,
    }
    known = {name: _anywhere(path) for name, path in files.items() if path}
    return Cell("extract", choice.name, f"extract {choice.label}", settings, inputs, known)


def _plan_settings(
    options: PlanOptions, inputs: dict[str, Cell]
) -> tuple[dict[str, Any], dict[str, Cell], dict[str, str]]:
    """Settings, inputs and files of an evaluation."""
    settings, files = recorded(options), {}
    if options.env:
        files["env"] = _anywhere(options.env)
        settings["env"] = list(find_maze(options.env).rows)
    if options.goals not in SOURCES:
        files["goals"] = _anywhere(options.goals)
        if not Path(options.goals).is_file():
            raise UserError(f"goals {options.goals} are neither {', '.join(SOURCES)} nor a file; hint the study's file")
        settings["goals"] = sha256_of(Path(options.goals))
    return settings, inputs, files


def _anywhere(file: str) -> str:
    """A file's path in any working directory; a name that is no file stays as it is."""
    return str(Path(file).absolute()) if Path(file).exists() else file


def _base_of(choice: EncoderChoice, usual: str, options: StudyOptions) -> EncoderChoice:
    """The base that an adapter is fitted on, as the study's own encoder of that family is where there is one."""
    name = choice.base or usual
    family = encoders.family_of(name)
    of_study = [other for other in (*options.encoders, *options.others) if other.name == family]
    known = of_study[0] if of_study else EncoderChoice(family)
    return EncoderChoice(
        name,
        label=f"{name} for {choice.label}",
        weights=choice.base_weights or known.weights,
        fit={} if choice.base_weights else known.fit,
        max_frames=known.max_frames,
        **{part: getattr(choice, part) for part in AS_CREATED},
    )


@functools.lru_cache
def _digest(file: Path) -> str:
    return sha256_of(file)


def do_fit(work: Workshop, cell: Cell) -> dict[str, Any]:
    """Fit an encoder, or an adapter on its base's store."""
    settings, out = cell.settings, work.place(cell)
    options = encoders.fit_options(settings["name"], settings["options"])
    shared = {"max_frames": settings["max_frames"], "device": work.device, "measure": False}
    dataset = FrameDataset.open(work.dataset)
    if (base := cell.inputs.get("base")) is None:
        fitted = fit(dataset, settings["name"], out, options, **shared)
    else:
        fitted = fit_adapter(
            TokenStore.open(work.place(base)),
            settings["name"],
            out,
            options,
            dataset=dataset,
            base_weights=weights_of(work, base),
            # Only a kill between file and result leaves a file; it says where its base's was, which may have moved since.
            overwrite=True,
            **shared,
        )
    return {"frames": fitted.frames}


def weights_of(work: Workshop, cell: Cell) -> Path | None:
    """The weights of the encoder whose tokens a cell extracts, where they are now; None for those that have no file of their own."""
    if "fit" in cell.inputs:
        return work.place(cell.inputs["fit"])
    return Path(cell.files["weights"]) if "weights" in cell.files else None


def create_encoder(work: Workshop, cell: Cell) -> Encoder:
    """The encoder whose tokens a cell extracts."""
    settings, base = cell.settings, cell.inputs.get("base")
    return encoders.create(
        settings["name"],
        weights=weights_of(work, cell),
        base_weights=cell.files.get("base_weights") if base is None else weights_of(work, base),
        device=work.device,
        **{name: settings[name] for name in AS_CREATED},
    )


def do_extract(work: Workshop, cell: Cell) -> dict[str, Any]:
    """Extract a store from the frames, or derive it from an adapter's base's; and time the encoder alone."""
    encoder, out, dtype = create_encoder(work, cell), work.place(cell), cell.settings["store_dtype"]
    dataset = FrameDataset.open(work.dataset)
    begun = time.perf_counter()
    if "base" in cell.inputs:
        derive(TokenStore.open(work.place(cell.inputs["base"])), encoder, out, dtype=dtype)
    else:
        extract_together(dataset, [(encoder, out)], dtype=dtype, batch=work.batch)
    seconds = time.perf_counter() - begun
    store = TokenStore.open(out)
    frames = dataset.read_shard(0)[:TIMED_FRAMES]
    encoder(frames[: work.batch])  # the first call pays for set-up
    begun = time.perf_counter()
    for start in range(0, len(frames), work.batch):
        encoder(frames[start : start + work.batch])
    speed = len(frames) / (time.perf_counter() - begun)
    return {
        "token_grid": list(store.card.token_grid),
        "token_dim": store.card.token_dim,
        "bytes_per_frame": store.card.token_bytes / store.card.frames,
        "frames": len(store),
        "extract_seconds": seconds,
        "encode_frames_per_second": speed,
        "encoder_parameters": _count(encoder.backbone) + _count(encoder.head),
        "derived": "base" in cell.inputs,
        "weights_sha256": encoder.weights_sha256,
        "source": encoder.source,
        "identity": store.identity.digest(),
    }


def do_probe(work: Workshop, cell: Cell) -> dict[str, Any]:
    """Probe a store, and draw its distances where its frames show a maze."""
    store = work.place(cell.inputs["extract"])
    found = probe(store, dataset=work.dataset, frames=cell.settings["frames"])
    if found.nearest is not None:
        make_folder(work.place(cell).parent)
        draw_probe(store, work.place(cell), dataset=work.dataset)
    return found.to_json()


def do_train(work: Workshop, cell: Cell) -> dict[str, Any]:
    """Train a world model, and measure its open-loop rollouts on episodes that were not trained on."""
    run, options = work.place(cell), TrainOptions(**cell.settings)
    path = work.place(cell.inputs["extract"])
    train(path, run, options)
    store, device = TokenStore.open(path), choose_device(options.device)
    model = load_model(run, device)
    error, copying = rollout_errors(
        model, validation_windows(store, options), device, choose_dtype(options.dtype, device)
    )
    variance = token_variance(store)
    return {
        "parameters": _count(model),
        "skill": skills(error, copying),
        "error": nulls((error / variance).tolist()),
        "copying": nulls((copying / variance).tolist()),
    }


def token_variance(store: TokenStore) -> float:
    """Variance over frames of a token's channel, mean over tokens and channels: the error of imagining the mean frame, always."""
    frames = np.linspace(0, len(store) - 1, min(len(store), VARIANCE_FRAMES)).astype(int)
    return float(store.gather(frames).astype(np.float32).var(0).mean())


def do_plan(work: Workshop, cell: Cell) -> dict[str, Any]:
    """Plan with a run, and keep which episodes reached their goals."""
    out, options = work.place(cell), PlanOptions(**{"strict": False, **cell.settings, **cell.files})
    extracted = cell.inputs["extract"]
    # The run knows where both were when it was trained; the study may have moved since.
    weights, cache = weights_of(work, extracted), work.place(extracted)
    setting = EvalContext(work.place(cell.inputs["train"]), options, weights=weights, cache=cache)
    episodes, results = evaluate(setting, options, out)
    write_episodes(out / "episodes.parquet", episodes)
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished)
    distances = episodes.distances()
    reached = {str(at): (distances < at).any(1).astype(int).tolist() for at in (*THRESHOLDS, options.threshold)}
    return {**results, "reached": reached}


STAGES = {"fit": do_fit, "extract": do_extract, "probe": do_probe, "train": do_train, "plan": do_plan}


def do_cell(work: Workshop, cell: Cell, *, resumed: bool, shared: Mapping[str, Any]) -> None:
    """Do a cell and write its result.

    Args:
        work, cell: what to do, and where.
        resumed: whether an earlier run had begun it. shared: of its result, what was measured before.

    Raises:
        UserError: it cannot be done.
    """
    begun = time.perf_counter()
    result = {**STAGES[cell.stage](work, cell), **shared}
    seconds = time.perf_counter() - begun
    inputs = {role: f"{other.stage}-{other.key}" for role, other in cell.inputs.items()}
    known = {"stage": cell.stage, "label": cell.label, "settings": cell.settings, "inputs": inputs}
    write_json(work.file(cell), {**known, "seconds": seconds, "resumed": resumed, "result": result})


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
