"""Vision transformers of all families, compared with tiny configurations of the libraries' own classes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
)

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder, dinov3, siglip2
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE
from wmcache.pipeline.encoders.vit import ModelSize

Noise = Callable[..., np.ndarray]
DIM, DEPTH, SIDE = 32, 6, 4
TINY = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
TINY_VJEPA2 = {**TINY, "mlp_ratio": 2.0, "pred_hidden_size": 24, "pred_num_attention_heads": 2}
KINDS = ["dinov2", "dinov3", "siglip2", "timm", "vjepa2"]


@dataclass(frozen=True)
class Kind:
    """A family and the format of its weights: `at` loads the network for a size, `call` runs it to its last, normed tokens."""

    encoder: str
    patch: int
    prefix: int
    folder: Path
    at: Callable[[int], nn.Module]
    blocks: Callable[[Any], nn.ModuleList]
    call: Callable[[Any, Tensor], Tensor]

    def create(self, selection: str = "", side: int = SIDE, dtype: str = "float32") -> Encoder:
        name = f"{self.encoder}{selection and '-'}{selection}"
        return encoders.create(name, weights=self.folder, image_size=side * self.patch, dtype=dtype, device="cpu")

    @torch.inference_mode()
    def reference(self, encoder: Encoder, frames: np.ndarray) -> Tensor:
        images = encoder.preprocess(torch.from_numpy(frames))
        return self.call(self.at(encoder.image_size).eval(), images)

    def edited(self, to: Path, config: dict[str, Any] | None = None) -> Kind:
        """A copy of the folder, with some settings of its config replaced."""
        folder = Path(shutil.copytree(self.folder, to / "folder"))
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **(config or {})}))
        return replace(self, folder=folder)


def call(network: Any, images: Tensor) -> Tensor:
    return network(pixel_values=images).last_hidden_state


def stir(network: nn.Module) -> nn.Module:
    """Weights as large as trained ones, so that blocks and positions count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("vits")
    torch.manual_seed(0)
    models = {
        "dinov2": stir(Dinov2Model(Dinov2Config(**TINY, image_size=56))),
        "dinov3": stir(
            DINOv3ViTModel(DINOv3ViTConfig(**TINY, intermediate_size=64, image_size=64, num_register_tokens=4))
        ),
        "siglip2": stir(SiglipVisionModel(SiglipVisionConfig(**TINY, intermediate_size=64, image_size=64))),
        "vjepa2": VJEPA2Model(
            VJEPA2Config(**TINY_VJEPA2, pred_num_hidden_layers=1, crop_size=64, initializer_range=0.2)
        ),
    }
    with torch.no_grad():
        # Untrained blocks mix all tokens so much that no token would still be its own patch's.
        for name, weight in (pair for kind in ("siglip2", "vjepa2") for pair in models[kind].named_parameters()):
            if name.endswith(("out_proj.weight", "attention.proj.weight", "mlp.fc2.weight")):
                weight.mul_(0.3)
    for name, model in models.items():
        model.save_pretrained(root / name)
    size = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2}
    vit = stir(timm.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=0, **size))
    save_for_hf(vit, root / "timm", model_args={**size, "img_size": 56}, safe_serialization=True)

    def timm_at(size: int) -> nn.Module:
        return timm.create_model(f"local-dir:{root / 'timm'}", pretrained=True, img_size=size, num_classes=0)

    def vjepa2_at(size: int) -> nn.Module:
        return VJEPA2Model.from_pretrained(root / "vjepa2", crop_size=size)

    def call_siglip2(network: Any, images: Tensor) -> Tensor:
        return network(images, interpolate_pos_encoding=True).last_hidden_state

    def call_vjepa2(network: Any, images: Tensor) -> Tensor:
        return network(pixel_values_videos=images[:, None], skip_predictor=True).last_hidden_state

    blocks = dict.fromkeys(KINDS, lambda net: net.encoder.layer) | {
        "dinov3": lambda net: net.model.layer,
        "siglip2": lambda net: net.encoder.layers,
        "timm": lambda net: net.blocks,
    }
    at = {name: lambda _, model=model: model for name, model in models.items()} | {"timm": timm_at, "vjepa2": vjepa2_at}
    calls = {"siglip2": call_siglip2, "timm": lambda net, images: net.forward_features(images), "vjepa2": call_vjepa2}
    sizes = {"dinov2": (14, 1), "dinov3": (16, 5), "siglip2": (16, 0), "timm": (14, 1), "vjepa2": (16, 0)}
    return {
        name: Kind(
            "dinov2" if name == "timm" else name,
            *sizes[name],
            root / name,
            at[name],
            blocks[name],
            calls.get(name, call),
        )
        for name in KINDS
    }


def edit_weights(kind: Kind, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = kind.folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, kinds: dict[str, Kind]) -> Kind:
    return kinds[request.param]


def assert_close(tokens: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(tokens.float(), expected.float(), atol=4e-3, rtol=4e-3)


# The larger size needs interpolated (or rotary) positions.
@pytest.mark.parametrize("side", [SIDE, 6])
def test_tokens_are_the_librarys_patches_their_mean_or_its_class_token(kind: Kind, noise: Noise, side: int) -> None:
    encoder, frames = kind.create(side=side), noise(3, 64, 64)
    expected = kind.reference(encoder, frames)
    tokens = encoder(frames)
    assert (encoder.token_grid, encoder.token_dim, encoder.source) == ((side, side), DIM, "file")
    assert expected.shape[1] == kind.prefix + side * side
    assert tokens.dtype == torch.float16
    assert_close(tokens, expected[:, kind.prefix :])
    assert_close(kind.create("pooled", side)(frames), expected[:, kind.prefix :].mean(1, keepdim=True))
    if kind.prefix:
        assert_close(kind.create("cls", side)(frames), expected[:, :1])


@pytest.mark.parametrize("side", [SIDE, 5])
def test_tokens_are_row_major_over_the_image(
    kind: Kind, white_cells: Callable[[int, int], np.ndarray], most_changed: Callable[[Tensor], list[int]], side: int
) -> None:
    encoder = kind.create(side=side)
    images = torch.from_numpy(white_cells(side, kind.patch)).permute(0, 3, 1, 2) / 255
    # Without the preprocessing, which may blur a patch into its neighbours.
    with torch.inference_mode():
        found = encoder.backbone(images, [LAST])[LAST]
    assert most_changed(found[:, encoder.backbone.prefix :]) == list(range(side * side))


def test_layers_are_outputs_of_blocks_and_the_norm(kind: Kind, noise: Noise) -> None:
    encoder, frames = kind.create("layers"), noise(2, 64, 64)
    outputs: list[Tensor] = []
    network = kind.at(encoder.image_size)
    handles = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in kind.blocks(network)
    ]
    expected = replace(kind, at=lambda _: network).reference(encoder, frames)
    for handle in handles:
        handle.remove()
    assert len(outputs) == DEPTH
    parts = encoder.head.restore(encoder(frames)).layers
    assert list(parts) == [EARLY, MIDDLE, LAST]
    for part, output in ((EARLY, outputs[0]), (MIDDLE, outputs[2]), (LAST, expected)):
        assert_close(parts[part], output)
    assert encoder.identity("data").layer == "block 1+block 3+norm"


def test_layers_restore_exactly_what_the_selections_give(kind: Kind, noise: Noise) -> None:
    frames, layers = noise(3, 64, 64), kind.create("layers")
    assert layers.token_grid == ((1, kind.prefix + SIDE * SIDE) if kind.prefix else (SIDE, SIDE))
    assert layers.token_dim == 3 * DIM
    restored = layers.head.restore(layers(frames))
    for selection in ["", "pooled"] + ["cls"] * bool(kind.prefix):
        encoder = kind.create(selection)
        assert torch.equal(encoder.tokens(restored), encoder(frames))


def test_tokens_depend_little_on_the_precision_of_the_weights_and_the_network(
    kind: Kind, noise: Noise, tmp_path: Path
) -> None:
    half, frames = kind.edited(tmp_path), noise(2, 64, 64)
    edit_weights(half, lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()}))
    encoder, tokens = half.create(), kind.create()(frames)
    assert {value.dtype for value in encoder.backbone.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(encoder(frames), tokens, atol=2e-2, rtol=2e-2)
    rough = kind.create(dtype="bfloat16")(frames)
    assert not torch.equal(tokens, rough)
    assert torch.cosine_similarity(tokens.float(), rough.float(), dim=-1).min() > 0.99


@pytest.mark.parametrize(
    ("name", "settings", "is_same"),
    [
        ("dinov2", {"layer_norm_eps": 1e-2}, False),
        ("dinov2", {"num_attention_heads": 4}, False),
        ("dinov3", {"rope_theta": 10.0}, False),
        ("siglip2", {"hidden_act": "relu"}, False),
        ("timm", {"model_args": {"embed_dim": DIM, "depth": DEPTH, "num_heads": 4, "img_size": 56}}, False),
        ("vjepa2", {"num_attention_heads": 4}, False),
        ("vjepa2", {"pred_num_attention_heads": 1}, True),
        ("dinov3", {"return_dict": False}, True),
        ("dinov3", {"attn_implementation": "some/kernel"}, True),
    ],
)
def test_settings_that_change_tokens_are_part_of_the_identity(
    kinds: dict[str, Kind], noise: Noise, tmp_path: Path, name: str, settings: dict[str, Any], is_same: bool
) -> None:
    one, other = (kind.create("layers") for kind in (kinds[name], kinds[name].edited(tmp_path, settings)))
    assert torch.equal(one(noise(1, 64, 64)), other(noise(1, 64, 64))) == is_same
    assert (one.backbone_key == other.backbone_key) == is_same
    differences = [line.split(":")[0] for line in one.identity("x").differences(other.identity("x"))]
    assert differences == ([] if is_same else ["weights_sha256"])


@pytest.mark.parametrize("family", [dinov3, siglip2])
def test_a_folder_of_the_usual_settings_is_the_same_encoder_as_its_file(
    kinds: dict[str, Kind], family: ModuleType
) -> None:
    kind = kinds[family.SPEC.name]
    settings = {**TINY, "intermediate_size": 64, "image_size": 64}
    settings |= {"num_register_tokens": 4} if family is dinov3 else {}
    size = ModelSize("", "tiny", DEPTH, DIM, "nowhere", settings=settings)
    file, folder = (
        family.HF.load(family.SPEC, size, 64, path) for path in (kind.folder / "model.safetensors", kind.folder)
    )
    assert file.config == folder.config == ""
    assert file.sha256 == folder.sha256


def refused(kind: Kind, *named: str, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        kind.create(**settings)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("encoder", "folder"),
    [
        ("dinov2", "dinov3"),
        ("dinov3", "timm"),
        ("siglip2", "dinov3"),
        ("vjepa2", "dinov2"),
    ],
)
def test_a_folder_of_another_family_is_refused(kinds: dict[str, Kind], encoder: str, folder: str) -> None:
    refused(replace(kinds[encoder], folder=kinds[folder].folder), f"{folder} ", encoder[:6])


def test_a_timm_folder_of_another_family_is_refused(kinds: dict[str, Kind], tmp_path: Path) -> None:
    save_for_hf(timm.create_model("resnet10t", num_classes=0), tmp_path / "resnet", safe_serialization=True)
    refused(replace(kinds["timm"], folder=tmp_path / "resnet"), "resnet10t", "dinov2", "timm/vit_small")


def one_of(tensors: dict[str, Tensor], part: str) -> str:
    """The name of a weight that every family reads."""
    return min(name for name in tensors if part in name and name.endswith("weight") and "predictor" not in name)


def narrow(tensors: dict[str, Tensor]) -> None:
    name = one_of(tensors, "mlp")
    tensors[name] = tensors[name][:, 1:].contiguous()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(one_of(tensors, "norm")), "norm"),
        (lambda tensors: tensors.update(surplus=torch.zeros(1)), "surplus"),
        (narrow, "mlp"),
    ],
)
def test_weights_that_are_not_the_networks_are_named(
    kind: Kind, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    damaged = kind.edited(tmp_path)
    edit_weights(damaged, change)
    refused(damaged, str(damaged.folder), named)


def test_a_file_that_is_cut_short_and_a_folder_without_a_config_are_named(kind: Kind, tmp_path: Path) -> None:
    damaged = kind.edited(tmp_path)
    file = damaged.folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    refused(damaged, str(file))
    (damaged.folder / "config.json").unlink()
    refused(damaged, str(damaged.folder / "config.json"))


def shard(folder: Path) -> None:
    """Split a folder's file as `save_pretrained` does with a small `max_shard_size`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_a_folder_of_several_files_is_read_or_refused(kind: Kind, tmp_path: Path) -> None:
    several = kind.edited(tmp_path)
    shard(several.folder)
    if kind.folder.name == "timm":  # timm writes one file, whatever its size
        refused(several, "model.safetensors.index.json")
    else:
        assert several.create().weights_sha256 == kind.create().weights_sha256


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda parts: parts.update(x="../model.safetensors"), "../model.safetensors"),
        (lambda parts: parts.update(x="code.bin"), "code.bin"),
        (lambda parts: parts.update(x="model-3.safetensors"), "model-3.safetensors"),
        (lambda parts: parts.clear(), "index.json"),
    ],
)
def test_a_damaged_index_is_refused(
    kinds: dict[str, Kind], tmp_path: Path, change: Callable[[dict[str, str]], object], named: str
) -> None:
    damaged = kinds["dinov3"].edited(tmp_path)
    shard(damaged.folder)
    index = json.loads((damaged.folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (damaged.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(damaged, str(damaged.folder), named)


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "dinov3_vit", "hidden_size": "many"}'])
def test_a_damaged_config_is_named(kinds: dict[str, Kind], tmp_path: Path, text: str) -> None:
    damaged = kinds["dinov3"].edited(tmp_path)
    (damaged.folder / "config.json").write_text(text)
    refused(damaged, str(damaged.folder / "config.json"))


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("dinov3", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ("timm", {"model_args": ["img_size"]}, ""),
        ("timm", {"model_args": {"embed_dim": "many"}}, ""),
    ],
)
def test_quantised_weights_and_damaged_arguments_are_refused(
    kinds: dict[str, Kind], tmp_path: Path, name: str, settings: dict[str, Any], named: str
) -> None:
    damaged = kinds[name].edited(tmp_path, settings)
    refused(damaged, str(damaged.folder), named)


def test_a_config_that_names_code_runs_none_of_it(kinds: dict[str, Kind], noise: Noise, tmp_path: Path) -> None:
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    edited = kinds["dinov3"].edited(tmp_path, {"auto_map": names})
    (edited.folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert torch.equal(edited.create()(noise(1, 64, 64)), kinds["dinov3"].create()(noise(1, 64, 64)))
    assert not (tmp_path / "ran").exists()
