"""Cells: the parts of a study. A cell's key is the SHA-256 of its settings and its inputs' keys, down to the dataset's fingerprint.

Its result appears in `cells/<stage>-<key>.json` when it is done. Its product is in `encoders/`, `stores/`, `runs/`, `actors/`, `plans/` or
`probes/` under the same key, so a cell that was killed resumes where its own work can.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from wmcache.cache.store import TokenStore
from wmcache.common.device import choose_device, choose_dtype
from wmcache.common.files import make_folder
from wmcache.common.jsonfiles import nulls, read_json, write_json
from wmcache.common.paths import AnyPath
from wmcache.pipeline import encoders
from wmcache.pipeline.derive import derive
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract_together, with_log_variances
from wmcache.pipeline.fit import fit, fit_adapter
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.options import EncoderOptions
from wmcache.pipeline.pictures import draw_probe
from wmcache.pipeline.probe import probe
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate, remove_unfinished
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_episodes
from wmcache.study.models import UNTRAINED
from wmcache.trainer.actor import load_actor, train_actor
from wmcache.trainer.models import WorldModel, rollout_errors, skills
from wmcache.trainer.options import ActorOptions, TrainOptions
from wmcache.trainer.runs import load_trained
from wmcache.trainer.train import train, validation_windows

FORMAT = 1
"""Of results; raised when a cell's work changes, and with it the meaning of its numbers."""

PRODUCTS = {
    "fit": ("encoders", ".safetensors"),
    "extract": ("stores", ".zarr"),
    "probe": ("probes", ".png"),
    "train": ("runs", ""),
    "actor": ("actors", ""),
    "plan": ("plans", ""),
}
"""Stage -> folder and suffix of its product."""

TIMED_FRAMES = 64
VARIANCE_FRAMES = 512
ENCODER_OPTIONS = tuple(item.name for item in fields(EncoderOptions))


@dataclass(frozen=True, eq=False)
class Cell:
    """A part of a study; label and files are not a part of its key, so files may move.

    Attributes:
        stage: in PRODUCTS.
        name: of the encoder.
        settings: plain JSON values; of files the SHA-256 of their content.
        how: settings that change no result, and so no key.
        inputs: role -> the cell whose result it takes.
        files: setting -> path.
    """

    stage: str
    name: str
    label: str
    settings: dict[str, Any]
    inputs: Mapping[str, Cell] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """All settings that the work takes."""
        return {**self.settings, **self.how}

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


def do_cell(work: Workspace, cell: Cell, *, resumed: bool, shared: Mapping[str, Any]) -> None:
    """Do a cell, which an earlier run may have started, and write its result, with figures that were measured before."""
    start = time.perf_counter()
    result = {**STAGES[cell.stage](work, cell), **shared}
    seconds = time.perf_counter() - start
    inputs = {role: f"{other.stage}-{other.key}" for role, other in cell.inputs.items()}
    known = {"stage": cell.stage, "label": cell.label, "settings": cell.settings, "inputs": inputs}
    write_json(work.file(cell), {**known, "seconds": seconds, "resumed": resumed, "result": result})
    remove_unfinished(work.product(cell))


def create_encoder(work: Workspace, cell: Cell) -> Encoder:
    """Create the encoder of an extraction."""
    settings, base = cell.settings, cell.inputs.get("base")
    return encoders.create(
        settings["name"],
        weights=_weights_of(work, cell),
        base_weights=cell.files.get("base_weights") if base is None else _weights_of(work, base),
        device=work.device,
        **{name: settings[name] for name in ENCODER_OPTIONS},
    )


def token_variance(store: TokenStore) -> float:
    """The variance over frames of a token's channel, mean over tokens and channels: the error of always imagining the mean frame."""
    frames = np.linspace(0, len(store) - 1, min(len(store), VARIANCE_FRAMES)).astype(int)
    return float(store.gather(frames).astype(np.float32).var(0).mean())


def _fit(work: Workspace, cell: Cell) -> dict[str, Any]:
    name, dataset = cell.settings["name"], FrameDataset.open(work.dataset)
    what = (name, work.product(cell), encoders.fit_options(name, cell.settings["options"]))
    shared = {"max_frames": cell.settings["max_frames"], "device": work.device, "measure": False}
    if (base := cell.inputs.get("base")) is None:
        return {"frames": fit(dataset, *what, **shared).frames}
    # A file without a result is from a kill in between; it records its base's location, which may have changed.
    shared |= {"dataset": dataset, "base_weights": _weights_of(work, base), "overwrite": True}
    return {"frames": fit_adapter(TokenStore.open(work.product(base)), *what, **shared).frames}


def _extract(work: Workspace, cell: Cell) -> dict[str, Any]:
    encoder, out, dtype = create_encoder(work, cell), work.product(cell), cell.settings["store_dtype"]
    dataset = FrameDataset.open(work.dataset)
    start = time.perf_counter()
    if "base" in cell.inputs:
        derive(TokenStore.open(work.product(cell.inputs["base"])), encoder, out, dtype=dtype)
    else:
        extract_together(dataset, with_log_variances([(encoder, out)]), dtype=dtype, batch=work.batch)
    seconds = time.perf_counter() - start
    store = TokenStore.open(out)
    return {
        "token_grid": list(store.card.token_grid),
        "token_dim": store.card.token_dim,
        "bytes_per_frame": store.card.token_bytes / store.card.frames,
        "frames": len(store),
        "extract_seconds": seconds,
        "encode_frames_per_second": _speed(encoder, dataset, work.batch),
        "encoder_parameters": _count(encoder.backbone) + _count(encoder.head),
        "derived": "base" in cell.inputs,
        "weights_sha256": encoder.weights_sha256,
        "source": encoder.source,
        "identity": store.identity.digest(),
    }


def _speed(encoder: Encoder, dataset: FrameDataset, batch: int) -> float:
    frames = dataset.read_shard(0)[:TIMED_FRAMES]
    encoder(frames[:batch])  # the first call includes set-up
    start = time.perf_counter()
    for first in range(0, len(frames), batch):
        encoder(frames[first : first + batch])
    return len(frames) / (time.perf_counter() - start)


def _probe(work: Workspace, cell: Cell) -> dict[str, Any]:
    store = work.product(cell.inputs["extract"])
    found = probe(store, dataset=work.dataset, frames=cell.settings["frames"])
    if found.nearest is not None:
        make_folder(work.product(cell).parent)
        draw_probe(store, work.product(cell), dataset=work.dataset)
    return found.to_json()


def _train(work: Workspace, cell: Cell) -> dict[str, Any]:
    run, options = work.product(cell), TrainOptions(**cell.arguments)
    path = work.product(cell.inputs["extract"])
    train(path, run, options)
    store, device = TokenStore.open(path), choose_device(options.device)
    model = load_trained(run, device)
    if not isinstance(model, WorldModel):
        return {"parameters": _count(model)}
    dtype = choose_dtype(options.dtype, device)
    error, copying = rollout_errors(model, validation_windows(store, options), device, dtype)
    variance = token_variance(store)
    return {
        "parameters": _count(model),
        "skill": skills(error, copying),
        "error": nulls((error / variance).tolist()),
        "copying": nulls((copying / variance).tolist()),
    }


def _actor(work: Workspace, cell: Cell) -> dict[str, Any]:
    run, out, options = work.product(cell.inputs["train"]), work.product(cell), ActorOptions(**cell.arguments)
    found = train_actor(run, out, options, cache=work.product(cell.inputs["extract"]))
    return {**found, "parameters": _count(load_actor(out, run, choose_device(options.device))[1].actor)}


def _plan(work: Workspace, cell: Cell) -> dict[str, Any]:
    out, settings, extracted = work.product(cell), {**cell.arguments, **cell.files}, cell.inputs["extract"]
    untrained = settings.pop(UNTRAINED, False)
    if actor := cell.inputs.get("actor"):
        settings["policy"] = str(work.product(actor))
    options = PlanOptions(**{"strict": False, **settings})
    # The run records where both were when it was trained; the study may have moved since.
    where = {"weights": _weights_of(work, extracted), "cache": work.product(extracted)}
    setting = EvalContext(work.product(cell.inputs["train"]), options, **where, untrained=untrained)
    episodes, results = evaluate(setting, options, out)
    write_episodes(out / "episodes.parquet", episodes, results)
    thresholds = [judged["threshold"] for judged in results["by_threshold"]]
    distances = episodes.distances()
    return {**results, "reached": {str(at): (distances < at).any(1).astype(int).tolist() for at in thresholds}}


STAGES = {"fit": _fit, "extract": _extract, "probe": _probe, "train": _train, "actor": _actor, "plan": _plan}


def _weights_of(work: Workspace, cell: Cell) -> Path | None:
    # The present path of the encoder's weights; the run recorded an earlier one.
    if "fit" in cell.inputs:
        return work.product(cell.inputs["fit"])
    return Path(cell.files["weights"]) if "weights" in cell.files else None


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
