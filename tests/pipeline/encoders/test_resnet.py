from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet18_Weights

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder


@pytest.fixture(scope="module")
def torchvisions() -> nn.Module:
    """torchvision's own ResNet-18; its weights are random, because tests download nothing."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def weights(torchvisions: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resnet") / "random.safetensors"
    save_file(torchvisions.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def resnet(weights: Path) -> Encoder:
    return create("resnet18", weights)


@pytest.fixture(scope="module")
def map_(weights: Path) -> Encoder:
    return create("resnet18-map", weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-10-T as timm saves it; read only."""
    path = tmp_path_factory.mktemp("resnet") / "resnet10t"
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("resnet10t"), path, safe_serialization=True)
    return path


def create(name: str, weights: Path, image_size: int = 224, dtype: str = "float32") -> Encoder:
    return encoders.create(name, weights=weights, image_size=image_size, dtype=dtype, device="cpu")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@torch.inference_mode()
def test_tokens_are_torchvisions(torchvisions: nn.Module, resnet: Encoder, map_: Encoder) -> None:
    frames = noise(2, 224, 224)
    images = resnet.preprocess(torch.from_numpy(frames))
    body = nn.Sequential(*list(torchvisions.children())[:-2])
    tokens, tokens_of_map = encoders.encode_together([resnet, map_], frames)
    assert (resnet.token_grid, map_.token_grid) == ((1, 1), (7, 7))
    torch.testing.assert_close(tokens_of_map, body(images).flatten(2).mT.half(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(tokens, torchvisions.avgpool(body(images)).flatten(2).mT.half(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("size", [224, 64, 300])
def test_preprocessing_is_torchvisions_without_its_crop(resnet: Encoder, size: int) -> None:
    frames = torch.from_numpy(noise(2, size, size))
    transform = ResNet18_Weights.IMAGENET1K_V1.transforms(resize_size=224)
    reference = transform(frames.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(resnet.preprocess(frames), reference, atol=1e-5, rtol=0)


def test_defaults_are_those_of_timms_card(resnet: Encoder) -> None:
    config = timm.get_pretrained_cfg("resnet18.tv_in1k")
    assert (config.input_size[1], config.interpolation) == (resnet.image_size, resnet.preprocess.filter)
    white = resnet.preprocess(torch.full((1, 64, 64, 3), 255, dtype=torch.uint8))[0, :, 7, 7]
    torch.testing.assert_close(white, (1 - torch.tensor(config.mean)) / torch.tensor(config.std))
    assert config.hf_hub_id in resnet.spec.source


def test_the_map_is_row_major_over_the_image(map_: Encoder) -> None:
    cells = [(0, 0), (0, 6), (2, 5), (5, 2), (6, 0)]
    frames = np.zeros((1 + len(cells), 224, 224, 3), np.uint8)
    for i, (row, column) in enumerate(cells):
        frames[1 + i, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = 255
    tokens = map_(frames).float()
    change = (tokens[1:] - tokens[0]).norm(dim=-1)
    # A receptive field is wider than the map, so what is asked for is where the change has its centre.
    weight = (change / change.amax(1, keepdim=True)) ** 4
    rows, columns = (weight @ (torch.arange(49) // 7).float(), weight @ (torch.arange(49) % 7).float())
    centres = torch.stack([rows, columns], 1) / weight.sum(1, keepdim=True)
    assert (centres - torch.tensor(cells)).abs().max() < 1


def test_tokens_do_not_depend_on_the_batch(map_: Encoder) -> None:
    frames = noise(3, 64, 64)
    single = torch.cat([map_(frames[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(single, map_(frames), atol=2e-3, rtol=2e-3)


def test_bfloat16_tokens_are_close(weights: Path, resnet: Encoder) -> None:
    frames = noise(2, 64, 64)
    tokens = create("resnet18", weights, dtype="bfloat16")(frames)
    assert torch.cosine_similarity(tokens.float().flatten(1), resnet(frames).float().flatten(1)).min() > 0.999


def test_another_image_size_has_another_map(weights: Path) -> None:
    encoder = create("resnet18-map", weights, image_size=96)
    assert encoder.token_grid == (3, 3)
    assert encoder(noise(1, 64, 64)).shape == (1, 9, 512)
    with pytest.raises(UserError, match="--image-size 100 does not fit encoder resnet18; choose a multiple of 32"):
        create("resnet18", weights, image_size=100)


def test_the_classifier_and_batch_counts_do_not_count(weights: Path, resnet: Encoder, tmp_path: Path) -> None:
    tensors = load_file(weights)
    assert "fc.weight" in tensors
    bare = {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    save_file({name: value for name, value in bare.items() if "batches" not in name}, tmp_path / "bare.safetensors")
    counted = {name: value + 7 if "batches" in name else value for name, value in bare.items()}
    save_file(counted, tmp_path / "counted.safetensors")
    for name in ("bare", "counted"):
        assert create("resnet18", tmp_path / f"{name}.safetensors").weights_sha256 == resnet.weights_sha256


@torch.inference_mode()
def test_a_timm_folder_says_which_resnet_it_holds(folder: Path) -> None:
    encoder = create("resnet18-map", folder, image_size=64)
    frames = noise(2, 64, 64)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected = reference.forward_features(encoder.preprocess(torch.from_numpy(frames)))
    assert (encoder.token_grid, encoder.token_dim) == ((2, 2), reference.num_features)
    torch.testing.assert_close(encoder(frames), expected.flatten(2).mT.half(), atol=2e-3, rtol=2e-3)


def test_a_folders_architecture_and_its_arguments_are_part_of_the_identity(
    weights: Path, resnet: Encoder, tmp_path: Path
) -> None:
    bare = {name: value for name, value in load_file(weights).items() if not name.startswith("fc.")}
    save_file(bare, tmp_path / "model.safetensors")
    for arguments, same in (({}, True), ({"act_layer": "gelu"}, False)):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": "resnet18", "pretrained_cfg": {}, "model_args": arguments})
        )
        for name in ("resnet18", "r3m"):
            expected = resnet if name == "resnet18" else create(name, tmp_path / "model.safetensors")
            assert (create(name, tmp_path).weights_sha256 == expected.weights_sha256) == same


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not exist"),
        ("<html>404</html>", "cannot be read"),
        ('{"architectures": ["ResNetModel"]}', "names no timm architecture"),
        ('{"architecture": "resnet99"}', "resnet99"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"depth": 3}}', "is damaged .*depth"),
        ('{"architecture": "test_vit"}', "holds a timm test_vit, not a ResNet"),
        ('{"architecture": "resnet18"}', "does not fit resnet18 .*Missing"),
    ],
)
def test_folders_of_something_else_are_refused(folder: Path, tmp_path: Path, text: str | None, reason: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=reason) as raised:
        create("resnet18", tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("layer4.1.bn2.running_mean"), r"Missing key.*layer4\.1\.bn2\.running_mean"),
        (lambda tensors: tensors.update({"layer5.weight": torch.zeros(3)}), r"Unexpected key.*layer5"),
        (lambda tensors: tensors.update({"bn1.bias": torch.zeros(3)}), "size mismatch"),
    ],
)
def test_files_that_lack_a_weight_or_have_another_are_refused(
    weights: Path, tmp_path: Path, change: object, reason: str
) -> None:
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=rf"other\.safetensors does not fit resnet18 .*{reason}") as raised:
        create("resnet18", tmp_path / "other.safetensors")
    assert "\n" not in str(raised.value)


def test_half_a_download_is_refused(weights: Path, tmp_path: Path) -> None:
    data = weights.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"half\.safetensors does not hold the weights of resnet18"):
        create("resnet18", tmp_path / "half.safetensors")
