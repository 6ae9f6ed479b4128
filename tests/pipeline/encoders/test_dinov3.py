from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders.dinov3 import SIZES
from wmcache.pipeline.encoders.vit import ModelSize

Noise = Callable[..., np.ndarray]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def test_a_file_of_the_hubs_names_loads_into_the_published_config(noise: Noise, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4)).eval()
    model.save_pretrained(tmp_path)
    path = (tmp_path / "model.safetensors").rename(tmp_path / "hub.safetensors")
    # Names in facebook/dinov3-vits16-pretrain-lvd1689m; those of the library's own modules differ.
    assert {"embeddings.register_tokens", "layer.11.attention.k_proj.weight", "norm.weight"} <= set(load_file(path))
    encoder, frames = encoders.create("dinov3", weights=path, dtype="float32", device="cpu"), noise(1, 64, 64)
    with torch.inference_mode():
        expected = model(encoder.preprocess(torch.from_numpy(frames))).last_hidden_state
    assert expected.shape == (1, 5 + 196, 384)
    assert encoder.token_grid == (14, 14)
    torch.testing.assert_close(encoder(frames).float(), expected[:, 5:], atol=4e-3, rtol=4e-3)
    with pytest.raises(UserError, match=r"hub\.safetensors .*dinov3-base"):
        encoders.create("dinov3-base", weights=path, device="cpu")


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
def test_preprocessing_is_the_published_one(noise: Noise, tmp_path: Path, size: int) -> None:
    DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_hidden_layers=1)).save_pretrained(tmp_path)
    encoder = encoders.create("dinov3", weights=tmp_path, device="cpu")
    frames = torch.from_numpy(noise(2, size, size))
    processor = DINOv3ViTImageProcessor(do_center_crop=False)
    images = list(frames.permute(0, 3, 1, 2).float())
    reference = processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    torch.testing.assert_close(encoder.preprocess(frames), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("registers", [0, 2])
def test_the_config_gives_the_number_of_registers(noise: Noise, tmp_path: Path, registers: int) -> None:
    config = DINOv3ViTConfig(**TINY, num_hidden_layers=2, num_register_tokens=registers)
    DINOv3ViTModel(config).save_pretrained(tmp_path)
    layers = encoders.create("dinov3-layers", weights=tmp_path, image_size=32, device="cpu")
    assert layers.token_grid == (1, 1 + registers + 4)
    assert layers(noise(1, 32, 32)).shape == (1, 1 + registers + 4, 96)


def test_blocks_of_a_shallow_network_may_be_the_same(noise: Noise, tmp_path: Path) -> None:
    DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_hidden_layers=1)).save_pretrained(tmp_path)
    layers = encoders.create("dinov3-layers", weights=tmp_path, image_size=32, dtype="float32", device="cpu")
    early, middle, last = layers(noise(1, 32, 32)).split(32, -1)
    assert torch.equal(early, middle)
    assert not torch.equal(middle, last)
