"""What all vision transformers have in common, held against tiny configurations of the libraries' own classes."""

from __future__ import annotations

import json
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
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder, EncoderSpec, dinov3, encode_together, siglip2
from wmcache.pipeline.encoders.base import EARLY, LAST, MIDDLE
from wmcache.pipeline.encoders.vit import ModelSize, early_block, load_hf, middle_block, timm_settings

DIM, DEPTH, SIDE = 32, 6, 4
TINY = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
TINY_SIGLIP = {**TINY, "intermediate_size": 64, "image_size": 64}


@dataclass(frozen=True)
class Kind:
    """A way that a family's weights come: `blocks` finds the network's blocks, `call` runs it to its last, normed tokens."""

    encoder: str
    patch: int
    prefix: int
    network: nn.Module
    folder: Path
    blocks: Callable[[Any], nn.ModuleList]
    call: Callable[[Any, Tensor], Tensor]

    def create(self, selection: str = "", side: int = SIDE, dtype: str = "float32") -> Encoder:
        name = f"{self.encoder}{selection and '-'}{selection}"
        return encoders.create(name, weights=self.folder, image_size=side * self.patch, dtype=dtype, device="cpu")


def last(network: Any, images: Tensor) -> Tensor:
    return network(pixel_values=images).last_hidden_state


def stir(network: nn.Module) -> nn.Module:
    """Weights as large as trained ones', so that blocks and positions count."""
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
        "siglip2": stir(SiglipVisionModel(SiglipVisionConfig(**TINY_SIGLIP))),
    }
    with torch.no_grad():
        for layer in models["siglip2"].encoder.layers:
            # It starts with blocks that mix all tokens so much that none would still be its own patch's.
            layer.self_attn.out_proj.weight.mul_(0.3)
            layer.mlp.fc2.weight.mul_(0.3)
    for name, model in models.items():
        model.save_pretrained(root / name)
    size = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 2}
    vit = stir(timm.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=0, **size))
    save_for_hf(vit, root / "timm", model_args={**size, "img_size": 56}, safe_serialization=True)
    return {
        "dinov2": Kind("dinov2", 14, 1, models["dinov2"], root / "dinov2", lambda net: net.encoder.layer, last),
        "dinov3": Kind("dinov3", 16, 5, models["dinov3"], root / "dinov3", lambda net: net.model.layer, last),
        "siglip2": Kind(
            "siglip2",
            16,
            0,
            models["siglip2"],
            root / "siglip2",
            lambda net: net.encoder.layers,
            lambda net, images: net(images, interpolate_pos_encoding=True).last_hidden_state,
        ),
        "timm": Kind(
            "dinov2",
            14,
            1,
            vit,
            root / "timm",
            lambda net: net.blocks,
            lambda net, images: net.forward_features(images),
        ),
    }


@pytest.fixture(params=["dinov2", "dinov3", "siglip2", "timm"])
def kind(request: pytest.FixtureRequest, kinds: dict[str, Kind]) -> Kind:
    return kinds[request.param]


def noise(count: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@torch.inference_mode()
def reference(kind: Kind, encoder: Encoder, frames: np.ndarray) -> Tensor:
    return kind.call(kind.network, encoder.preprocess(torch.from_numpy(frames)))


def assert_close(tokens: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(tokens.float(), expected.float(), atol=4e-3, rtol=4e-3)


def test_a_folder_says_what_grid_and_dimension_are(kind: Kind) -> None:
    encoder = kind.create()
    assert (encoder.token_grid, encoder.token_dim) == ((SIDE, SIDE), DIM)
    tokens = encoder(noise(3))
    assert tokens.shape == (3, SIDE * SIDE, DIM)
    assert tokens.dtype == torch.float16
    assert encoder.source == "file"


def test_tokens_are_the_librarys_without_those_before_the_patches(kind: Kind) -> None:
    encoder = kind.create()
    frames = noise(2)
    expected = reference(kind, encoder, frames)
    assert expected.shape[1] == kind.prefix + SIDE * SIDE
    assert_close(encoder(frames), expected[:, kind.prefix :])


def test_the_class_token_is_the_first_and_pooled_the_mean_patch(kind: Kind) -> None:
    pooled, frames = kind.create("pooled"), noise(2)
    expected = reference(kind, pooled, frames)
    assert pooled.token_grid == (1, 1)
    assert_close(pooled(frames), expected[:, kind.prefix :].mean(1, keepdim=True))
    if kind.prefix:
        assert kind.create("cls").token_grid == (1, 1)
        assert_close(kind.create("cls")(frames), expected[:, :1])


# Another size than the configs' own goes through interpolated (or rotary) positions.
@pytest.mark.parametrize("side", [SIDE, 5])
def test_the_token_of_a_bright_patch_reacts_most(kind: Kind, side: int) -> None:
    encoder, size = kind.create(side=side), side * kind.patch
    cells = [(row, column) for row in range(side) for column in range(side)]
    images = torch.zeros(1 + len(cells), 3, size, size)
    for i, (row, column) in enumerate(cells, 1):
        images[i, :, row * kind.patch : (row + 1) * kind.patch, column * kind.patch : (column + 1) * kind.patch] = 1
    # Past the preprocessing, which may blur a patch into its neighbours.
    with torch.inference_mode():
        found = encoder.backbone(images, [LAST])[LAST]
    tokens = found[:, encoder.backbone.prefix :]
    assert tokens.shape[1] == side * side
    changed = (tokens[1:] - tokens[0]).norm(dim=-1).argmax(1)
    assert changed.tolist() == list(range(side * side))


def test_the_whole_way_from_a_frame_keeps_rows_and_columns(kind: Kind) -> None:
    encoder, size = kind.create(), SIDE * kind.patch
    cells = [(0, 3), (1, 2), (3, 1), (2, 0)]
    frames = np.zeros((1 + len(cells), size, size, 3), np.uint8)
    for i, (row, column) in enumerate(cells, 1):
        frames[i, row * kind.patch :, column * kind.patch :][: kind.patch, : kind.patch] = 255
    tokens = encoder(frames).float()
    changed = (tokens[1:] - tokens[0]).norm(dim=-1).argmax(1)
    assert changed.tolist() == [row * SIDE + column for row, column in cells]


def test_another_image_size_gives_the_librarys_tokens(kind: Kind) -> None:
    encoder, frames = kind.create(side=6), noise(2)
    assert encoder.token_grid == (6, 6)
    if kind.folder.name == "timm":
        other = timm.create_model(f"local-dir:{kind.folder}", pretrained=True, img_size=84, num_classes=0).eval()
        with torch.inference_mode():
            expected = other.forward_features(encoder.preprocess(torch.from_numpy(frames)))
    else:
        expected = reference(kind, encoder, frames)
    assert_close(encoder(frames), expected[:, kind.prefix :])


def test_intermediate_layers_are_outputs_of_blocks(kind: Kind) -> None:
    encoder, frames = kind.create("layers"), noise(2)
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in kind.blocks(kind.network)
    ]
    expected = reference(kind, encoder, frames)
    for handle in handles:
        handle.remove()
    assert len(outputs) == DEPTH
    parts = encoder.head.by_layer(encoder(frames))
    assert list(parts) == [EARLY, MIDDLE, LAST]
    assert (early_block(DEPTH), middle_block(DEPTH)) == (1, 3)
    assert_close(parts[EARLY], outputs[0])
    assert_close(parts[MIDDLE], outputs[2])
    assert_close(parts[LAST], expected)
    assert encoder.identity("data").layer == "block 1+block 3+norm"


def test_hidden_states_are_the_librarys(kinds: dict[str, Kind]) -> None:
    for name in ("dinov2", "dinov3", "siglip2"):
        kind = kinds[name]
        encoder, frames = kind.create("layers"), noise(2)
        with torch.inference_mode():
            images = encoder.preprocess(torch.from_numpy(frames))
            hidden = kind.network(pixel_values=images, output_hidden_states=True).hidden_states
            found = encoder.backbone(images, [EARLY, MIDDLE])
        torch.testing.assert_close(found[EARLY], hidden[1], atol=0, rtol=0)
        torch.testing.assert_close(found[MIDDLE], hidden[3], atol=0, rtol=0)


def test_layers_restore_exactly_what_the_selections_give(kind: Kind) -> None:
    frames = noise(3)
    layers, patch, pooled = kind.create("layers"), kind.create(), kind.create("pooled")
    assert layers.token_grid == ((1, kind.prefix + SIDE * SIDE) if kind.prefix else (SIDE, SIDE))
    assert layers.token_dim == 3 * DIM
    restored = layers.head.restore(layers(frames))
    assert torch.equal(patch.tokens(restored), patch(frames))
    assert torch.equal(pooled.tokens(restored), pooled(frames))
    if kind.prefix:
        cls = kind.create("cls")
        assert torch.equal(cls.tokens(restored), cls(frames))


def test_selections_share_one_pass_of_one_backbone(kind: Kind) -> None:
    selections = ["", "pooled", "layers"] + ["cls"] * bool(kind.prefix)
    several, frames = [kind.create(selection) for selection in selections], noise(2)
    assert len({encoder.backbone_key for encoder in several}) == 1
    for encoder, tokens in zip(several, encode_together(several, frames), strict=True):
        assert torch.equal(tokens, encoder(frames))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dinov2", {"layer_norm_eps": 1e-2}),
        ("dinov2", {"num_attention_heads": 4}),
        ("dinov3", {"rope_theta": 10.0}),
        ("siglip2", {"hidden_act": "relu"}),
        ("timm", {"model_args": {"embed_dim": DIM, "depth": DEPTH, "num_heads": 4, "img_size": 56}}),
    ],
)
def test_the_same_tensors_with_another_arithmetic_are_another_encoder(
    kinds: dict[str, Kind], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(kinds[name].folder, tmp_path / "folder"))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **settings}))
    one, other = kinds[name].create(), replace(kinds[name], folder=folder).create()
    assert not torch.equal(one(noise(1)), other(noise(1)))
    assert one.backbone_key != other.backbone_key
    assert [line.split(":")[0] for line in one.identity("x").differences(other.identity("x"))] == ["weights_sha256"]


@pytest.mark.parametrize("family", [dinov3, siglip2])
def test_a_folder_of_the_usual_settings_is_the_same_encoder_as_its_file(
    kinds: dict[str, Kind], family: ModuleType, tmp_path: Path
) -> None:
    kind = kinds[family.SPEC.name]
    settings = {**TINY, "intermediate_size": 64, "image_size": 64} | (
        {"num_register_tokens": 4} if family is dinov3 else {}
    )
    size = ModelSize("", "tiny", DEPTH, DIM, "nowhere", settings=settings)
    file, folder = (
        load_hf(family.HF, size, family.SPEC, 64, path) for path in (kind.folder / "model.safetensors", kind.folder)
    )
    assert file.config == folder.config == ""
    assert file.sha256 == folder.sha256


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ({"architecture": "vit_small_patch14_dinov2"}, True),
        (
            {"architecture": "vit_small_patch14_dinov2.other_tag", "model_args": {"img_size": 56, "drop_rate": 0.1}},
            True,
        ),
        ({"architecture": "vit_small_patch14_dinov2", "model_args": {"num_heads": 3}}, False),
        ({"architecture": "vit_base_patch14_dinov2"}, False),
    ],
)
def test_a_timm_folder_of_the_usual_settings_is_the_same_encoder_as_its_file(
    tmp_path: Path, written: dict[str, Any], same: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert (timm_settings(tmp_path, "vit_small_patch14_dinov2.lvd142m") == "") == same
    assert timm_settings(tmp_path / "model.safetensors", "vit_small_patch14_dinov2.lvd142m") == ""


def test_tokens_do_not_depend_on_the_batch(kind: Kind) -> None:
    encoder, frames = kind.create(), noise(5)
    whole = encoder(frames)
    for batch in (1, 2):
        assert_close(torch.cat([encoder(frames[start : start + batch]) for start in range(0, 5, batch)]), whole)


def test_bfloat16_is_close_to_float32(kind: Kind) -> None:
    frames = noise(3)
    exact, rough = (kind.create(dtype=dtype)(frames).float() for dtype in ("float32", "bfloat16"))
    assert not torch.equal(exact, rough)
    assert torch.cosine_similarity(exact, rough, dim=-1).min() > 0.99


def test_encoding_twice_gives_the_same_bits(kind: Kind) -> None:
    assert torch.equal(kind.create()(noise(2)), kind.create()(noise(2)))


def test_an_image_size_that_is_no_multiple_of_the_configs_patch_is_refused(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    model = DINOv3ViTModel(DINOv3ViTConfig(**TINY, intermediate_size=64, patch_size=32, image_size=64))
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="--image-size 48 does not fit encoder dinov3; choose a multiple of 32"):
        encoders.create("dinov3", weights=tmp_path / "wide", image_size=48, device="cpu")
    for kind in kinds.values():
        with pytest.raises(UserError, match=f"--image-size 65 .*; choose a multiple of {kind.patch}"):
            encoders.create(kind.encoder, weights=kind.folder, image_size=65, device="cpu")


@pytest.mark.parametrize(
    ("encoder", "folder"),
    [
        ("dinov2", "dinov3"),
        ("dinov2", "siglip2"),
        ("dinov3", "dinov2"),
        ("dinov3", "timm"),
        ("siglip2", "dinov3"),
        ("siglip2", "timm"),
        ("dinov3-layers", "siglip2"),
    ],
)
def test_a_folder_of_another_family_is_refused(kinds: dict[str, Kind], encoder: str, folder: str) -> None:
    with pytest.raises(UserError, match=rf"{folder} holds a \w+, not a ") as refused:
        encoders.create(encoder, weights=kinds[folder].folder, device="cpu")
    assert "\n" not in str(refused.value)


def test_a_timm_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    resnet = timm.create_model("resnet10t", num_classes=0)
    save_for_hf(resnet, tmp_path / "resnet", safe_serialization=True)
    with pytest.raises(UserError, match="resnet holds a timm resnet10t, not dinov2; pass weights of timm/vit_small"):
        encoders.create("dinov2", weights=tmp_path / "resnet", device="cpu")


def damage(kind: Kind, place: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    folder = Path(shutil.copytree(kind.folder, place / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("arguments", [["img_size"], {"embed_dim": "many"}])
def test_damaged_arguments_of_a_timm_folder_are_an_error(
    kinds: dict[str, Kind], tmp_path: Path, arguments: object
) -> None:
    folder = Path(shutil.copytree(kinds["timm"].folder, tmp_path / "folder"))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "model_args": arguments}))
    with pytest.raises(UserError, match="does not hold the weights of") as refused:
        replace(kinds["timm"], folder=folder).create()
    assert "\n" not in str(refused.value)


def test_a_missing_weight_is_an_error(kind: Kind, tmp_path: Path) -> None:
    gone: list[str] = []

    def change(tensors: dict[str, Tensor]) -> None:
        gone.extend(sorted(name for name in tensors if "norm" in name)[:1])
        del tensors[gone[0]]

    folder = damage(kind, tmp_path, change)
    with pytest.raises(UserError, match=r"(?i)damaged.*missing.*norm") as refused:
        replace(kind, folder=folder).create()
    assert "\n" not in str(refused.value)


def test_an_unknown_weight_is_an_error(kind: Kind, tmp_path: Path) -> None:
    folder = damage(kind, tmp_path, lambda tensors: tensors.update(surplus=torch.zeros(1)))
    with pytest.raises(UserError, match=r"damaged.*(unknown|Unexpected).*surplus"):
        replace(kind, folder=folder).create()


def test_a_weight_of_another_shape_is_an_error(kind: Kind, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if "mlp" in name and name.endswith("weight"))
        tensors[name] = tensors[name][:, 1:].contiguous()

    with pytest.raises(UserError, match=r"damaged.*(of another shape|size mismatch).*mlp"):
        replace(kind, folder=damage(kind, tmp_path, change)).create()


def shard(folder: Path) -> None:
    """Split a folder's file as `save_pretrained` does with a small `max_shard_size`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_a_folder_of_several_files_is_read_or_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kind.folder, tmp_path / "folder"))
    shard(folder)
    if kind.folder.name == "timm":  # which writes one file, whatever its size
        with pytest.raises(UserError, match=r"several files \(model\.safetensors\.index\.json\)"):
            replace(kind, folder=folder).create()
    else:
        assert replace(kind, folder=folder).create().weights_sha256 == kind.create().weights_sha256


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda parts: parts.update(x="../model.safetensors"), r"index\.json names '\.\./model\.safetensors'"),
        (lambda parts: parts.update(x="code.bin"), r"index\.json names 'code\.bin'"),
        (lambda parts: parts.update(x="model-3.safetensors"), r"model-3\.safetensors is missing"),
        (lambda parts: parts.clear(), r"index\.json is damaged"),
    ],
)
def test_a_damaged_index_is_an_error(
    kinds: dict[str, Kind], tmp_path: Path, change: Callable[[dict[str, str]], object], named: str
) -> None:
    folder = Path(shutil.copytree(kinds["dinov3"].folder, tmp_path / "folder"))
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=named):
        encoders.create("dinov3", weights=folder, device="cpu")


def test_a_file_that_is_cut_short_is_an_error(kind: Kind, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kind.folder, tmp_path / "short"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"short/model\.safetensors does not hold the weights of ") as refused:
        replace(kind, folder=folder).create()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "dinov3_vit", "hidden_size": "many"}'])
def test_a_damaged_config_is_an_error(kinds: dict[str, Kind], tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(kinds["dinov3"].folder, tmp_path / "folder"))
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"folder/config\.json .*; save the folder again") as refused:
        encoders.create("dinov3", weights=folder, device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "surplus",
    [{"return_dict": False}, {"output_attentions": False}, {"attn_implementation": "somebody/kernel"}],
    ids=lambda surplus: next(iter(surplus)),
)
def test_settings_that_are_not_of_the_network_change_nothing(
    kinds: dict[str, Kind], tmp_path: Path, surplus: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(kinds["dinov3"].folder, tmp_path / "folder"))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **surplus}))
    found, expected = (kind.create("layers") for kind in (replace(kinds["dinov3"], folder=folder), kinds["dinov3"]))
    assert torch.equal(found(noise(1)), expected(noise(1)))
    assert found.backbone_key == expected.backbone_key


def test_quantised_weights_are_refused(kinds: dict[str, Kind], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kinds["dinov3"].folder, tmp_path / "folder"))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="folder holds quantised weights"):
        replace(kinds["dinov3"], folder=folder).create()


def test_a_folder_without_a_config_is_an_error(kind: Kind, tmp_path: Path) -> None:
    shutil.copy(kind.folder / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"config\.json does not exist; save the folder again"):
        replace(kind, folder=tmp_path).create()


def test_a_config_that_names_code_runs_none_of_it(kinds: dict[str, Kind], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kinds["dinov3"].folder, tmp_path / "folder"))
    written = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**written, "auto_map": names}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tokens = replace(kinds["dinov3"], folder=folder).create()(noise(1))
    assert torch.equal(tokens, kinds["dinov3"].create()(noise(1)))
    assert not (tmp_path / "ran").exists()


def test_the_text_tower_of_a_whole_siglip_is_left_out(tmp_path: Path) -> None:
    text = {**TINY, "intermediate_size": 64, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    whole = stir(SiglipModel(SiglipConfig(vision_config=TINY_SIGLIP, text_config=text)))
    whole.save_pretrained(tmp_path / "whole")
    encoder = encoders.create("siglip2", weights=tmp_path / "whole", image_size=64, dtype="float32", device="cpu")
    with torch.inference_mode():
        images = encoder.preprocess(torch.from_numpy(noise(2)))
        expected = whole.vision_model(images).last_hidden_state
    assert_close(encoder(noise(2)), expected)


def test_half_precision_files_are_computed_in_the_precision_that_is_asked_for(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    DINOv3ViTModel.from_pretrained(kinds["dinov3"].folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    encoder = replace(kinds["dinov3"], folder=tmp_path / "half").create()
    assert {value.dtype for value in encoder.backbone.parameters()} == {torch.float32}
    assert_close(encoder(noise(1)), kinds["dinov3"].create()(noise(1)))


FAMILIES = [spec for spec in encoders.specs() if spec.name.partition("-")[0] in ("dinov2", "dinov3", "siglip2")]


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.name)
def test_a_name_says_size_and_selection(spec: EncoderSpec) -> None:
    family, *rest = spec.name.split("-")
    size = rest.pop(0) if rest and rest[0] in ("base", "large") else ""
    selection = rest.pop(0) if rest else "patch"
    assert not rest
    assert spec.token_selection == selection
    dims = {"dinov2": {"": 384, "base": 768, "large": 1024}, "siglip2": {"": 768}}
    dim = dims.get(family, dims["dinov2"])[size]
    assert spec.token_dim == (3 * dim if selection == "layers" else dim)
    prefix = {"dinov2": 1, "dinov3": 5, "siglip2": 0}[family]
    all_tokens = (1, prefix + 196) if prefix else (14, 14)
    assert spec.token_grid == {"patch": (14, 14), "layers": all_tokens}.get(selection, (1, 1))
    assert len(spec.revision) == 40
    assert bool(spec.accept) == (family == "dinov3")


def test_there_is_every_selection_of_every_size() -> None:
    names = {spec.name for spec in FAMILIES}
    sizes = ["dinov2", "dinov2-base", "dinov2-large", "dinov3", "dinov3-base", "dinov3-large"]
    expected = {name + selection for name in sizes for selection in ("", "-cls", "-pooled", "-layers")}
    assert names == expected | {"siglip2", "siglip2-pooled", "siglip2-layers"}
