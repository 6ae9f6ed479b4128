from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipVisionConfig
from transformers.image_utils import PILImageResampling

from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import siglip2
from wmcache.pipeline.encoders.base import Preprocess
from wmcache.pipeline.encoders.vit import ModelSize

Noise = Callable[..., np.ndarray]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {**TINY, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
SIZE = ModelSize("", "tiny", 3, 32, "nowhere", settings={**TINY, "image_size": 64})


@pytest.fixture
def published(tmp_path: Path) -> tuple[SiglipModel, Path]:
    """A folder with a file of the hub's names, text tower included, of a small network."""
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config={**TINY, "image_size": 64}, text_config=TEXT)).eval()
    model.save_pretrained(tmp_path / "hub")
    return model, tmp_path / "hub"


def test_a_file_and_a_folder_with_a_text_tower_give_the_vision_towers_tokens(
    published: tuple[SiglipModel, Path], noise: Noise
) -> None:
    model, folder = published
    file = folder / "model.safetensors"
    assert {"logit_scale", "text_model.final_layer_norm.weight", "vision_model.head.probe"} <= set(load_file(file))
    encoder = encoders.create("siglip2", weights=folder, image_size=64, dtype="float32", device="cpu")
    frames = noise(2, 64, 64)
    with torch.inference_mode():
        expected = model.vision_model(encoder.preprocess(torch.from_numpy(frames))).last_hidden_state
    assert encoder(frames).shape == expected.shape == (2, 16, 32)
    torch.testing.assert_close(encoder(frames).float(), expected, atol=4e-3, rtol=4e-3)
    of_file, of_folder = (siglip2.HF.load(siglip2.SPEC, SIZE, 64, path) for path in (file, folder))
    assert of_file.sha256 == of_folder.sha256
    # No patch is used as a class token.
    layers = encoders.create("siglip2-layers", weights=folder, image_size=64, device="cpu")
    assert (layers.backbone.prefix, layers.token_grid) == (0, (4, 4))
    assert "siglip2-cls" not in encoders.ENCODERS


def test_the_published_file_is_as_large_as_this_network_with_its_text_tower() -> None:
    # 1 500 800 904 bytes, of google/siglip2-base-patch16-224: float32 and a header; its vocabulary is Gemma's.
    with torch.device("meta"):
        vision = dict(siglip2.SIZE.settings)
        network = SiglipModel(SiglipConfig(vision_config=vision, text_config={"vocab_size": 256_000}))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 0 < 1_500_800_904 - 4 * parameters < 100_000
    assert SiglipVisionConfig().image_size == siglip2.SPEC.image_size


@pytest.mark.parametrize("size", [64, 300])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_preprocessing_is_the_librarys(noise: Noise, name: str, size: int) -> None:
    frames = torch.from_numpy(noise(2, size, size))
    processor = SiglipImageProcessor(resample=PILImageResampling[name.upper()])
    images = list(frames.permute(0, 3, 1, 2).float())
    reference = processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    spec = siglip2.SPEC
    found = Preprocess(spec.image_size, spec.via, spec.normalisation, name, 0)(frames)
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)
