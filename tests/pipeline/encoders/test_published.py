"""Files, sizes and preprocessing of published encoders, compared with the references' own classes. Tests download nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.functional as TF
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VJEPA2VideoProcessor,
)
from transformers.image_utils import PILImageResampling

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import dinov3, siglip2
from wmcache.pipeline.encoders.base import Preprocess
from wmcache.pipeline.encoders.vit import ModelSize

Noise = Callable[..., np.ndarray]
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TINY_VIT = {"embed_dim": 36, "depth": 2, "num_heads": 2}


def assert_close(tokens: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(tokens.float(), expected.float(), atol=4e-3, rtol=4e-3)


def as_dino_wm(images: Tensor) -> Tensor:
    """DINO-WM: to 224 and [-1, 1] in the dataset, to 196 before the encoder (models/visual_world_model.py)."""
    resized = TF.normalize(TF.resize(images, [224, 224], antialias=True), [0.5] * 3, [0.5] * 3)
    return TF.resize(resized, [196, 196], antialias=True)


def by(processor: Callable[..., dict[str, Tensor]]) -> Callable[[Tensor], Tensor]:
    """An image processor of transformers, for images in [0, 1]."""
    return lambda images: processor([*(images * 255)], return_tensors="pt", input_data_format="channels_first")[
        "pixel_values"
    ]


def as_vjepa2(images: Tensor) -> Tensor:
    processor = VJEPA2VideoProcessor(do_rescale=False, do_center_crop=False)
    size = {"height": 256, "width": 256}
    return processor([images], size=size, return_tensors="pt")["pixel_values_videos"][0]


REFERENCES: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "dinov2": ("dinov2", "bilinear", as_dino_wm),
    "dinov3": ("dinov3", "bilinear", by(DINOv3ViTImageProcessor(do_center_crop=False))),
    "siglip2": ("siglip2", "bilinear", by(SiglipImageProcessor(resample=PILImageResampling.BILINEAR))),
    "siglip2, bicubic": ("siglip2", "bicubic", by(SiglipImageProcessor(resample=PILImageResampling.BICUBIC))),
    "resnet18": ("resnet18", "bilinear", ResNet18_Weights.IMAGENET1K_V1.transforms(resize_size=224)),
    "r3m": ("r3m", "bilinear", ResNet18_Weights.IMAGENET1K_V1.transforms(resize_size=224)),
    "vjepa2": ("vjepa2", "bilinear", as_vjepa2),
}


@pytest.mark.parametrize("size", [32, 300])
@pytest.mark.parametrize("name", REFERENCES)
def test_preprocessing_is_the_references_without_its_crop(noise: Noise, name: str, size: int) -> None:
    encoder, filter, reference = REFERENCES[name]
    spec, frames = encoders.get_spec(encoder), torch.from_numpy(noise(2, size, size))
    found = Preprocess(spec.image_size, spec.via, spec.normalisation, filter, 0)(frames)
    expected = reference(frames.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def siglip2_with_its_text_tower() -> nn.Module:
    """Its vocabulary is Gemma's."""
    vision = dict(siglip2.SIZE.settings)
    return SiglipModel(SiglipConfig(vision_config=vision, text_config={"vocab_size": 256_000}))


@pytest.mark.parametrize(
    ("make", "published"),
    [
        # Bytes of the files on the hub, float32 and a header; for DINOv3's base the number on its card.
        (lambda: timm.create_model(DINOV2, num_classes=0), 88_240_510 / 4),
        (lambda: DINOv3ViTModel(DINOv3ViTConfig(**dinov3.SIZES[0].settings)), 86_406_384 / 4),
        (lambda: DINOv3ViTModel(DINOv3ViTConfig(**dinov3.SIZES[1].settings)), 85_660_416),
        (siglip2_with_its_text_tower, 1_500_800_904 / 4),
    ],
    ids=["dinov2", "dinov3", "dinov3-base", "siglip2"],
)
def test_networks_have_as_many_parameters_as_the_published_weights(
    make: Callable[[], nn.Module], published: float
) -> None:
    with torch.device("meta"):
        network = make()
    assert abs(published - sum(parameter.numel() for parameter in network.parameters())) < 25_000


def test_official_files_with_a_mask_token_and_518_px_positions_load(noise: Noise, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(DINOV2, img_size=196, pretrained=False, num_classes=0).eval()
    for block in vit.blocks:
        # timm starts these at 1e-5, which would leave attention without effect.
        nn.init.constant_(block.ls1.gamma, 0.1)
        nn.init.constant_(block.ls2.gamma, 0.1)
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 384).permute(0, 3, 1, 2)
    large = nn.functional.interpolate(grid, (37, 37), mode="bicubic").flatten(2).mT
    official = vit.state_dict() | {
        "mask_token": torch.zeros(1, 384),
        "pos_embed": torch.cat([vit.pos_embed[:, :1], large], 1).detach().contiguous(),
    }
    save_file(official, tmp_path / "official.safetensors")
    encoder = encoders.create("dinov2", weights=tmp_path / "official.safetensors", dtype="float32", device="cpu")
    tokens = encoder(noise(1, 64, 64))
    assert tokens.shape == (1, 196, 384)
    # Interpolated up and down, positions are almost unchanged, and the other weights are equal.
    with torch.inference_mode():
        expected = vit.forward_features(encoder.preprocess(torch.from_numpy(noise(1, 64, 64))))[:, 1:]
    assert torch.corrcoef(torch.stack([tokens.float().flatten(), expected.flatten()]))[0, 1] > 0.98
    identity = encoder.identity("data")
    assert (identity.encoder, identity.layer, identity.token_selection) == ("dinov2", "norm", "patch")
    assert identity.resize == "bilinear antialias 224>196"
    assert identity.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("of", ["timm", "official", "transformers"])
def test_dinov2_refuses_weights_with_register_tokens(tmp_path: Path, of: str) -> None:
    path = tmp_path / "model.safetensors"
    if of == "transformers":
        config = Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56)
        Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    else:
        weights = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=196, num_classes=0).state_dict()
        if of == "official":
            weights["register_tokens"] = weights.pop("reg_token")
        save_file(weights, path)
    with pytest.raises(UserError, match=str(tmp_path)):
        encoders.create("dinov2", weights=tmp_path if of == "transformers" else path, device="cpu")


def test_the_architecture_of_a_timm_folder_gives_the_number_of_registers(noise: Noise, tmp_path: Path) -> None:
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, **TINY_VIT).eval()
    save_for_hf(vit, tmp_path, model_args={**TINY_VIT, "img_size": 56}, safe_serialization=True)
    encoder = encoders.create("dinov2", weights=tmp_path, image_size=56, dtype="float32", device="cpu")
    frames = noise(2, 56, 56)
    with torch.inference_mode():
        expected = vit.forward_features(encoder.preprocess(torch.from_numpy(frames)))[:, 5:]
    assert_close(encoder(frames), expected)


def test_a_file_of_dinov3s_names_loads_into_the_published_config(noise: Noise, tmp_path: Path) -> None:
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
    assert_close(encoder(frames), expected[:, 5:])
    with pytest.raises(UserError, match=r"hub\.safetensors .*dinov3-base"):
        encoders.create("dinov3-base", weights=path, device="cpu")


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov3s_config_gives_the_number_of_registers_and_blocks(noise: Noise, tmp_path: Path, registers: int) -> None:
    config = DINOv3ViTConfig(**TINY, num_hidden_layers=1, num_register_tokens=registers)
    DINOv3ViTModel(config).save_pretrained(tmp_path)
    layers = encoders.create("dinov3-layers", weights=tmp_path, image_size=32, dtype="float32", device="cpu")
    tokens = layers(noise(1, 32, 32))
    assert layers.token_grid == (1, 1 + registers + 4)
    assert tokens.shape == (1, 1 + registers + 4, 96)
    # Blocks of a shallow network may be the same.
    early, middle, last = tokens.split(32, -1)
    assert torch.equal(early, middle)
    assert not torch.equal(middle, last)


def test_siglip2s_file_and_folder_with_a_text_tower_give_the_vision_towers_tokens(noise: Noise, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {**TINY, "num_hidden_layers": 3, "image_size": 64}
    text = {**TINY, "num_hidden_layers": 3, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    # As in the hub's file.
    assert {"logit_scale", "text_model.final_layer_norm.weight", "vision_model.head.probe"} <= set(load_file(file))
    encoder = encoders.create("siglip2", weights=tmp_path, image_size=64, dtype="float32", device="cpu")
    frames = noise(2, 64, 64)
    with torch.inference_mode():
        expected = model.vision_model(encoder.preprocess(torch.from_numpy(frames))).last_hidden_state
    assert encoder(frames).shape == expected.shape == (2, 16, 32)
    assert_close(encoder(frames), expected)
    size = ModelSize("", "tiny", 3, 32, "nowhere", settings=vision)
    of_file, of_folder = (siglip2.HF.load(siglip2.SPEC, size, 64, path) for path in (file, tmp_path))
    assert of_file.sha256 == of_folder.sha256
    # No patch is used as a class token.
    layers = encoders.create("siglip2-layers", weights=tmp_path, image_size=64, device="cpu")
    assert (layers.backbone.prefix, layers.token_grid) == (0, (4, 4))
