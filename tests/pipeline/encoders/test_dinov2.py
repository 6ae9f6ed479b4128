from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.functional as TF
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers.image_utils import PILImageResampling

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.base import Preprocess

NAME = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """timm's own ViT-S/14 at DINO-WM's size; its weights are random, because tests download nothing."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, img_size=196, pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        for block in vit.blocks:
            # timm starts these at 1e-5, with which attention would hardly count.
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


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@torch.inference_mode()
def reference_tokens(vit: nn.Module, dinov2: Encoder, frames: np.ndarray) -> Tensor:
    return vit.forward_features(dinov2.preprocess(torch.from_numpy(frames)))[:, 1:]


@pytest.mark.parametrize("size", [32, 112, 224, 300])
def test_preprocessing_is_dino_wms(dinov2: Encoder, size: int) -> None:
    # DINO-WM: to 224 and [-1, 1] in the data set, to 196 before the encoder (models/visual_world_model.py).
    frames = torch.from_numpy(noise(2, size, size))
    images = frames.permute(0, 3, 1, 2).float() / 255
    reference = TF.normalize(TF.resize(images, [224, 224], antialias=True), [0.5] * 3, [0.5] * 3)
    reference = TF.resize(reference, [196, 196], antialias=True)
    torch.testing.assert_close(dinov2.preprocess(frames), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, 300])
def test_preprocessing_without_the_route_is_the_published_one(size: int) -> None:
    frames = torch.from_numpy(noise(2, size, size))
    processor = BitImageProcessor(
        size={"shortest_edge": 224},
        do_center_crop=False,
        resample=PILImageResampling.BICUBIC,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images = list(frames.permute(0, 3, 1, 2).float())
    reference = processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    ours = Preprocess(224, (), "imagenet", "bicubic", 0)(frames)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


def test_imagenet_normalisation_is_timms(weights: Path) -> None:
    encoder = encoders.create("dinov2", weights=weights, normalisation="imagenet", device="cpu")
    config = timm.get_pretrained_cfg(NAME)
    black, white = (torch.full((1, 64, 64, 3), value, dtype=torch.uint8) for value in (0, 255))
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    torch.testing.assert_close(encoder.preprocess(black)[0, :, 7, 7], (0 - mean) / std)
    torch.testing.assert_close(encoder.preprocess(white)[0, :, 7, 7], (1 - mean) / std)


def test_tokens_are_timms_patch_tokens_without_the_class_token(vit: nn.Module, dinov2: Encoder) -> None:
    frames = noise(3, 64, 64)
    tokens = dinov2(frames)
    assert tokens.shape == (3, 196, 384)
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(tokens, reference_tokens(vit, dinov2, frames).half(), atol=4e-3, rtol=4e-3)


def test_tokens_are_row_major_over_the_image(dinov2: Encoder) -> None:
    cells = [(0, 0), (0, 13), (5, 2), (13, 7)]
    frames = np.zeros((1 + len(cells), 196, 196, 3), np.uint8)
    for i, (row, column) in enumerate(cells):
        frames[1 + i, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = 255
    tokens = dinov2(frames).float()
    changed = (tokens[1:] - tokens[0]).norm(dim=-1).argmax(1)
    assert changed.tolist() == [row * 14 + column for row, column in cells]


def test_official_files_with_a_mask_token_and_518_px_positions_load(
    vit: nn.Module, weights: Path, tmp_path: Path
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
    # Interpolated up and down again, positions are nearly what they were, and every other weight is.
    expected = reference_tokens(vit, encoder, noise(1, 64, 64))
    assert torch.corrcoef(torch.stack([tokens.float().flatten(), expected.flatten()]))[0, 1] > 0.98


def test_the_published_file_is_as_large_as_this_network() -> None:
    # 88 240 510 bytes, of timm/vit_small_patch14_dinov2.lvd142m: float32 and a head of names.
    with torch.device("meta"):
        network = timm.create_model(NAME, num_classes=0)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 0 < 88_240_510 - 4 * parameters < 50_000


def test_another_image_size_has_another_grid(weights: Path) -> None:
    encoder = encoders.create("dinov2", weights=weights, image_size=70, dtype="float32", device="cpu")
    assert encoder.token_grid == (5, 5)
    assert encoder(noise(1, 64, 64)).shape == (1, 25, 384)


def test_the_identity_says_how_tokens_were_made(weights: Path) -> None:
    identity = encoders.create("dinov2-cls", weights=weights, dtype="float32", device="cpu").identity("data")
    assert (identity.encoder, identity.layer, identity.token_selection) == ("dinov2-cls", "norm", "cls")
    assert identity.resize == "bilinear antialias 224>196"
    assert identity.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"stem.weight": torch.zeros(3)}, tmp_path / "tcn.safetensors")
    with pytest.raises(UserError, match=r"tcn\.safetensors does not hold .*vit_small_patch14_dinov2"):
        encoders.create("dinov2", weights=tmp_path / "tcn.safetensors")
    (tmp_path / "page.safetensors").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"page\.safetensors does not hold the weights of dinov2"):
        encoders.create("dinov2", weights=tmp_path / "page.safetensors")


def test_a_file_of_another_size_is_refused(weights: Path) -> None:
    with pytest.raises(UserError, match=r"random\.safetensors does not hold .*vit_base_patch14_dinov2.*size mismatch"):
        encoders.create("dinov2-base", weights=weights)


@pytest.mark.parametrize("of", ["timm", "official", "transformers", "transformers folder"])
def test_weights_with_register_tokens_are_called_so(tmp_path: Path, of: str) -> None:
    path, tiny = tmp_path / "model.safetensors", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if of.startswith("transformers"):
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**tiny, image_size=56)).save_pretrained(tmp_path)
    else:
        vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, embed_dim=36, depth=1)
        weights = vit.state_dict()
        if of == "official":
            weights["register_tokens"] = weights.pop("reg_token")
        save_file(weights, path)
    with pytest.raises(UserError, match=r"register tokens \((reg_token|.*register_tokens)\)"):
        encoders.create("dinov2", weights=tmp_path if of == "transformers folder" else path, device="cpu")


def test_a_timm_folder_with_register_tokens_says_how_many_there_are(tmp_path: Path) -> None:
    size = {"embed_dim": 36, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0, **size)
    save_for_hf(vit, tmp_path, model_args={**size, "img_size": 56}, safe_serialization=True)
    frames = noise(2, 56, 56)
    encoder = encoders.create("dinov2", weights=tmp_path, image_size=56, dtype="float32", device="cpu")
    with torch.inference_mode():
        expected = vit.eval().forward_features(encoder.preprocess(torch.from_numpy(frames)))[:, 5:]
    torch.testing.assert_close(encoder(frames), expected.half(), atol=4e-3, rtol=4e-3)


def test_weights_that_are_not_finite_are_refused(weights: Path, tmp_path: Path) -> None:
    damaged = load_file(weights)
    damaged["norm.weight"][0] = torch.inf
    save_file(damaged, tmp_path / "inf.safetensors")
    with pytest.raises(UserError, match="not finite"):
        encoders.create("dinov2", weights=tmp_path / "inf.safetensors")


def test_without_weights_and_network_both_ways_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--weights FILE\.safetensors, or use --encoder tcn") as refused:
        encoders.create("dinov2")
    assert "\n" not in str(refused.value)
