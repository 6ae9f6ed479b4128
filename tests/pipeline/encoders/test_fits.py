"""What all encoders that are fitted have in common."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline import fit as fit_module
from wmcache.pipeline.encoders import Encoder, FitOptions
from wmcache.pipeline.encoders.base import EARLY, LAST, Features
from wmcache.pipeline.encoders.dino_tok import DinoTokOptions, DinoTokVqOptions
from wmcache.pipeline.encoders.pca import PcaOptions
from wmcache.pipeline.encoders.tcn import TcnOptions
from wmcache.pipeline.encoders.vae import BetaVaeOptions, VaeOptions
from wmcache.pipeline.encoders.vfm_vae import VfmVaeOptions
from wmcache.pipeline.extract import extract
from wmcache.pipeline.fit import FitTask, fit, fit_adapter
from wmcache.pipeline.frames import FrameDataset

ADAPTERS: dict[str, FitOptions] = {
    "pca": PcaOptions(dim=8),
    "dino-tok": DinoTokOptions(steps=4, batch=16, shallow=6),
    "dino-tok-vq": DinoTokVqOptions(steps=4, batch=16, shallow=6, codes=24),
    "vfm-vae": VfmVaeOptions(steps=4, batch=16, latent=8),
}
ON_FRAMES: dict[str, FitOptions] = {
    "tcn": TcnOptions(steps=4, batch=8),
    "vae": VaeOptions(steps=4, batch=4),
    "beta-vae": BetaVaeOptions(steps=4, batch=4, latent=3, foreground=True),
}
TRAINED = [*ON_FRAMES, *(name for name in ADAPTERS if name != "pca")]


@pytest.fixture
def fit_any(dataset: FrameDataset, tcn_layers: TokenStore, tmp_path: Path) -> Callable[..., Encoder]:
    """(name, file name) -> the encoder, fitted for a few steps."""

    def run(name: str, out: str = "fit") -> Encoder:
        path = tmp_path / f"{out}.safetensors"
        if name in ADAPTERS:
            fit_adapter(tcn_layers, name, path, ADAPTERS[name], max_frames=1000, device="cpu")
        else:
            fit(dataset, name, path, ON_FRAMES[name], max_frames=80, device="cpu", measure=False)
        return encoders.create(name, weights=path, device="cpu")

    return run


@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_fit_continues_to_the_same_weights_and_leaves_only_them(
    fit_any: Callable[..., Encoder], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, before_step, steps = fit_any(name, "whole"), FitTask.before_step, list[int]()

    def stop_once(task: FitTask, step: int) -> None:
        before_step(task, step)
        steps.append(step)
        if steps == [0, 1, 2]:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FitTask, "before_step", stop_once)
    with pytest.raises(KeyboardInterrupt):
        fit_any(name, "cut")
    assert not (tmp_path / "cut.safetensors").exists()
    (tmp_path / ".cut.safetensors.partial").touch()  # of an older version
    assert fit_any(name, "cut").weights_sha256 == expected.weights_sha256
    assert steps == [0, 1, 2, 3]
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_live_frames_give_the_bits_that_cached_features_give(
    layers: TokenStore,
    dataset: FrameDataset,
    fitted: Callable[..., Encoder],
    restored: Callable[[TokenStore, int], Features],
    name: str,
) -> None:
    encoder = fitted(layers, name, ADAPTERS[name])
    live = encoder(dataset.read_shard(0)[:32])
    torch.testing.assert_close(encoder.tokens(restored(layers, 32)), live, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["dino-tok", "dino-tok-vq", "vfm-vae"])
def test_a_decoder_of_pixels_needs_frames_and_every_decoder_needs_the_layers(
    store: TokenStore, tcn_layers: TokenStore, dataset: FrameDataset, fitted: Callable[..., Encoder], name: str
) -> None:
    pixels = replace(ADAPTERS[name], steps=1, batch=4, decoder="pixels")
    with pytest.raises(UserError, match=rf"{name}.*--dataset.*--decoder"):
        fitted(tcn_layers, name, pixels)
    assert fitted(tcn_layers, name, pixels, dataset).frame_shape[0] == 4
    with pytest.raises(UserError, match=rf"{EARLY}.*{LAST}.*--encoder"):
        fitted(store, name, ADAPTERS[name], out="other")


@pytest.mark.parametrize("name", ["tcn", "vae", "dino-tok"])
def test_weights_that_do_not_fit_are_refused(fit_any: Callable[..., Encoder], tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"wmcache fit --encoder {name}"):
        encoders.create(name)
    good = fit_any(name).weights
    assert good is not None
    tensors, header = load_file(good), fit_module.read_fit(good)
    first = sorted(tensors)[0]
    cases: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "less": ({key: value for key, value in tensors.items() if key != first}, header),
        "bare": (tensors, {"encoder": name}) if name != "tcn" else ({"other": torch.zeros(3)}, {}),
        "other": (tensors, {**header, "encoder": "something"}) if name != "tcn" else ({}, {}),
        "infinite": ({**tensors, first: torch.full_like(tensors[first], torch.inf)}, header),
    }
    for case, content in cases.items():
        file = tmp_path / f"{case}.safetensors"
        save_file(content[0], file, content[1])
        with pytest.raises(UserError, match=rf"{case}\.safetensors"):
            encoders.create(name, weights=file, device="cpu")


def test_a_base_is_found_at_its_path_or_beside_the_adapter_and_no_other_is_taken(
    dataset: FrameDataset, tcn_weights: Path, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    old, frames = there / "tcn.safetensors", dataset.read_shard(0)[:4]
    shutil.copy(tcn_weights, old)
    store, out = there / "layers.zarr", here / "dino-tok.safetensors"
    extract(dataset, encoders.create("tcn-layers", weights=old, device="cpu"), store)
    fit_adapter(TokenStore.open(store), "dino-tok", out, ADAPTERS["dino-tok"], max_frames=1000, device="cpu")
    expected = encoders.create("dino-tok", weights=out, device="cpu")(frames)
    moved = Path(shutil.move(old, here / old.name))
    assert torch.equal(encoders.create("dino-tok", weights=out, device="cpu")(frames), expected)
    moved.unlink()
    with pytest.raises(UserError, match=r"tcn\.safetensors.*--base-weights"):
        encoders.create("dino-tok", weights=out, device="cpu")
    other = fit(dataset, "tcn", here / "b.safetensors", TcnOptions(steps=1, batch=16), max_frames=1000, device="cpu")
    with pytest.raises(UserError, match=r"tcn-layers.*--base-weights"):
        encoders.create("dino-tok", weights=out, base_weights=other.weights, device="cpu")
    with pytest.raises(UserError, match=r"dino-tok, .*dino-tok-vq"):
        encoders.create("dino-tok-vq", weights=out, device="cpu")
    header = json.loads(fit_module.read_fit(out)["options"])
    assert header == asdict(ADAPTERS["dino-tok"])
