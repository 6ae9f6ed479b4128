from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder

Noise = Callable[..., np.ndarray]
SIZE = 64
TINY = VJEPA2Config(
    hidden_size=48,
    num_attention_heads=2,
    num_hidden_layers=6,
    mlp_ratio=2.0,
    pred_hidden_size=24,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
    crop_size=SIZE,
    frames_per_clip=4,
    # With the default of 0.02 attention hardly depends on positions.
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def model() -> VJEPA2Model:
    torch.manual_seed(0)
    return VJEPA2Model(TINY).eval()


@pytest.fixture
def folder(model: VJEPA2Model, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def create(name: str, folder: Path, image_size: int = SIZE) -> Encoder:
    return encoders.create(name, weights=folder, image_size=image_size, dtype="float32", device="cpu")


@torch.inference_mode()
def reference(model: VJEPA2Model, *frames: Tensor) -> Tensor:
    return model(pixel_values_videos=torch.stack(frames, 1), skip_predictor=True).last_hidden_state.half()


def test_the_spec_describes_the_published_configuration() -> None:
    spec, config = encoders.get_spec("vjepa2"), VJEPA2Config()
    grid = config.crop_size // config.patch_size
    assert (spec.image_size, spec.patch) == (config.crop_size, config.patch_size)
    assert (spec.token_grid, spec.token_dim, spec.lag) == ((grid, grid), config.hidden_size, 0)
    assert encoders.get_spec("vjepa2-layers").token_dim == 3 * config.hidden_size


def test_a_pair_is_a_tubelet_of_the_earlier_frame_and_the_frame(model: VJEPA2Model, folder: Path, noise: Noise) -> None:
    pair, earlier, frames = create("vjepa2-pair", folder), noise(2, SIZE, SIZE), noise(2, SIZE, SIZE, seed=1)
    first, second = (pair.preprocess(torch.from_numpy(some)) for some in (earlier, frames))
    assert pair.lag == 5
    tokens = pair(np.stack([earlier, frames], 1))
    torch.testing.assert_close(tokens, reference(model, first, second), atol=2e-3, rtol=2e-3)
    assert (tokens - reference(model, second, first)).abs().max() > 0.1


def test_a_pair_of_equal_frames_is_the_frame(folder: Path, noise: Noise) -> None:
    single, pair, frames = create("vjepa2", folder), create("vjepa2-pair", folder), noise(2, SIZE, SIZE)
    tokens = single(frames)
    # Other strides may change the order of sums: float16 takes the next value at most.
    step = 2**-10 * float(tokens.abs().max())
    torch.testing.assert_close(pair(np.stack([frames, frames], 1)), tokens, atol=step, rtol=0)
    torch.testing.assert_close(pair(frames), tokens, atol=step, rtol=0)
    assert "5 env steps" in pair.identity("data").token_selection
    assert pair.weights_sha256 == single.weights_sha256
    with pytest.raises(ValueError, match="uint8"):
        single(noise(1, 2, SIZE, SIZE))
    with pytest.raises(UserError, match="--lag"):
        encoders.create("vjepa2", weights=folder, image_size=SIZE, lag=5)


def test_the_predictor_is_no_part_of_the_identity(folder: Path) -> None:
    expected = create("vjepa2", folder).weights_sha256
    weights = load_file(folder / "model.safetensors")
    assert any(name.startswith("predictor.") for name in weights)
    kept = {name: value for name, value in weights.items() if name.startswith("encoder.")}
    save_file(kept, folder / "model.safetensors")
    assert create("vjepa2", folder).weights_sha256 == expected


def test_a_folder_of_the_model_for_classification_gives_its_encoder(
    model: VJEPA2Model, noise: Noise, tmp_path: Path
) -> None:
    classifier = VJEPA2ForVideoClassification(model.config).eval()
    classifier.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {name.partition(".")[0] for name in names} == {"vjepa2", "pooler", "classifier"}
    encoder, frames = create("vjepa2", tmp_path), noise(2, SIZE, SIZE)
    images = encoder.preprocess(torch.from_numpy(frames))
    torch.testing.assert_close(encoder(frames), reference(classifier.vjepa2, images), atol=2e-3, rtol=2e-3)


def test_a_file_alone_has_the_published_size(folder: Path) -> None:
    with pytest.raises(UserError, match=r"vjepa2 .*[0-9]+ missing"):
        create("vjepa2", folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tubelet_size": 4}, "4"),
        ({"patch_size": [16, 8]}, r"\[16, 8\]"),
        ({"patch_size": 24}, "--image-size 64 .*24"),
        ({"hidden_size": 50, "num_attention_heads": 3}, "tiny"),
    ],
)
def test_a_folder_of_another_model_is_refused(folder: Path, change: dict[str, object], named: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=named):
        create("vjepa2", folder)
