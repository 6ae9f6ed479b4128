from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder


@pytest.fixture(scope="module")
def pixels() -> Encoder:
    return encoders.create("pixels", device="cpu")


@pytest.fixture(scope="module")
def random_vit() -> Encoder:
    return encoders.create("random-vit", dtype="float32", device="cpu")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def moved_patch(cell: int) -> np.ndarray:
    """A black frame, then one for each cell of 4 x 4 in which that cell is white."""
    frames = np.zeros((17, 4 * cell, 4 * cell, 3), np.uint8)
    for i in range(16):
        row, column = divmod(i, 4)
        frames[1 + i, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
    return frames


def reaction(tokens: Tensor) -> list[int]:
    return (tokens[1:].float() - tokens[0].float()).norm(dim=-1).argmax(1).tolist()


def test_pixel_tokens_are_the_patches(pixels: Encoder) -> None:
    frames = noise(2, 32, 32)
    tokens = pixels(frames)
    assert (pixels.token_grid, tuple(tokens.shape)) == ((4, 4), (2, 16, 192))
    # Row 2, column 1.
    patch = torch.from_numpy(frames[1, 16:24, 8:16].astype(np.float32) / 127.5 - 1)
    torch.testing.assert_close(tokens[1, 2 * 4 + 1], patch.flatten().half(), atol=1e-3, rtol=0)
    assert tokens.abs().max() <= 1


def test_pixels_have_one_layer_and_no_weights(pixels: Encoder) -> None:
    assert list(pixels.backbone.parameters()) == []
    assert pixels.backbone.dims == {"last": 192}
    assert "pixels-layers" not in [spec.name for spec in encoders.specs()]


@pytest.mark.parametrize("name", ["pixels", "random-vit", "random-vit-layers"])
def test_weights_are_refused(name: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "some.safetensors")
    with pytest.raises(UserError, match=f"encoder {name} has no weights .*; leave out --weights") as raised:
        encoders.create(name, weights=tmp_path / "some.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "patch"), [("pixels", 8), ("random-vit", 16)])
def test_another_image_size_has_another_grid(name: str, patch: int) -> None:
    encoder = encoders.create(name, image_size=3 * patch, device="cpu")
    assert encoder.token_grid == (3, 3)
    assert encoder(noise(1, 64, 64)).shape == (1, 9, 192)
    with pytest.raises(UserError, match=f"--image-size 20 does not fit encoder {name}; choose a multiple of {patch}"):
        encoders.create(name, image_size=20)


def test_tokens_are_row_major_over_the_image(pixels: Encoder, random_vit: Encoder) -> None:
    assert reaction(pixels(moved_patch(8))) == list(range(16))
    assert reaction(random_vit(moved_patch(16))) == list(range(16))


def test_random_weights_are_the_same_on_every_machine(random_vit: Encoder) -> None:
    # What another seed, another library's order of drawing or another processor's rounding would change.
    assert random_vit.weights_sha256[:16] == "0ffe6cd2579828d2"


def test_random_weights_depend_on_nothing_and_disturb_nothing(random_vit: Encoder) -> None:
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    again = encoders.create("random-vit", dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), expected)
    assert again.weights_sha256 == random_vit.weights_sha256
    assert again.identity("data") == random_vit.identity("data")


def test_random_tokens_tell_frames_apart_and_fit_the_store(random_vit: Encoder) -> None:
    layers = encoders.create("random-vit-layers", dtype="float32", device="cpu")
    tokens = layers(noise(4, 64, 64))
    assert tokens.shape == (4, 17, 576)
    assert (layers.token_grid, layers.token_dim) == (layers.spec.token_grid, layers.spec.token_dim)
    assert tokens.isfinite().all()
    assert tokens.abs().max() < 100
    patches = random_vit(noise(4, 64, 64))
    torch.testing.assert_close(tokens[:, 1:, 384:], patches, atol=0, rtol=0)
    assert patches.float().std(0).mean() > 0.1


def test_tokens_do_not_depend_on_the_batch(pixels: Encoder, random_vit: Encoder) -> None:
    frames = noise(3, 64, 64)
    for encoder in (pixels, random_vit):
        single = torch.cat([encoder(frames[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(single, encoder(frames), atol=2e-3, rtol=2e-3)


def test_bfloat16_tokens_are_close(random_vit: Encoder) -> None:
    frames = noise(4, 64, 64)
    tokens = encoders.create("random-vit", dtype="bfloat16", device="cpu")(frames)
    assert torch.cosine_similarity(tokens.float().flatten(1), random_vit(frames).float().flatten(1)).min() > 0.999
