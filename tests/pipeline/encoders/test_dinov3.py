from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.dinov3 import SIZES
from wmcache.pipeline.encoders.vit import ModelSize


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A ViT-S/16 as it is published, and a file of the names on the hub; its weights are random, because tests download nothing."""
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4)).eval()
    folder = tmp_path_factory.mktemp("dinov3")
    model.save_pretrained(folder)
    path = (folder / "model.safetensors").rename(folder / "hub.safetensors")
    return model, path


@pytest.fixture(scope="module")
def encoder(published: tuple[nn.Module, Path]) -> Encoder:
    return encoders.create("dinov3", weights=published[1], dtype="float32", device="cpu")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_a_file_of_the_hubs_names_loads_into_the_published_config(
    published: tuple[nn.Module, Path], encoder: Encoder
) -> None:
    # These are the names in facebook/dinov3-vits16-pretrain-lvd1689m; the library's own differ from them.
    names = set(load_file(published[1]))
    assert {"embeddings.register_tokens", "layer.11.attention.k_proj.weight", "norm.weight"} <= names
    frames = noise(1, 64, 64)
    with torch.inference_mode():
        expected = published[0](encoder.preprocess(torch.from_numpy(frames))).last_hidden_state
    assert expected.shape == (1, 5 + 196, 384)
    assert encoder.token_grid == (14, 14)
    torch.testing.assert_close(encoder(frames).float(), expected[:, 5:], atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("size", "published_parameters"),
    [(SIZES[0], 86_406_384 / 4), (SIZES[1], 85_660_416)],
    ids=["small, by its file's size", "base, by its card"],
)
def test_configs_have_as_many_parameters_as_the_published_weights(size: ModelSize, published_parameters: float) -> None:
    with torch.device("meta"):
        network = DINOv3ViTModel(DINOv3ViTConfig(**size.settings))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert abs(published_parameters - parameters) < 10_000


@pytest.mark.parametrize("size", [64, 300])
def test_preprocessing_is_the_published_one(encoder: Encoder, size: int) -> None:
    frames = torch.from_numpy(noise(2, size, size))
    processor = DINOv3ViTImageProcessor(do_center_crop=False)
    images = list(frames.permute(0, 3, 1, 2).float())
    reference = processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    torch.testing.assert_close(encoder.preprocess(frames), reference, atol=1e-5, rtol=0)


def test_normalisation_is_the_model_cards(encoder: Encoder) -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for value in (0, 255):
        frame = torch.full((1, 64, 64, 3), value, dtype=torch.uint8)
        torch.testing.assert_close(encoder.preprocess(frame)[0, :, 7, 7], (value / 255 - mean) / std)


def test_a_file_of_another_size_is_refused(published: tuple[nn.Module, Path]) -> None:
    with pytest.raises(UserError, match=r"hub\.safetensors does not fit dinov3-base \(of another shape") as refused:
        encoders.create("dinov3-base", weights=published[1], device="cpu")
    assert "\n" not in str(refused.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"stem.weight": torch.zeros(3)}, tmp_path / "tcn.safetensors")
    with pytest.raises(UserError, match=r"missing: .* and \d+ more; unknown: stem\.weight\); pass weights of facebook"):
        encoders.create("dinov3", weights=tmp_path / "tcn.safetensors", device="cpu")


def test_register_tokens_are_counted_by_the_folders_config(tmp_path: Path) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for registers in (0, 2):
        model = DINOv3ViTModel(DINOv3ViTConfig(**tiny, num_register_tokens=registers))
        model.save_pretrained(tmp_path / str(registers))
        layers = encoders.create("dinov3-layers", weights=tmp_path / str(registers), image_size=32, device="cpu")
        assert json.loads((tmp_path / str(registers) / "config.json").read_text())["num_register_tokens"] == registers
        assert layers.token_grid == (1, 1 + registers + 4)
        assert layers(noise(1, 32, 32)).shape == (1, 1 + registers + 4, 96)


def test_blocks_of_a_shallow_network_may_be_the_same(tmp_path: Path) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    DINOv3ViTModel(DINOv3ViTConfig(**tiny)).save_pretrained(tmp_path)
    layers = encoders.create("dinov3-layers", weights=tmp_path, image_size=32, dtype="float32", device="cpu")
    early, middle, last = layers(noise(1, 32, 32)).split(32, -1)
    assert torch.equal(early, middle)
    assert not torch.equal(middle, last)
