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
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder

Noise = Callable[..., np.ndarray]
NAME = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """timm's own ViT-S/14 at DINO-WM's size, with random weights: tests download nothing."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, img_size=196, pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        for block in vit.blocks:
            # timm starts these at 1e-5, which would leave attention without effect.
            block.ls1.gamma.fill_(0.1)
            block.ls2.gamma.fill_(0.1)
    return vit


@pytest.fixture(scope="module")
def weights(vit: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov2") / "random.safetensors"
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def dinov2(weights: Path) -> Encoder:
    return encoders.create("dinov2", weights=weights, dtype="float32", device="cpu")


@torch.inference_mode()
def reference_tokens(vit: nn.Module, dinov2: Encoder, frames: np.ndarray) -> Tensor:
    return vit.forward_features(dinov2.preprocess(torch.from_numpy(frames)))[:, 1:]


@pytest.mark.parametrize("size", [32, 300])
def test_preprocessing_is_dino_wms(dinov2: Encoder, noise: Noise, size: int) -> None:
    # DINO-WM: to 224 and [-1, 1] in the dataset, to 196 before the encoder (models/visual_world_model.py).
    frames = torch.from_numpy(noise(2, size, size))
    images = frames.permute(0, 3, 1, 2).float() / 255
    reference = TF.normalize(TF.resize(images, [224, 224], antialias=True), [0.5] * 3, [0.5] * 3)
    reference = TF.resize(reference, [196, 196], antialias=True)
    torch.testing.assert_close(dinov2.preprocess(frames), reference, atol=1e-5, rtol=0)


def test_official_files_with_a_mask_token_and_518_px_positions_load(
    vit: nn.Module, weights: Path, noise: Noise, tmp_path: Path
) -> None:
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 384).permute(0, 3, 1, 2)
    large = torch.nn.functional.interpolate(grid, (37, 37), mode="bicubic").flatten(2).mT
    official = load_file(weights) | {
        "mask_token": torch.zeros(1, 384),
        "pos_embed": torch.cat([vit.pos_embed[:, :1], large], 1).detach().contiguous(),
    }
    save_file(official, tmp_path / "official.safetensors")
    encoder = encoders.create("dinov2", weights=tmp_path / "official.safetensors", dtype="float32", device="cpu")
    tokens = encoder(noise(1, 64, 64))
    assert tokens.shape == (1, 196, 384)
    # Interpolated up and down, positions are almost unchanged, and the other weights are equal.
    expected = reference_tokens(vit, encoder, noise(1, 64, 64))
    assert torch.corrcoef(torch.stack([tokens.float().flatten(), expected.flatten()]))[0, 1] > 0.98


def test_the_published_file_is_as_large_as_this_network() -> None:
    # 88 240 510 bytes, of timm/vit_small_patch14_dinov2.lvd142m: float32 and a header.
    with torch.device("meta"):
        network = timm.create_model(NAME, num_classes=0)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 0 < 88_240_510 - 4 * parameters < 50_000


def test_the_identity_describes_how_tokens_were_made(weights: Path) -> None:
    identity = encoders.create("dinov2-cls", weights=weights, dtype="float32", device="cpu").identity("data")
    assert (identity.encoder, identity.layer, identity.token_selection) == ("dinov2-cls", "norm", "cls")
    assert identity.resize == "bilinear antialias 224>196"
    assert identity.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("of", ["timm", "official", "transformers"])
def test_weights_with_register_tokens_are_refused(tmp_path: Path, of: str) -> None:
    path, tiny = tmp_path / "model.safetensors", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if of == "transformers":
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**tiny, image_size=56)).save_pretrained(tmp_path)
    else:
        vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, embed_dim=36, depth=1)
        weights = vit.state_dict()
        if of == "official":
            weights["register_tokens"] = weights.pop("reg_token")
        save_file(weights, path)
    with pytest.raises(UserError, match=r"reg_token|register_tokens"):
        encoders.create("dinov2", weights=tmp_path if of == "transformers" else path, device="cpu")


def test_the_architecture_of_a_timm_folder_gives_the_number_of_registers(noise: Noise, tmp_path: Path) -> None:
    size = {"embed_dim": 36, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, **size)
    save_for_hf(vit, tmp_path, model_args={**size, "img_size": 56}, safe_serialization=True)
    frames = noise(2, 56, 56)
    encoder = encoders.create("dinov2", weights=tmp_path, image_size=56, dtype="float32", device="cpu")
    with torch.inference_mode():
        expected = vit.eval().forward_features(encoder.preprocess(torch.from_numpy(frames)))[:, 5:]
    torch.testing.assert_close(encoder(frames), expected.half(), atol=4e-3, rtol=4e-3)
