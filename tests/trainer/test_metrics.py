"""Comparison of images: MSE, SSIM, LPIPS, and the pixels that move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wmcache.common.errors import UserError
from wmcache.trainer.metrics import ImageMetrics, summarise, to_pixels, to_unit

CPU = torch.device("cpu")


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
