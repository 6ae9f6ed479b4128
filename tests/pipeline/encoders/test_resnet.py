"""ResNet-18 and R3M, which is a ResNet-18 too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder

Noise = Callable[..., np.ndarray]
HEADS = {"module.lang_enc.model.weight": torch.ones(2), "module.lang_rew.pred.0.weight": torch.ones(3)}


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """torchvision's own ResNet-18, with random weights: tests download nothing."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()


@pytest.fixture(scope="module")
def weights(reference: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with the published names: R3M's have a prefix, and language heads instead of a classifier."""
    folder = tmp_path_factory.mktemp("resnet")
    body = {name: value for name, value in reference.state_dict().items() if not name.startswith("fc.")}
    save_file(reference.state_dict(), folder / "resnet18.safetensors")
    save_file({f"module.convnet.{name}": value for name, value in body.items()} | HEADS, folder / "r3m.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("resnet18", "r3m")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-10-T saved by timm; read only."""
    path = tmp_path_factory.mktemp("resnet") / "resnet10t"
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("resnet10t"), path, safe_serialization=True)
    return path


FAMILY = pytest.mark.parametrize("family", ["resnet18", "r3m"])


def create(name: str, weights: Path | None, image_size: int = 224, dtype: str = "float32") -> Encoder:
    return encoders.create(name, weights=weights, image_size=image_size, dtype=dtype, device="cpu")


@FAMILY
@torch.inference_mode()
def test_tokens_are_torchvisions(reference: nn.Module, weights: dict[str, Path], noise: Noise, family: str) -> None:
    pooled, whole = create(family, weights[family]), create(f"{family}-map", weights[family])
    frames = noise(2, 224, 224)
    images = pooled.preprocess(torch.from_numpy(frames))
    body = nn.Sequential(*list(reference.children())[:-2])
    tokens, tokens_of_map = encoders.encode_together([pooled, whole], frames)
    assert (pooled.token_grid, whole.token_grid) == ((1, 1), (7, 7))
    torch.testing.assert_close(tokens_of_map, body(images).flatten(2).mT.half(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(tokens, reference.avgpool(body(images)).flatten(2).mT.half(), atol=2e-3, rtol=2e-3)


def test_classifier_batch_counts_and_prefixes_are_no_part_of_the_identity(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    bare = {name: value for name, value in load_file(weights["resnet18"]).items() if not name.startswith("fc.")}
    files = {
        "bare": {name: value for name, value in bare.items() if "batches" not in name},
        "counted": {name: value + 7 if "batches" in name else value for name, value in bare.items()},
        "prefixed": {f"convnet.{name}": value for name, value in bare.items()},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for family, names in (("resnet18", ("bare", "counted")), ("r3m", ("bare", "counted", "prefixed"))):
        expected = create(family, weights[family]).weights_sha256
        for name in names:
            assert create(family, tmp_path / f"{name}.safetensors").weights_sha256 == expected


@torch.inference_mode()
def test_the_architecture_of_a_timm_folder_is_used(folder: Path, noise: Noise) -> None:
    encoder, frames = create("resnet18-map", folder, image_size=64), noise(2, 64, 64)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected = reference.forward_features(encoder.preprocess(torch.from_numpy(frames)))
    assert (encoder.token_grid, encoder.token_dim) == ((2, 2), reference.num_features)
    torch.testing.assert_close(encoder(frames), expected.flatten(2).mT.half(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "config.json"),
        ('{"architectures": ["ResNetModel"]}', "config.json"),
        ('{"architecture": "resnet99"}', "resnet99"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"depth": 3}}', "depth"),
        ('{"architecture": "test_vit"}', "VisionTransformer"),
        ('{"architecture": "resnet18"}', "resnet18"),
    ],
)
def test_folders_of_something_else_are_refused(folder: Path, tmp_path: Path, text: str | None, named: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=named):
        create("resnet18", tmp_path)


@FAMILY
@pytest.mark.parametrize("name", ["layer4.1.bn2.running_mean", "layer5.weight", "bn1.bias"])
def test_weights_that_are_not_the_networks_are_named(
    weights: dict[str, Path], tmp_path: Path, family: str, name: str
) -> None:
    tensors, full_name = load_file(weights[family]), f"{'module.convnet.' if family == 'r3m' else ''}{name}"
    if name == "layer4.1.bn2.running_mean":
        del tensors[full_name]
    else:  # another shape, or a name that the network does not have
        tensors[full_name] = torch.zeros(3)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=rf"other\.safetensors .*{family} .*{re.escape(name)}"):
        create(family, tmp_path / "other.safetensors")


def test_r3ms_published_pickle_is_converted_by_the_command_in_the_error(
    weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="python -c") as refused:
        create("r3m", None)
    torch.save({"r3m": load_file(weights["r3m"]), "global_step": 1}, tmp_path / "model.pt")
    command = shlex.split(re.search(r"python -c .*", str(refused.value))[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(command[2], "message", "exec"), {})
    assert create("r3m", tmp_path / "r3m.safetensors").weights_sha256 == create("r3m", weights["r3m"]).weights_sha256
