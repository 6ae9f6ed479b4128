"""The encoder of a DisWM student: its stores are those of its means, differ with its checkpoint, and are drawn by the base's decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.derive import create_for, derive
from wmcache.pipeline.encoders.vae import VaeOptions
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import fit
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model
from wmcache.trainer.train import train

SIZES: dict[str, Any] = {"deter": 6, "stoch": 4, "hidden": 8, "z_dim": 3, "sequence": 4}


@pytest.fixture(scope="module")
def store(dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Of a VAE, which has a decoder."""
    folder = tmp_path_factory.mktemp("vae")
    fit(dataset, "vae", folder / "vae.safetensors", VaeOptions(steps=2, batch=8), max_frames=1000, device="cpu")
    extract(dataset, encoders.create("vae", weights=folder / "vae.safetensors", device="cpu"), folder / "vae-64.zarr")
    return TokenStore.open(folder / "vae-64.zarr")


@pytest.fixture(scope="module")
def student(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for 2 steps, then for 4."""
    run = tmp_path_factory.mktemp("runs") / "student"
    options = TrainOptions(model="diswm", model_options=SIZES, steps=2, batch=4, dtype="float32", device="cpu")
    train(store.path, run, options)
    train(store.path, run, replace(options, steps=4), resume=True)
    return run


def test_stores_of_two_checkpoints_differ_in_their_identity(
    store: TokenStore, student: Path, dataset: FrameDataset, tmp_path: Path
) -> None:
    made = []
    for step in (2, 4):
        weights = student / f"encoder-{step:08d}.safetensors"
        encoder = create_for(store, "diswm", weights=weights, base_weights=None, device="cpu")
        derive(store, encoder, tmp_path / f"{step}.zarr")
        made.append(TokenStore.open(tmp_path / f"{step}.zarr"))
    (different,) = made[0].identity.differences(made[1].identity)
    assert different.startswith("weights_sha256")
    model: Any = load_model(student, torch.device("cpu"))
    tokens = torch.from_numpy(store.gather(np.arange(20))).float()
    expected = model.embed(((tokens - model.tokens_mean) / model.tokens_std).flatten(1), tokens[:, 0, :0])
    found = torch.from_numpy(made[1].gather(np.arange(20)))
    torch.testing.assert_close(found[:, 0].float(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=r"2\.zarr"):
        derive(store, encoder, tmp_path / "2.zarr")
    extract(dataset, encoder, tmp_path / "extracted.zarr")
    extracted = TokenStore.open(tmp_path / "extracted.zarr")
    assert extracted.identity == made[1].identity
    np.testing.assert_allclose(extracted.gather(np.arange(20)), found, rtol=1e-2, atol=1e-2)


def test_the_decoder_of_the_base_draws_its_tokens(store: TokenStore, student: Path, tmp_path: Path) -> None:
    weights = student / "encoder-00000004.safetensors"
    encoder = encoders.create("diswm", weights=weights, device="cpu")
    base = encoders.create_again(store.card.encoder, device="cpu")
    model: Any = load_model(student, torch.device("cpu"))
    latents = torch.randn(5, 1, 3)
    redrawn = model.decoder.tokens(latents).unflatten(-1, (1, -1))[:, 0] * model.tokens_std + model.tokens_mean
    np.testing.assert_allclose(encoder.decode(latents), base.decode(redrawn), atol=1)
    options = TrainOptions(
        model="diswm", model_options=SIZES | {"redraw_weight": 0.0}, steps=1, batch=4, dtype="float32", device="cpu"
    )
    train(store.path, tmp_path / "run", options)
    encoder = encoders.create("diswm", weights=tmp_path / "run" / "encoder-00000001.safetensors", device="cpu")
    with pytest.raises(UserError, match="diswm"):
        encoder.decode(latents)
    with pytest.raises(UserError, match=r"--weights.*wmtrain --model diswm"):
        encoders.create("diswm", device="cpu")
