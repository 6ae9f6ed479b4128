"""DINO-WM's checkpoints as runs: the numbers of the reference, and nothing in a foreign pickle is ever run."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from reference_dino_wm import (
    FRAMESKIP,
    HISTORY,
    REAL,
    TINY,
    VQVAE,
    AcceleratedOptimizer,
    DinoVisionTransformer,
    imagine,
    make_hydra,
    make_parts,
    make_store,
    refuse,
    save,
    write,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from wmcache.cache import TokenStore
from wmcache.cli import main, wmplan, wmtrain
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract
from wmcache.pipeline.frames import FrameDataset
from wmcache.trainer.import_dino_wm import import_dino_wm
from wmcache.trainer.models import rollout
from wmcache.trainer.runs import load_model, read_config

CPU = torch.device("cpu")


def standardised(store: TokenStore, name: str, value: Tensor) -> Tensor:
    """As the reference: by mean and unbiased deviation over all frames of all episodes."""
    column = torch.from_numpy(np.asarray(getattr(store, name))).float()
    repeats = value.shape[-1] // column.shape[1]
    return (value - column.mean(0).repeat(repeats)) / column.std(0).repeat(repeats)


@torch.inference_mode()
@pytest.mark.parametrize("observed", [1, 2, 3])
@pytest.mark.parametrize("concat_dim", [1, 0])
def test_rollouts_give_the_numbers_of_the_reference(
    cache: Path, tmp_path: Path, concat_dim: int, observed: int
) -> None:
    # Five steps from one frame have windows of 1, 2, 3, 3 and 3 frames.
    parts, generator = make_parts(concat_dim), torch.Generator().manual_seed(1)
    import_dino_wm(write(tmp_path / "theirs", parts, make_hydra(concat_dim)), cache, tmp_path / "run")
    for name in ("predictor", "action_encoder", "proprio_encoder"):
        parts[name].eval()
    patches, dim = TINY["side"] ** 2, TINY["dim"]
    tokens = torch.randn(2, observed, patches, dim, generator=generator)
    proprio = 3 + torch.randn(2, observed, 4, generator=generator)
    action = torch.randn(2, observed + 4, 10, generator=generator)
    store = TokenStore.open(cache)
    scaled = standardised(store, "state", proprio), standardised(store, "action", action)
    expected = imagine(parts, concat_dim, tokens, *scaled)
    found = rollout(load_model(tmp_path / "run", CPU), tokens, proprio, action)
    imagined, embedding = found.latents[:, 0], found.proprio[:, 0]
    assert imagined.shape[1] == 5
    torch.testing.assert_close(imagined, expected[:, :, :patches, :dim], atol=1e-5, rtol=0)
    wanted = expected[:, :, 0, dim : dim + TINY["embedding"]] if concat_dim else expected[:, :, patches]
    torch.testing.assert_close(embedding, wanted, atol=1e-5, rtol=0)


def test_the_run_is_as_wmtrain_would_write_it(folder: Path, cache: Path, tmp_path: Path) -> None:
    imported = import_dino_wm(folder, cache, tmp_path / "run")
    config, store = read_config(tmp_path / "run"), TokenStore.open(cache)
    source = config["imported"]
    assert (imported.epoch, source["epoch"], len(source["sha256"])) == (7, 7, 64)
    assert source["file"] == str(folder / "checkpoints" / "model_latest.pth")
    assert config["cache"] == str(cache)
    assert (config["history"], config["frameskip"]) == (HISTORY, FRAMESKIP)
    assert config["shape"]["tokens"] == TINY["side"] ** 2
    model = load_model(tmp_path / "run", CPU)
    assert imported.parameters == sum(value.numel() for value in model.parameters())
    for buffer, column in (("proprio", store.state), ("action", np.tile(store.action, FRAMESKIP))):
        np.testing.assert_allclose(getattr(model, f"{buffer}_mean"), column.mean(0), atol=1e-5)
        np.testing.assert_allclose(getattr(model, f"{buffer}_std"), column.std(0, ddof=1), atol=1e-5)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "run"}


def test_wmtrain_continues_it(folder: Path, cache: Path, tmp_path: Path) -> None:
    import_dino_wm(folder, cache, tmp_path / "run")
    sizes = "--depth 2 --heads 2 --head-dim 8 --mlp 20 --embedding 6"
    words = f"--preset dino-wm --resume --epochs 1 {sizes} --device cpu --cache {cache} --out {tmp_path / 'run'}"
    done = CliRunner().invoke(wmtrain, words.split())
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-00000001"


def test_optimisers_decoder_and_frozen_encoder_are_ignored(folder: Path, cache: Path, tmp_path: Path) -> None:
    parts = make_parts(1)
    stepped = AcceleratedOptimizer(list(make_parts(1)["predictor"].parameters()))
    parts |= {"predictor_optimizer": stepped, "decoder": VQVAE(), "encoder": DinoVisionTransformer()}
    after = write(tmp_path / "after", parts | {"decoder_optimizer": None}, make_hydra())
    for source in (folder, after):
        import_dino_wm(source, cache, source / "run")
    weights = [load_model(source / "run", CPU).state_dict() for source in (folder, after)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_model_of_raw_actions_gets_raw_actions(cache: Path, tmp_path: Path) -> None:
    hydra = make_hydra()
    hydra["env"]["dataset"]["normalize_action"] = False
    theirs = write(tmp_path / "theirs", make_parts(1), hydra)
    assert not import_dino_wm(theirs, cache, tmp_path / "run").standardised
    model: Any = load_model(tmp_path / "run", CPU)
    assert not model.proprio_mean.any()
    assert not model.action_mean.any()
    assert (model.action_std == 1).all()
    assert (model.proprio_std == 1).all()


def test_another_run_is_replaced_only_with_overwrite(folder: Path, cache: Path, tmp_path: Path) -> None:
    import_dino_wm(folder, cache, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "last" / "model.safetensors"
    before = weights.stat()
    import_dino_wm(folder, cache, tmp_path / "run")  # the same import again
    assert weights.stat() == before
    write(folder, make_parts(1) | {"epoch": 8}, make_hydra())
    with pytest.raises(UserError, match=r"run .*--out"):
        import_dino_wm(folder, cache, tmp_path / "run")
    import_dino_wm(folder, cache, tmp_path / "run", overwrite=True)
    assert read_config(tmp_path / "run")["imported"]["epoch"] == 8
    with pytest.raises(UserError, match=r"theirs .*--out"):
        import_dino_wm(folder, cache, folder, overwrite=True)  # not a run
    assert (folder / "hydra.yaml").exists()


def test_an_epoch_is_chosen_by_its_number(folder: Path, cache: Path, tmp_path: Path) -> None:
    save({**make_parts(1), "epoch": 3}, folder / "checkpoints" / "model_3.pth")
    assert import_dino_wm(folder, cache, tmp_path / "run", checkpoint="3").epoch == 3
    with pytest.raises(UserError, match=r"model_4\.pth"):
        import_dino_wm(folder, cache, tmp_path / "other", checkpoint="4")


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(parts: dict[str, Any]) -> None:
        part, *below, name = path.split(".")
        target = functools.reduce(
            lambda at, step: at[int(step)] if step.isdecimal() else getattr(at, step), below, parts[part]
        )
        setattr(target, name, value)

    return apply


def hook(parts: dict[str, Any]) -> None:
    parts["predictor"].transformer.norm._forward_hooks[0] = "anything"


def state_dict(parts: dict[str, Any]) -> None:
    parts["predictor"] = OrderedDict(parts["predictor"].state_dict())


def without(part: str) -> Callable[[dict[str, Any]], Any]:
    return lambda parts: parts.pop(part)


ATTENTION, MLP = "predictor.transformer.layers.0.0", "predictor.transformer.layers.1.1"


@pytest.mark.parametrize(
    ("apply", "named"),
    [
        (without("action_encoder"), "action_encoder"),
        (state_dict, "predictor"),
        (change("predictor.pos_embedding", nn.Parameter(torch.zeros(1, 8, 24))), "pos_embedding is (1, 8, 24)"),
        (change("predictor.extra", nn.Linear(2, 2)), "predictor.extra"),
        (change(f"{ATTENTION}.bias", torch.ones(1, 1, 12, 12)), "Attention.bias"),
        (change(f"{ATTENTION}.heads", 5), "5 heads"),
        (change(f"{ATTENTION}.heads", 4), "scales"),
        (change(f"{ATTENTION}.attend", nn.Softmax(dim=1)), "attend.dim"),
        (change(f"{ATTENTION}.dropout.p", 0.2), "dropouts"),
        (change(f"{ATTENTION}.to_qkv", nn.Linear(24, 48)), "to_qkv.bias"),
        (change(f"{ATTENTION}.norm.eps", 1e-6), "norm.eps"),
        (change(f"{MLP}.net", nn.Sequential(nn.Linear(2, 2))), "net.0"),
        (change(f"{MLP}.net.1", nn.Linear(24, 21)), "blocks.1.mlp.0.bias is (21,)"),
        (change(f"{MLP}.net.1.weight", nn.Parameter(torch.full((20, 24), math.nan))), "net.1.weight"),
        (change(f"{MLP}.net.1.weight", nn.Parameter(torch.zeros(20, 24).double())), "float64"),
        (change("action_encoder.patch_embed.bias", nn.Parameter(torch.tensor(0.0))), "action_encoder makes 1"),
        (change("predictor.dropout.p", 0.1), "emb_dropout"),
        (change("action_encoder.patch_embed", nn.Conv1d(15, 6, 1)), "embed_action.weight is (6, 15)"),
        (change("action_encoder.patch_embed", nn.Conv1d(10, 6, 2)), "tubelet_size"),
        (change("proprio_encoder.patch_embed", nn.Conv1d(4, 5, 1)), "proprio_encoder makes 5"),
        (change("proprio_encoder.patch_embed", nn.Linear(4, 6)), "proprio_encoder.patch_embed"),
        (hook, "hooks"),
    ],
)
def test_modules_that_differ_from_the_reference_are_named(
    cache: Path, tmp_path: Path, apply: Callable[[dict[str, Any]], Any], named: str
) -> None:
    parts = make_parts(1)
    apply(parts)
    refuse(write(tmp_path / "theirs", parts, make_hydra()), cache, tmp_path, named)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hist", 0),
        ("num_hist", True),
        ("frameskip", "5"),
        ("concat_dim", 2),
        ("num_action_repeat", 7),
        ("normalize_action", 1),
        ("model.train_encoder", True),
        ("env.dataset.n_rollout", 3),
        ("encoder.name", "dinov2_vitb14"),
        ("predictor._target_", "models.mlp.MLP"),
    ],
)
def test_a_setting_that_is_not_implemented_is_named(
    folder: Path, cache: Path, tmp_path: Path, name: str, value: Any
) -> None:
    hydra = make_hydra()
    table = functools.reduce(dict.__getitem__, name.split(".")[:-1], hydra)
    table[name.split(".")[-1]] = value
    if name == "normalize_action":
        del hydra["env"]["dataset"][name]
    (folder / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    refuse(folder, cache, tmp_path, "hydra.yaml", name)


@pytest.mark.parametrize(
    "written",
    [
        "num_hist: !!python/object/apply:os.system ['touch CANARY']",
        "num_hist: !!python/name:os.system",
        "num_hist: [",
        "[" * 1500,
        "\0",
        "2024-99-99",
        "x: &x [*x, *x]",
        # An alias of aliases of aliases: 2**30 values.
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 31)) + "env: *a30",
        "12",
        "# " + "x" * 2_000_000,
    ],
    ids=range(10),
)
def test_settings_are_plain_values(folder: Path, cache: Path, tmp_path: Path, written: str) -> None:
    (folder / "hydra.yaml").write_text(written.replace("CANARY", str(tmp_path / "canary")))
    refuse(folder, cache, tmp_path, "hydra.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", "tcn"),
        ("resize", "bilinear antialias 28"),
        ("normalisation", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ],
)
def test_a_store_of_other_tokens_is_refused(folder: Path, tmp_path: Path, name: str, value: Any) -> None:
    store = make_store(tmp_path / "other.zarr", TINY["side"], TINY["dim"], **{name: value})
    refuse(folder, store, tmp_path, name, "img_size 224")


def test_a_store_of_another_grid_or_width_is_refused(folder: Path, tmp_path: Path) -> None:
    wider = make_store(tmp_path / "wider.zarr", TINY["side"], TINY["dim"] + 1)
    refuse(folder, wider, tmp_path, "wider.zarr", "(20, 24)", "(20, 25)")
    finer = make_store(tmp_path / "finer.zarr", 3, TINY["dim"], image_size=28, resize="bilinear antialias 32>28")
    refuse(folder, finer, tmp_path, "(3, 3)", "(2, 2)")


@pytest.fixture(scope="module")
def dinov2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 real frames, by a real DINOv2 of random weights, as tests download nothing."""
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {"episodes": 2, "length": 12, "image_size": 64, "frames_per_shard": 24}
    collect("wmcache/PointMaze-UMaze-v0", folder / "data", **sizes, cluster="local:1")
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2.lvd142m", img_size=196, pretrained=False, num_classes=0)
    save_file(network.state_dict(), folder / "random.safetensors")
    encoder = encoders.create("dinov2", weights=folder / "random.safetensors", dtype="float32", device="cpu")
    extract(FrameDataset.open(folder / "data"), encoder, folder / "dinov2-196.zarr")
    return folder / "dinov2-196.zarr"


# A run without a log has an empty legend in its report.
@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_a_checkpoint_is_imported_and_planned_with_by_command(dinov2_cache: Path, tmp_path: Path) -> None:
    sizes = {**TINY, "side": REAL["side"], "dim": REAL["dim"], "depth": 1}
    theirs = write(tmp_path / "theirs", make_parts(1, sizes), make_hydra(1, sizes))
    words = ["import-run", "dino-wm", str(theirs), "--cache", str(dinov2_cache), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "epoch 7" in done.output
    search = "--samples 4 --elites 2 --iterations 1 --horizon 2 --budget 5 --episodes 1 --alpha 1 --device cpu"
    done = CliRunner().invoke(
        wmplan, ["--run", str(tmp_path / "run"), *search.split(), "--out", str(tmp_path / "plan")]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plan" / "report.html").exists()
    (theirs / "hydra.yaml").unlink()
    done = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "other")])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "hydra.yaml" in done.output
