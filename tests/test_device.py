"""A device computes what the CPU computes. `WMCACHE_TEST_DEVICE=cuda pytest tests/test_device.py` tests a GPU; by default it is the CPU."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wmcache.bench.compare import Contender, compare_speed
from wmcache.cache import TokenStore
from wmcache.common.device import CPU, autocast, choose_device
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import COSINE_TOLERANCE
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.planner.context import EvalContext
from wmcache.planner.evaluate import run_episodes
from wmcache.planner.options import PlanOptions
from wmcache.trainer.models import build
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import train

sys.path.insert(0, str(Path(__file__).parent / "trainer"))

from model_tools import DDP_SIZES, SHAPE, SIZES, make_batch, make_statistics, randomise

NAME = os.environ.get("WMCACHE_TEST_DEVICE", "cpu")
DEVICE = choose_device(NAME)
# Models whose loss draws nothing: a device draws other numbers.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dino-wm": ("dino-wm", SIZES),
    "dino-wm, the reference's": ("dino-wm", {**SIZES, "proprio": "embedding", "predict": "frame", "width": 0}),
    "dino-wm, jepa-wm's": ("dino-wm", {**SIZES, "condition": "adaln", "position": "rope"}),
    "vjepa2-ac": ("vjepa2-ac", {"width": 32, "depth": 1, "heads": 2, "auto_steps": 1, "normalize": "layer"}),
    "mdn-rnn": ("mdn-rnn", {"hidden": 8}),
}
SEARCHES: dict[str, dict[str, Any]] = {
    "cem": {"samples": 8, "elites": 3, "iterations": 2},
    "icem": {"samples": 8, "elites": 3, "iterations": 2},
    "mppi": {"samples": 8, "elites": 3, "iterations": 2},
    "gd": {"steps": 2, "restarts": 2},
}


def on_each(name: str, options: dict[str, Any]) -> list[Any]:
    """The same random weights on the CPU and on the device."""
    models = []
    for device in (CPU, DEVICE):
        torch.manual_seed(0)
        models.append(randomise(build(name, replace(SHAPE, history=1), options, make_statistics())).eval().to(device))
    return models


@pytest.mark.parametrize("kind", MODELS)
def test_losses_gradients_and_rollouts_are_those_of_the_cpu(kind: str) -> None:
    batch, losses, gradients, latents = make_batch(batch=4, frames=2), [], [], []
    for model in on_each(*MODELS[kind]):
        here = {name: value.to(model.action_mean.device) for name, value in batch.items()}
        losses.append(model.loss(here)["loss"].detach().cpu())
        model.loss(here)["loss"].backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
        with torch.inference_mode():
            belief = model.observe(model.start(4), here["tokens"][:, 0], here["proprio"][:, 0], None)
            latents.append(model.imagine(belief, here["action"][:, None]).latents.cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-3, atol=1e-3 * latents[0].abs().max().item())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name].cpu(), gradient, rtol=1e-3, atol=1e-3 * largest + 1e-6, msg=name)


def test_bfloat16_is_close_to_float32() -> None:
    model, batch = (
        on_each("dino-wm", SIZES)[1],
        {name: value.to(DEVICE) for name, value in make_batch(batch=4, frames=2).items()},
    )
    exact = model.loss(batch)["loss"]
    with autocast(DEVICE, torch.bfloat16):
        rounded = model.loss(batch)["loss"]
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extracted_tokens_are_those_of_the_cpu(
    dataset: FrameDataset, store: TokenStore, tcn_weights: Path, tmp_path: Path, dtype: str
) -> None:
    encoder = encoders.create("tcn", weights=tcn_weights, device=NAME, dtype=dtype)
    extract(dataset, encoder, tmp_path / "store.zarr", batch=16)
    found, every = TokenStore.open(tmp_path / "store.zarr"), np.arange(len(store))
    tokens, expected = (torch.from_numpy(it.gather(every)).float().flatten(1) for it in (found, store))
    assert torch.cosine_similarity(tokens, expected).min() > COSINE_TOLERANCE
    if dtype == "float32":
        torch.testing.assert_close(tokens, expected, rtol=1e-2, atol=5e-3)


@pytest.fixture(scope="module")
def trained(store_path: Path, tiny: TrainOptions, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of the same steps on the CPU, and on the device from each residence."""
    folder, options = tmp_path_factory.mktemp("devices"), replace(tiny, model_options={**SIZES, "dropout": 0.0})
    where = {"cpu": ("cpu", "disk"), **{residence: (NAME, residence) for residence in ("device", "ram", "disk")}}
    for name, (device, residence) in where.items():
        train(store_path, folder / name, replace(options, device=device, residence=residence))
    return {name: folder / name for name in where}


@pytest.mark.parametrize("residence", ["device", "ram", "disk"])
def test_a_run_on_the_device_learns_what_one_on_the_cpu_does(trained: dict[str, Path], residence: str) -> None:
    first, other = (
        [json.loads(line) for line in (trained[name] / "metrics.jsonl").read_text().splitlines()]
        for name in ("cpu", residence)
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (first, other)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_a_stopped_run_goes_on_on_the_device(
    store_path: Path, tiny: TrainOptions, trained: dict[str, Path], tmp_path: Path
) -> None:
    options = replace(tiny, model_options={**SIZES, "dropout": 0.0}, device=NAME, residence="device")
    for steps in (4, 8):
        train(store_path, tmp_path / "run", replace(options, steps=steps, decay=0.0, warmup=0.0), resume=steps > 4)
    train(store_path, tmp_path / "straight", replace(options, decay=0.0, warmup=0.0))
    found, straight = (
        load_file(last_checkpoint(tmp_path / name) / "model.safetensors") for name in ("run", "straight")
    )
    for name, value in straight.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("solver", SEARCHES)
def test_a_run_of_the_cpu_plans_on_the_device(run_path: Path, tiny_plan: PlanOptions, solver: str) -> None:
    options = replace(tiny_plan, solver=solver, search=SEARCHES[solver], device=NAME, episodes=1)
    episodes = run_episodes(EvalContext(run_path, options), options, [0])
    assert np.isfinite(episodes.states).all()
    if solver == "cem":  # gradients and weights of candidates amplify rounding
        usual = replace(options, device="cpu")
        expected = run_episodes(EvalContext(run_path, usual), usual, [0])
        np.testing.assert_allclose(episodes.states[:, :5], expected.states[:, :5], atol=1e-2)


def test_graph_distance_and_a_sparse_model_plan_on_the_device(
    run_path: Path, ddp_run: Path, tiny_plan: PlanOptions
) -> None:
    options = replace(tiny_plan, device=NAME, episodes=1)
    for run, chosen in ((run_path, replace(options, distance="graph")), (ddp_run, options)):
        assert np.isfinite(run_episodes(EvalContext(run, chosen), chosen, [0]).states).all()
    found = compare_speed([Contender("ddp", EvalContext(ddp_run, options), options)])["ddp"]
    assert found["share_of_limit"] > 0


def test_the_loss_of_a_sparse_model_is_that_of_the_cpu() -> None:
    changes = torch.rand(4, 2, SHAPE.tokens, 4, generator=torch.Generator().manual_seed(4)).pow(16).half()
    batch, losses = {**make_batch(batch=4, frames=2), "changes": changes}, []
    for model in on_each("ddp-wm", DDP_SIZES):
        model.begin("localization")
        here = {name: value.to(model.action_mean.device) for name, value in batch.items()}
        losses.append(model.loss(here)["loss"].detach().cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
