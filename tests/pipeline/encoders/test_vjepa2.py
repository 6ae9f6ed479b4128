from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model, VJEPA2VideoProcessor

from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder
from wmcache.pipeline.encoders.vjepa2 import make_encoder

SIZE = 64
TINY = VJEPA2Config(
    hidden_size=48,
    num_attention_heads=2,
    num_hidden_layers=6,
    mlp_ratio=2.0,
    pred_hidden_size=24,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
    crop_size=SIZE,
    frames_per_clip=4,
    # With transformers' 0.02 attention would hardly look at positions.
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the real class, as `save_pretrained` writes it; read only."""
    path = tmp_path_factory.mktemp("vjepa2") / "tiny"
    torch.manual_seed(0)
    VJEPA2Model(TINY).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> VJEPA2Model:
    return VJEPA2Model.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def vjepa2(folder: Path) -> Encoder:
    return create("vjepa2", folder)


@pytest.fixture(scope="module")
def pair(folder: Path) -> Encoder:
    return create("vjepa2-pair", folder)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A folder of one's own, to be damaged at will."""
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


def create(name: str, folder: Path, image_size: int = SIZE, dtype: str = "float32") -> Encoder:
    return encoders.create(name, weights=folder, image_size=image_size, dtype=dtype, device="cpu")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@torch.inference_mode()
def reference(model: VJEPA2Model, *frames: Tensor) -> Tensor:
    return model(pixel_values_videos=torch.stack(frames, 1), skip_predictor=True).last_hidden_state.half()


def test_tokens_are_the_librarys_of_a_clip_of_one_frame(model: VJEPA2Model, vjepa2: Encoder) -> None:
    frames = noise(3, SIZE, SIZE)
    images = vjepa2.preprocess(torch.from_numpy(frames))
    assert vjepa2.token_grid == (4, 4)
    tokens = vjepa2(frames)
    assert tokens.shape == (3, 16, 48)
    torch.testing.assert_close(tokens, reference(model, images), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(tokens, reference(model, images, images), atol=2e-3, rtol=2e-3)


def test_the_published_configuration_is_what_the_specs_promise() -> None:
    encoder, grid = make_encoder(encoders.get_spec("vjepa2"), 256, Path("weights.safetensors"))
    config = encoder.config
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size, config.crop_size) == (1024, 24, 16, 256)
    spec = encoders.get_spec("vjepa2")
    assert (spec.token_grid, spec.token_dim, spec.lag) == ((grid, grid), config.hidden_size, 0)
    assert encoders.get_spec("vjepa2-layers").token_dim == 3 * config.hidden_size


@pytest.mark.parametrize("size", [SIZE, 48, 100])
def test_preprocessing_is_the_librarys_without_its_crop(vjepa2: Encoder, size: int) -> None:
    frames = torch.from_numpy(noise(2, size, size))
    processor = VJEPA2VideoProcessor(do_rescale=False, do_center_crop=False)
    images = processor(
        [frames.permute(0, 3, 1, 2).float() / 255], size={"height": SIZE, "width": SIZE}, return_tensors="pt"
    )
    torch.testing.assert_close(vjepa2.preprocess(frames), images["pixel_values_videos"][0], atol=1e-5, rtol=0)


def test_normalisation_is_imagenets(vjepa2: Encoder) -> None:
    white = vjepa2.preprocess(torch.full((1, SIZE, SIZE, 3), 255, dtype=torch.uint8))[0, :, 5, 5]
    expected = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(white, torch.tensor(expected))


def test_tokens_are_row_major_over_the_image(vjepa2: Encoder) -> None:
    frames = np.zeros((17, SIZE, SIZE, 3), np.uint8)
    for i in range(16):
        row, column = divmod(i, 4)
        frames[1 + i, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 255
    tokens = vjepa2(frames).float()
    assert (tokens[1:] - tokens[0]).norm(dim=-1).argmax(1).tolist() == list(range(16))


def test_positions_follow_the_image_size_and_not_the_folders_crop(folder: Path, model: VJEPA2Model) -> None:
    encoder = create("vjepa2", folder, image_size=96)
    frames = noise(2, 96, 96)
    tokens = encoder(frames)
    assert encoder.token_grid == (6, 6)
    images = encoder.preprocess(torch.from_numpy(frames))
    right = VJEPA2Model.from_pretrained(folder, crop_size=96).eval()
    torch.testing.assert_close(tokens, reference(right, images), atol=2e-3, rtol=2e-3)
    # The same network with its rows and columns of 64 px is what must not happen.
    assert (tokens - reference(model, images)).abs().max() > 0.1


def test_tokens_do_not_depend_on_the_batch(vjepa2: Encoder) -> None:
    frames = noise(3, SIZE, SIZE)
    single = torch.cat([vjepa2(frames[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(single, vjepa2(frames), atol=2e-3, rtol=2e-3)


def test_bfloat16_tokens_are_close(folder: Path, vjepa2: Encoder) -> None:
    frames = noise(4, SIZE, SIZE)
    tokens = create("vjepa2", folder, dtype="bfloat16")(frames)
    assert torch.cosine_similarity(tokens.float().flatten(1), vjepa2(frames).float().flatten(1)).min() > 0.999


def test_pooled_is_the_mean_of_all_tokens(folder: Path, vjepa2: Encoder) -> None:
    pooled = create("vjepa2-pooled", folder)
    assert (pooled.token_grid, pooled.token_dim) == ((1, 1), 48)
    frames = noise(2, SIZE, SIZE)
    torch.testing.assert_close(
        pooled(frames).float(), vjepa2(frames).float().mean(1, keepdim=True), atol=2e-3, rtol=2e-3
    )


@torch.inference_mode()
def test_layers_are_two_hidden_states_and_the_norm(folder: Path, model: VJEPA2Model) -> None:
    encoder = create("vjepa2-layers", folder)
    frames = noise(2, SIZE, SIZE)
    images = encoder.preprocess(torch.from_numpy(frames))[:, None]
    made = model(pixel_values_videos=images, skip_predictor=True, output_hidden_states=True)
    assert encoder.identity("data").layer == "block 1+block 3+norm"
    expected = torch.cat([made.hidden_states[1], made.hidden_states[3], made.last_hidden_state], -1)
    torch.testing.assert_close(encoder(frames), expected.half(), atol=2e-3, rtol=2e-3)


def test_a_pair_is_a_tubelet_of_the_earlier_frame_and_the_frame(model: VJEPA2Model, pair: Encoder) -> None:
    earlier, frames = noise(2, SIZE, SIZE), noise(2, SIZE, SIZE, seed=1)
    first, second = (pair.preprocess(torch.from_numpy(some)) for some in (earlier, frames))
    assert pair.lag == 5
    tokens = pair(np.stack([earlier, frames], 1))
    torch.testing.assert_close(tokens, reference(model, first, second), atol=2e-3, rtol=2e-3)
    assert (tokens - reference(model, second, first)).abs().max() > 0.1


def test_a_pair_of_equal_frames_is_the_frame(vjepa2: Encoder, pair: Encoder) -> None:
    frames = noise(2, SIZE, SIZE)
    tokens = vjepa2(frames)
    # The images lie differently in memory, so sums may have another order: float16 takes the next value at most.
    step = 2**-10 * float(tokens.abs().max())
    torch.testing.assert_close(pair(np.stack([frames, frames], 1)), tokens, atol=step, rtol=0)
    torch.testing.assert_close(pair(frames), tokens, atol=step, rtol=0)


def test_only_the_pair_takes_pairs(vjepa2: Encoder, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, S, S, 3\]"):
        vjepa2(noise(1, 2, SIZE, SIZE))
    with pytest.raises(UserError, match="one frame at a time"):
        encoders.create("vjepa2", weights=folder, image_size=SIZE, lag=5)


def test_the_lag_is_part_of_the_identity(vjepa2: Encoder, pair: Encoder) -> None:
    assert "5 env steps before" in pair.identity("data").token_selection
    assert pair.weights_sha256 == vjepa2.weights_sha256


def test_the_predictor_does_not_count(vjepa2: Encoder, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    assert any(name.startswith("predictor.") for name in weights)
    save_file(
        {name: value for name, value in weights.items() if name.startswith("encoder.")}, copied / "model.safetensors"
    )
    assert create("vjepa2", copied).weights_sha256 == vjepa2.weights_sha256


def test_a_folder_of_several_files_is_read(vjepa2: Encoder, model: VJEPA2Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert not (tmp_path / "model.safetensors").exists()
    assert create("vjepa2", tmp_path).weights_sha256 == vjepa2.weights_sha256
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name} is missing"):
        create("vjepa2", tmp_path)


def test_a_folder_of_the_model_for_classification_gives_its_encoder(model: VJEPA2Model, tmp_path: Path) -> None:
    classifier = VJEPA2ForVideoClassification(model.config).eval()
    classifier.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {name.partition(".")[0] for name in names} == {"vjepa2", "pooler", "classifier"}
    encoder, frames = create("vjepa2", tmp_path), noise(2, SIZE, SIZE)
    images = encoder.preprocess(torch.from_numpy(frames))
    torch.testing.assert_close(encoder(frames), reference(classifier.vjepa2, images), atol=2e-3, rtol=2e-3)


def test_half_precision_files_are_computed_with_in_single(vjepa2: Encoder, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, copied / "model.safetensors")
    encoder = create("vjepa2", copied)
    assert {value.dtype for value in encoder.backbone.state_dict().values()} == {torch.float32}
    frames = noise(2, SIZE, SIZE)
    torch.testing.assert_close(encoder(frames), vjepa2(frames), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("encoder.layer.3.mlp.fc1.bias"), r"missing: layer\.3\.mlp\.fc1\.bias"),
        (lambda weights: weights.update({"encoder.adapter.bias": torch.zeros(3)}), r"unknown: adapter\.bias"),
        (lambda weights: weights.update({"encoder.layernorm.bias": torch.zeros(3)}), "of another shape: layernorm"),
    ],
)
def test_files_that_lack_a_weight_or_have_another_are_refused(copied: Path, change: object, reason: str) -> None:
    weights = load_file(copied / "model.safetensors")
    change(weights)
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(UserError, match=f"does not fit vjepa2 .*{reason}") as raised:
        create("vjepa2", copied)
    assert "\n" not in str(raised.value)


def test_half_a_download_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="does not hold the weights of vjepa2"):
        create("vjepa2", copied)


def test_a_file_alone_is_taken_for_the_published_size(folder: Path) -> None:
    with pytest.raises(UserError, match=r"missing: .* and [0-9]+ more") as raised:
        create("vjepa2", folder / "model.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "dinov2"}, "holds a dinov2, not a vjepa2"),
        ({"tubelet_size": 4}, "tubelets of 4 frames"),
        ({"patch_size": [16, 8]}, r"patches of \[16, 8\]"),
        ({"patch_size": 0}, "patches of 0"),
        ({"patch_size": 24}, "--image-size 64 does not fit encoder vjepa2; choose a multiple of 24"),
        ({"hidden_size": "wide"}, "is damaged .*hidden_size"),
        ({"hidden_size": 50, "num_attention_heads": 3}, "is damaged .*attention heads"),
    ],
)
def test_a_folder_of_another_model_is_refused(copied: Path, change: dict[str, object], reason: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=reason) as raised:
        create("vjepa2", copied)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", [None, "<html>404</html>", "[]"])
def test_a_folder_without_a_configuration_is_refused(copied: Path, text: str | None) -> None:
    (copied / "config.json").unlink()
    if text is not None:
        (copied / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json .*save_pretrained"):
        create("vjepa2", copied)


def test_an_image_size_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="--image-size 72 does not fit encoder vjepa2; choose a multiple of 16"):
        create("vjepa2", folder, image_size=72)


def test_settings_that_no_tensor_tells_are_part_of_the_identity(vjepa2: Encoder, copied: Path) -> None:
    written = json.loads((copied / "config.json").read_text())
    for settings, same in (({"pred_num_attention_heads": 1}, True), ({"num_attention_heads": 4}, False)):
        (copied / "config.json").write_text(json.dumps({**written, **settings}))
        assert (create("vjepa2", copied).backbone_key == vjepa2.backbone_key) == same
