from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wmcache.cache.windows import split_episodes
from wmcache.common.device import CPU
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import Preprocess
from wmcache.pipeline.encoders.fitting import FitData
from wmcache.pipeline.encoders.tcn import TcnOptions
from wmcache.pipeline.fit import FitTask, Fitted, fit, load_images, read_fit
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import create_encoders, default_weights


def fit_on_cpu(
    dataset: FrameDataset, out: Path, options: TcnOptions, *, max_frames: int = 1000, **more: bool
) -> Fitted:
    return fit(dataset, "tcn", out, options, max_frames=max_frames, device="cpu", **more)


def test_the_same_fit_again_only_measures(dataset: FrameDataset, tcn_weights: Path) -> None:
    before, time = tcn_weights.read_bytes(), tcn_weights.stat().st_mtime_ns
    again = fit_on_cpu(dataset, tcn_weights, TcnOptions(steps=20, batch=16))
    assert tcn_weights.read_bytes() == before
    assert tcn_weights.stat().st_mtime_ns == time
    # Untrained networks have about 0 here: a few steps must already show.
    assert 0.3 < again.landscape.spearman <= 1.0
    assert 0.0 <= again.landscape.stuck < 0.6
    assert again.frames == 5 * 60


def test_weights_of_other_frames_are_no_default(
    dataset: FrameDataset, tcn_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path))
    mine = default_weights(dataset.card.name, "tcn")
    mine.parent.mkdir()
    mine.write_bytes(tcn_weights.read_bytes())
    (encoder,) = create_encoders(dataset.card, encoder="tcn", device="cpu")
    other = replace(dataset.card, fingerprint="0" * 64)
    with pytest.raises(UserError, match=f"{mine} .*--weights"):
        create_encoders(other, encoder="tcn", device="cpu")
    (same,) = create_encoders(other, encoder="tcn", weights=[str(mine)], device="cpu")
    assert same.weights_sha256 == encoder.weights_sha256


def test_other_files_are_kept(dataset: FrameDataset, tcn_weights: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"precious")
    for file in (tcn_weights, mine):
        before = file.read_bytes()
        with pytest.raises(UserError, match=rf"{file}.*--out"):
            fit_on_cpu(dataset, file, TcnOptions(steps=20, batch=16, seed=1))
        assert file.read_bytes() == before


def test_the_same_seed_gives_the_same_weights_and_another_needs_overwrite(
    dataset: FrameDataset, tmp_path: Path
) -> None:
    def weights_hash(out: Path, seed: int, **more: bool) -> str:
        options = TcnOptions(steps=2, batch=16, seed=seed)
        weights = fit_on_cpu(dataset, out, options, max_frames=80, **more).weights
        return encoders.create("tcn", weights=weights, device="cpu").weights_sha256

    first = weights_hash(tmp_path / "a.safetensors", 0)
    assert weights_hash(tmp_path / "b.safetensors", 0) == first
    assert weights_hash(tmp_path / "b.safetensors", 1, overwrite=True) != first
    assert json.loads(read_fit(tmp_path / "b.safetensors")["options"])["seed"] == 1
    assert read_fit(tmp_path / "b.safetensors")["frames"] == "80"


def test_a_fit_with_other_options_does_not_continue_a_stopped_one(
    dataset: FrameDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights_hash(name: str, seed: int) -> str:
        out = fit_on_cpu(dataset, tmp_path / f"{name}.safetensors", TcnOptions(steps=3, batch=16, seed=seed)).weights
        return encoders.create("tcn", weights=out, device="cpu").weights_sha256

    with monkeypatch.context() as patch:
        patch.setattr(FitTask, "before_step", lambda task, step: step and os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            weights_hash("changed", 0)
    assert weights_hash("changed", 1) == weights_hash("straight", 1)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["changed", "straight"]


def test_a_fit_whose_loss_is_not_finite_leaves_no_file(dataset: FrameDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"new\.safetensors.*--lr"):
        fit_on_cpu(dataset, tmp_path / "new.safetensors", TcnOptions(steps=20, batch=8, learning_rate=1e30))
    assert list(tmp_path.iterdir()) == []


def test_training_images_are_what_the_encoder_sees(dataset: FrameDataset, encoder: Encoder) -> None:
    train = split_episodes(6, "train", 42)
    chosen = np.flatnonzero(np.isin(dataset.steps.episode, train))[10:150]
    images = load_images(dataset, chosen, encoder.preprocess)
    seen = (encoder.preprocess(torch.from_numpy(dataset.read_frames(chosen))) * 0.5 + 0.5) * 255
    assert images.shape == seen.shape
    assert (images.float() - seen).abs().max() <= 0.5 + 1e-3


def test_training_images_are_preprocessed_once(dataset: FrameDataset) -> None:
    chosen, see = np.arange(8), Preprocess(56, (72,), "imagenet", "bicubic", 0)
    data = FitData(np.zeros(8, np.int64), see, CPU, load_images(dataset, chosen, see))
    # Rounding to whole values, and what bicubic overshoots at the edges of black, are all that may differ.
    seen = see.normalise(see.resize(torch.from_numpy(dataset.read_frames(chosen))).clamp(0, 1))
    torch.testing.assert_close(data.pixels(chosen), seen, atol=0.51 / 255 / 0.224, rtol=0)
