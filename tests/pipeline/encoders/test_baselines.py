from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder

Noise = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def pixels() -> Encoder:
    return encoders.create("pixels", device="cpu")


@pytest.fixture(scope="module")
def random_vit() -> Encoder:
    return encoders.create("random-vit", dtype="float32", device="cpu")


def test_pixel_tokens_are_the_patches(pixels: Encoder, noise: Noise) -> None:
    frames = noise(2, 32, 32)
    tokens = pixels(frames)
    assert (pixels.token_grid, tuple(tokens.shape)) == ((4, 4), (2, 16, 192))
    # Row 2, column 1.
    patch = torch.from_numpy(frames[1, 16:24, 8:16].astype(np.float32) / 127.5 - 1)
    torch.testing.assert_close(tokens[1, 2 * 4 + 1], patch.flatten().half(), atol=1e-3, rtol=0)
    assert list(pixels.backbone.parameters()) == []


@pytest.mark.parametrize(
    ("name", "patch"), [("pixels", 8), ("random-vit", 16), ("random-vit-layers", 16), ("changes", 14)]
)
def test_weights_and_sizes_that_do_not_fit_are_refused(name: str, patch: int, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=rf"{name} .*some\.safetensors.*--weights"):
        encoders.create(name, weights=tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=rf"--image-size 20 .*{name}.*{patch}"):
        encoders.create(name, image_size=20)


def test_tokens_are_row_major_over_the_image(
    random_vit: Encoder, white_cells: Callable[[int, int], np.ndarray], most_changed: Callable[[Tensor], list[int]]
) -> None:
    assert most_changed(random_vit(white_cells(4, 16))) == list(range(16))


def test_random_weights_are_the_same_on_every_machine_and_change_no_generator(random_vit: Encoder) -> None:
    # Another seed, order of drawing or rounding would change this.
    assert random_vit.weights_sha256[:16] == "0ffe6cd2579828d2"
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    again = encoders.create("random-vit", dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), expected)
    assert again.identity("data") == random_vit.identity("data")


def test_random_tokens_differ_between_frames_and_fit_float16(random_vit: Encoder, noise: Noise) -> None:
    layers = encoders.create("random-vit-layers", dtype="float32", device="cpu")
    tokens = layers(noise(4, 64, 64))
    assert tokens.shape == (4, 17, 576)
    assert (layers.token_grid, layers.token_dim) == (layers.spec.token_grid, layers.spec.token_dim)
    assert tokens.isfinite().all()
    assert tokens.abs().max() < 100
    patches = random_vit(noise(4, 64, 64))
    torch.testing.assert_close(tokens[:, 1:, 384:], patches, atol=0, rtol=0)
    assert patches.float().std(0).mean() > 0.1
