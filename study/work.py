"""How each kind of cell is done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from wmcache.cache.store import TokenStore
from wmcache.common.device import choose_device, choose_dtype
from wmcache.common.files import make_folder
from wmcache.common.jsonfiles import nulls, write_json
from wmcache.pipeline import encoders
from wmcache.pipeline.derive import derive
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.fit import fit, fit_adapter
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.pictures import draw_probe
from wmcache.pipeline.probe import probe
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import evaluate
from wmcache.planner.episodes import THRESHOLDS
from wmcache.planner.options import PlanOptions
from wmcache.planner.report import write_episodes
from wmcache.study.cells import ENCODER_OPTIONS, Cell, Workspace
from wmcache.trainer.models.base import rollout_errors, skills
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train, validation_windows

TIMED_FRAMES = 64
VARIANCE_FRAMES = 512


def do_cell(work: Workspace, cell: Cell, *, resumed: bool, shared: Mapping[str, Any]) -> None:
    """Do a cell, which an earlier run may have started, and write its result, with figures that were measured before."""
    start = time.perf_counter()
    result = {**STAGES[cell.stage](work, cell), **shared}
    seconds = time.perf_counter() - start
    inputs = {role: f"{other.stage}-{other.key}" for role, other in cell.inputs.items()}
    known = {"stage": cell.stage, "label": cell.label, "settings": cell.settings, "inputs": inputs}
    write_json(work.file(cell), {**known, "seconds": seconds, "resumed": resumed, "result": result})


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
        extract_together(dataset, [(encoder, out)], dtype=dtype, batch=work.batch)
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
    run, options = work.product(cell), TrainOptions(**cell.settings)
    path = work.product(cell.inputs["extract"])
    train(path, run, options)
    store, device = TokenStore.open(path), choose_device(options.device)
    model = load_model(run, device)
    dtype = choose_dtype(options.dtype, device)
    error, copying = rollout_errors(model, validation_windows(store, options), device, dtype)
    variance = token_variance(store)
    return {
        "parameters": _count(model),
        "skill": skills(error, copying),
        "error": nulls((error / variance).tolist()),
        "copying": nulls((copying / variance).tolist()),
    }


def _plan(work: Workspace, cell: Cell) -> dict[str, Any]:
    out, options = work.product(cell), PlanOptions(**{"strict": False, **cell.settings, **cell.files})
    extracted = cell.inputs["extract"]
    # The run records where both were when it was trained; the study may have moved since.
    weights, cache = _weights_of(work, extracted), work.product(extracted)
    setting = EvalContext(work.product(cell.inputs["train"]), options, weights=weights, cache=cache)
    episodes, results = evaluate(setting, options, out)
    write_episodes(out / "episodes.parquet", episodes)
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished)
    distances = episodes.distances()
    reached = {str(at): (distances < at).any(1).astype(int).tolist() for at in (*THRESHOLDS, options.threshold)}
    return {**results, "reached": reached}


STAGES = {"fit": _fit, "extract": _extract, "probe": _probe, "train": _train, "plan": _plan}


def _weights_of(work: Workspace, cell: Cell) -> Path | None:
    # The present path of the encoder's weights; the run recorded an earlier one.
    if "fit" in cell.inputs:
        return work.product(cell.inputs["fit"])
    return Path(cell.files["weights"]) if "weights" in cell.files else None


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
