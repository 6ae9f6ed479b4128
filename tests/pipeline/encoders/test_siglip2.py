from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipVisionConfig
from transformers.image_utils import PILImageResampling

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import siglip2
from wmcache.pipeline.encoders.base import Preprocess

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {**TINY, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SiglipModel, Path]:
    """A file as the hub's, text tower and all, of a network much smaller than the published one."""
    vision = {**TINY, "image_size": 64}
    monkeypatch.setattr(siglip2, "SIZE", replace(siglip2.SIZE, settings=vision))
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=TEXT)).eval()
    model.save_pretrained(tmp_path)
    return model, (tmp_path / "model.safetensors").rename(tmp_path / "hub.safetensors")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_a_file_of_the_hubs_names_gives_the_vision_towers_tokens(published: tuple[SiglipModel, Path]) -> None:
    model, path = published
    assert {"logit_scale", "text_model.final_layer_norm.weight", "vision_model.head.probe"} <= set(load_file(path))
    encoder = encoders.create("siglip2", weights=path, image_size=64, dtype="float32", device="cpu")
    frames = noise(2, 64, 64)
    with torch.inference_mode():
        expected = model.vision_model(encoder.preprocess(torch.from_numpy(frames))).last_hidden_state
    assert encoder(frames).shape == expected.shape == (2, 16, 32)
    torch.testing.assert_close(encoder(frames).float(), expected, atol=4e-3, rtol=4e-3)


def test_no_patch_is_taken_for_a_class_token(published: tuple[SiglipModel, Path]) -> None:
    encoder = encoders.create("siglip2-layers", weights=published[1], image_size=64, device="cpu")
    assert encoder.backbone.prefix == 0
    assert encoder.token_grid == (4, 4)
    assert "siglip2-cls" not in {spec.name for spec in encoders.specs()}


def test_a_vision_tower_that_lacks_a_weight_is_refused(published: tuple[SiglipModel, Path], tmp_path: Path) -> None:
    tensors = load_file(published[1])
    del tensors["vision_model.post_layernorm.weight"]
    save_file(tensors, tmp_path / "gap.safetensors")
    with pytest.raises(UserError, match=r"gap\.safetensors does not fit siglip2 \(missing: post_layernorm\.weight\)"):
        encoders.create("siglip2", weights=tmp_path / "gap.safetensors", image_size=64, device="cpu")


def test_the_published_file_is_as_large_as_this_network_with_its_text_tower() -> None:
    # 1 500 800 904 bytes, of google/siglip2-base-patch16-224: float32 and a head of names; its vocabulary is Gemma's.
    text = {"vocab_size": 256_000}
    with torch.device("meta"):
        network = SiglipModel(SiglipConfig(vision_config=dict(siglip2.SIZE.settings), text_config=text))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 0 < 1_500_800_904 - 4 * parameters < 100_000
    assert SiglipVisionConfig().image_size == siglip2.SPEC.image_size


@pytest.mark.parametrize("size", [64, 300])
@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_preprocessing_is_the_librarys(name: str, size: int) -> None:
    frames = torch.from_numpy(noise(2, size, size))
    processor = SiglipImageProcessor(resample=PILImageResampling[name.upper()])
    images = list(frames.permute(0, 3, 1, 2).float())
    reference = processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    spec = siglip2.SPEC
    ours = Preprocess(spec.image_size, spec.via, spec.normalisation, name, 0)(frames)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


def test_pixels_go_to_minus_one_and_one(published: tuple[SiglipModel, Path]) -> None:
    encoder = encoders.create("siglip2", weights=published[1], image_size=64, device="cpu")
    frames = torch.stack([torch.full((64, 64, 3), value, dtype=torch.uint8) for value in (0, 255)])
    assert encoder.preprocess(frames).flatten(1).unique(dim=1).flatten().tolist() == [-1, 1]
