"""Training a decoder: it learns from cached tokens alone, resumes exactly, never spoils another one; and the metrics of its images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from run_tools import files_of, read_log, stopped_at, weights_of

from wmcache.cache import TokenStore
from wmcache.common.errors import UserError
from wmcache.engine.checkpoint import last_checkpoint
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.decoder import choose_frames, load_decoder, train_decoder
from wmcache.trainer.decoders.transposed_conv import TransposedConvDecoder
from wmcache.trainer.decoders.vqvae import VqVaeDecoder
from wmcache.trainer.metrics import ImageMetrics, summarise, to_pixels, to_unit
from wmcache.trainer.options import DecoderOptions

Go = Callable[..., dict[str, Any]]

CPU = torch.device("cpu")
SIZES = {"channels": 8, "residual": 4, "blocks": 1}
TINY = DecoderOptions(
    decoder="vqvae",
    decoder_options=SIZES,
    steps=8,
    batch=8,
    dtype="float32",
    device="cpu",
    log_every=1,
    checkpoint_every=4,
    lpips=False,
)


@pytest.fixture(scope="module")
def go(store_path: Path, dataset: FrameDataset) -> Go:
    """(folder, **options) -> train a decoder with tiny options, changed by these."""

    class Repeated:
        """Frames for a longer store."""

        def read_frames(self, frames: NDArray[np.int64]) -> NDArray[np.uint8]:
            return dataset.read_frames(frames % 360)

    def train(out: Path, *, cache: Path = store_path, overwrite: bool = False, **changed: Any) -> dict[str, Any]:
        return train_decoder(cache, Repeated(), out, replace(TINY, **changed), overwrite=overwrite)

    return train


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def trained(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, so copy it to change it."""
    out = tmp_path_factory.mktemp("decoders") / "tiny"
    go(out, steps=1)
    return out


@pytest.mark.parametrize("sizes", [SIZES, SIZES | {"quantize": True, "codes": 16}], ids=["plain", "quantised"])
def test_a_stopped_decoder_resumes_exactly(go: Go, tmp_path: Path, sizes: dict[str, Any]) -> None:
    straight = go(tmp_path / "straight", decoder_options=sizes)
    with stopped_at(6):
        go(tmp_path / "stopped", decoder_options=sizes)
    assert last_checkpoint(tmp_path / "stopped").name == "step-00000004"
    assert go(tmp_path / "stopped", decoder_options=sizes) == straight
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "straight")


def test_a_finished_decoder_stays_as_it_is_and_so_does_the_store(go: Go, store_path: Path, out: Path) -> None:
    tokens = files_of(store_path)
    first = go(out)
    before = files_of(out)
    assert go(out) == first
    assert (files_of(out), files_of(store_path)) == (before, tokens)
    (out / "validation.json").unlink()
    assert go(out) == first


def test_it_learns_to_draw(go: Go, tmp_path: Path) -> None:
    options = {"decoder_options": SIZES | {"channels": 32, "residual": 8}, "batch": 16, "learning_rate": 3e-3}
    before = go(tmp_path / "before", steps=1, **options)["mse"]
    after = go(tmp_path / "after", steps=200, checkpoint_every=200, **options)["mse"]
    assert after < before


def test_the_default_suits_the_token_grid(go: Go, lone_path: Path, tmp_path: Path) -> None:
    go(tmp_path / "one", cache=lone_path, decoder="auto", decoder_options={"depth": 2}, steps=1)
    go(tmp_path / "grid", decoder="auto", steps=1)
    kinds = [type(load_decoder(tmp_path / name, CPU)) for name in ("one", "grid")]
    assert kinds == [TransposedConvDecoder, VqVaeDecoder]


def test_it_trains_on_train_episodes_and_is_measured_on_the_others(store: TokenStore) -> None:
    frames, held_out = choose_frames(store, replace(TINY, max_frames=10_000))
    assert set(store.episode[frames]).isdisjoint(store.episode[held_out])
    windows = store.windows(1, 1, 5, "val", seed=TINY.split_seed)
    assert set(store.episode[windows.starts]) == set(store.episode[held_out])
    assert len(frames) + len(held_out) == len(store)
    some, _ = choose_frames(store, replace(TINY, max_frames=50))
    assert (len(some), bool((np.diff(some) > 0).all())) == (50, True)
    assert set(some) < set(frames)


def test_a_loaded_decoder_draws_what_was_measured(go: Go, store: TokenStore, dataset: FrameDataset, out: Path) -> None:
    result = go(out)
    model = load_decoder(out, CPU)
    _, held_out = choose_frames(store, TINY)
    drawn = model(torch.from_numpy(store.gather(held_out)))
    real = to_unit(dataset.read_frames(held_out))
    assert float((drawn.clamp(-1, 1) - real).div(2).square().mean()) == pytest.approx(result["mse"], rel=1e-4)
    mean = model.images_mean.expand_as(real)
    assert float((mean - real).div(2).square().mean()) == pytest.approx(result["mean_frame"]["mse"], rel=1e-4)
    assert 0 < result["moving"] < 0.1  # the ball
    assert result["mean_frame"]["moving_mse"] > 10 * result["mean_frame"]["mse"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert result["frames"] == len(held_out)


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 1e-3},
        {"split_seed": 1},
        {"decoder_options": {"channels": 16}},
        {"decoder": "transposed-conv", "decoder_options": {}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_settings_and_stores_are_refused_by_name(
    go: Go, planted_path: Path, trained: Path, out: Path, changed: dict[str, Any]
) -> None:
    copytree(trained, out, symlinks=True)
    before = files_of(out)
    with pytest.raises(UserError, match=f"{out} .*{next(iter(changed))} .*--out"):
        go(out, **changed)
    with pytest.raises(UserError, match="identity"):
        go(out, cache=planted_path, steps=1)
    assert files_of(out) == before


def test_overwrite_starts_from_scratch_and_more_steps_continue(go: Go, tmp_path: Path) -> None:
    go(tmp_path / "out", seed=1)
    go(tmp_path / "out", steps=4, overwrite=True)
    go(tmp_path / "out")
    go(tmp_path / "once")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "once")


def test_a_folder_that_is_not_a_decoder_is_never_touched(go: Go, out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text('{"precious": true}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"{out}.*--out"):
            go(out, overwrite=overwrite)
    assert files_of(out) == {"config.json": b'{"precious": true}'}


def test_options_that_are_refused_cost_no_decoder(go: Go, out: Path) -> None:
    for impossible in ({"learning_rate": 0.0}, {"device": "abacus"}):
        with pytest.raises(UserError):
            go(out, **impossible)
        assert not out.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("decoder_options", {"channels": 10**9}), ("decoder_options", {"channels": 16}), ("split_seed", "x")],
)
def test_settings_that_cannot_be_true_are_refused(trained: Path, out: Path, field: str, value: object) -> None:
    copytree(trained, out, symlinks=True)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=f"{out}"):
        load_decoder(out, CPU)


class TestImageMetrics:
    def test_each_image_is_compared_with_its_own_clipped_to_the_range(self) -> None:
        real = torch.stack([torch.rand(3, 32, 32) * 2 - 1, -torch.ones(3, 32, 32), torch.zeros(3, 32, 32)])
        drawn = torch.stack([real[0], 7 * torch.ones(3, 32, 32), real[2] + 0.5])
        found = ImageMetrics(32, CPU, lpips=False)(drawn, real, real[0])
        np.testing.assert_allclose(found["mse"], [0, 1, 0.0625])
        assert found["ssim"][0] == pytest.approx(1, abs=1e-6)
        assert found["ssim"][1] < 0.01

    def test_only_pixels_unlike_the_mean_frame_move(self) -> None:
        mean, real = torch.zeros(3, 32, 32), torch.zeros(2, 3, 32, 32)
        real[0, 1, :4, :4] = 0.5  # a quarter of the range, in one channel
        real[1, :, 8:, 8:] = 0.1  # too little to count
        metrics = ImageMetrics(32, CPU, lpips=False)
        nothing = metrics(mean.expand(2, -1, -1, -1), real, mean)
        np.testing.assert_allclose(nothing["moving"], [16 / 1024, 0])
        whole = summarise(nothing)
        assert whole["moving"] == pytest.approx(8 / 1024)
        assert whole["moving_mse"] == pytest.approx(0.25**2 / 3)
        assert summarise(metrics(real, real, mean))["moving_mse"] == 0
        assert summarise(metrics(real[1:], real[1:], mean))["moving_mse"] is None

    def test_without_internet_the_reason_names_the_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr("urllib.request.OpenerDirector.open", _no_network)
        found = ImageMetrics(32, CPU)
        assert found.lpips_absent is not None
        assert "alexnet" in found.lpips_absent
        assert "lpips" not in found(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32))
        assert "Downloading" not in "".join(capfd.readouterr())

    def test_with_the_network_it_is_a_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.models import AlexNet_Weights, alexnet

        torch.manual_seed(0)
        weights = alexnet().state_dict()
        # Its layers after the features are large, and LPIPS has no use for them.
        monkeypatch.setattr(AlexNet_Weights, "get_state_dict", lambda *_, **__: weights)
        monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: weights)
        found = ImageMetrics(32, CPU)
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        assert found.lpips_absent is None
        np.testing.assert_allclose(found(images, images, images[0])["lpips"], [0, 0], atol=1e-6)
        assert (found(images, -images, images[0])["lpips"] > 0.01).all()

    def test_images_too_small_to_compare_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"8 px .*11"):
            ImageMetrics(8, CPU)

    def test_pixels_are_converted_and_back_without_loss(self) -> None:
        pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
        np.testing.assert_array_equal(to_pixels(to_unit(pixels)), pixels)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network here")
