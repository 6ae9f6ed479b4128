from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder


@pytest.fixture(scope="module")
def body() -> nn.Module:
    """The body as the published code makes it: torchvision's ResNet-18 without its classifier; its weights are random."""
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None).eval()
    body.fc = nn.Identity()
    return body


@pytest.fixture(scope="module")
def published(body: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with the published names, language heads included."""
    heads = {"module.lang_enc.model.weight": torch.ones(2), "module.lang_rew.pred.0.weight": torch.ones(3)}
    return {f"module.convnet.{name}": value for name, value in body.state_dict().items()} | heads


@pytest.fixture(scope="module")
def weights(published: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("r3m") / "published.safetensors"
    save_file(published, path)
    return path


@pytest.fixture(scope="module")
def r3m(weights: Path) -> Encoder:
    return create("r3m", weights)


def create(name: str, weights: Path | None) -> Encoder:
    return encoders.create(name, weights=weights, dtype="float32", device="cpu")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@torch.inference_mode()
def test_tokens_are_those_of_the_published_forward(body: nn.Module, r3m: Encoder) -> None:
    frames = noise(2, 224, 224)
    # models/models_r3m.py: pixels from 0 to 255 are divided by 255, then normalised.
    normalise = torchvision.transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    images = normalise(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255.0)
    tokens = r3m(frames)
    assert tokens.shape == (2, 1, 512)
    torch.testing.assert_close(r3m.preprocess(torch.from_numpy(frames)), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 0], body(images).half(), atol=2e-3, rtol=2e-3)


def test_the_map_has_the_mean_that_the_token_is(weights: Path, r3m: Encoder) -> None:
    frames = noise(2, 64, 64)
    tokens = create("r3m-map", weights)(frames)
    assert tokens.shape == (2, 49, 512)
    torch.testing.assert_close(tokens.float().mean(1, keepdim=True), r3m(frames).float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("prefix", ["convnet.", ""])
def test_files_with_fewer_prefixes_are_the_same_encoder(
    body: nn.Module, r3m: Encoder, tmp_path: Path, prefix: str
) -> None:
    file = tmp_path / "r3m.safetensors"
    save_file({prefix + name: value for name, value in body.state_dict().items()}, file)
    assert create("r3m", file).weights_sha256 == r3m.weights_sha256


def test_the_command_in_the_message_converts_the_published_file(
    published: dict[str, torch.Tensor], r3m: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--weights") as raised:
        create("r3m", None)
    assert "\n" not in str(raised.value)
    torch.save({"r3m": published, "global_step": 1}, tmp_path / "model.pt")
    command = shlex.split(re.search(r"python -c .*", str(raised.value))[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(command[2], "message", "exec"), {})
    assert create("r3m", tmp_path / "r3m.safetensors").weights_sha256 == r3m.weights_sha256


@pytest.mark.parametrize("name", ["fc.weight", "module.convnet.layer5.weight", "module.decoder.weight"])
def test_other_weights_are_refused_by_name(weights: Path, tmp_path: Path, name: str) -> None:
    save_file(load_file(weights) | {name: torch.zeros(3)}, tmp_path / "other.safetensors")
    last = name.removeprefix("module.").removeprefix("convnet.")
    with pytest.raises(UserError, match=rf"does not fit r3m .*Unexpected key.*{re.escape(last)}") as raised:
        create("r3m", tmp_path / "other.safetensors")
    assert "\n" not in str(raised.value)


def test_a_missing_weight_is_named(published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    kept = {name: value for name, value in published.items() if name != "module.convnet.layer3.0.conv1.weight"}
    save_file(kept, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"does not fit r3m .*Missing key.*layer3\.0\.conv1\.weight"):
        create("r3m", tmp_path / "less.safetensors")
