"""Distances of drawn images from real ones: MSE, SSIM and, where its weights are available, LPIPS."""

from __future__ import annotations

import contextlib
import io
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from wmcache.common.errors import UserError, reason

MIN_SSIM, MIN_LPIPS = 11, 31  # pixels that the window of SSIM and the layers of AlexNet need
TIMEOUT = 5.0  # seconds to wait for the network
MOVING = 0.1
"""A pixel moves where one of its channels differs from the mean frame by more than this share of the full range."""

Images = NDArray[np.uint8]


def to_unit(images: Images) -> Tensor:
    """Convert uint8 [B, S, S, 3] to float32 [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> Images:
    """Convert float [B, 3, S, S], clipped to [-1, 1], to uint8 [B, S, S, 3]."""
    pixels: Images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels


class ImageMetrics:
    """Compares images; `lpips_absent` is why LPIPS is not available, None where it is."""

    def __init__(self, image_size: int, device: torch.device, *, lpips: bool = True) -> None:
        """Load the network of LPIPS, or download it, unless `lpips` is false; raises UserError for images that are too small for SSIM."""
        if image_size < MIN_SSIM:
            raise UserError(
                f"frames of {image_size} px are too small for SSIM: at least {MIN_SSIM}; collect larger ones"
            )
        self._device = device
        self._lpips: Any = None
        small = f"frames of {image_size} px are smaller than the {MIN_LPIPS} px that it needs"
        self.lpips_absent: str | None = small if lpips else "it was not asked for"
        if lpips and image_size >= MIN_LPIPS:
            self._lpips, self.lpips_absent = _load_lpips(device)

    @torch.no_grad()
    def __call__(self, drawn: Tensor, real: Tensor, mean_frame: Tensor) -> dict[str, NDArray[np.float64]]:
        """Compare pairs of images.

        Args:
            drawn, real: [B, 3, S, S], clipped to [-1, 1]. mean_frame: [3, S, S]; it defines which pixels move.

        Returns:
            float64 [B] each: `mse` of values in [0, 1], `ssim` (Wang et al. 2004, Gaussian window of 11 pixels) and, where it is available,
            `lpips` (arXiv 1801.03924). `moving` is the share of pixels that move, `moving_error` the part of `mse` at these pixels.
        """
        from torchmetrics.functional.image import structural_similarity_index_measure

        found = (images.to(self._device, torch.float32) for images in (drawn, real, mean_frame))
        a, b, still = ((images.clamp(-1, 1) + 1) / 2 for images in found)
        ssim = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        errors = (a - b).square().mean(1)
        moving = (b - still).abs().amax(1) > MOVING
        values = {
            "mse": errors.mean((1, 2)),
            "moving": moving.double().mean((1, 2)),
            "moving_error": (errors * moving).mean((1, 2)),
            "ssim": ssim.reshape(-1),
        }
        if self._lpips is not None:
            values["lpips"] = self._lpips(a, b, normalize=True).reshape(-1)
        return {name: value.double().cpu().numpy() for name, value in values.items()}


def summarise(found: Mapping[str, NDArray[np.float64]]) -> dict[str, float | None]:
    """Average what `ImageMetrics` returns; `moving_mse` is the MSE of the pixels that move, None where none moves."""
    means = {name: float(values.mean()) for name, values in found.items()}
    error, moving = means.pop("moving_error"), means["moving"]
    return {**means, "moving_mse": error / moving if moving else None}


def _load_lpips(device: torch.device) -> tuple[Any, str | None]:
    """Return the network, or why it is not available; gives up soon where there is no internet."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    before = socket.getdefaulttimeout()
    if not file.exists():
        tqdm.write(f"LPIPS: fetching {url} (244 MB)", file=sys.stderr)
    try:
        socket.setdefaulttimeout(TIMEOUT)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True)
            return LearnedPerceptualImagePatchSimilarity("alex").net.to(device), None
    except (OSError, RuntimeError) as error:
        return None, f"{url} is not in {file.parent} and cannot be fetched ({reason(error, 120)})"
    finally:
        socket.setdefaulttimeout(before)
