"""JEPA-WM's PointMaze checkpoints as runs: the numbers of an independent implementation, and what cannot be imported is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_jepa_wm as jepa
import torch
import yaml
from click.testing import CliRunner
from reference_dino_wm import ProprioceptiveEmbedding, ViTPredictor, make_store
from reference_jepa_wm import DIM, HEADS, HISTORY, SIDE, TOKENS, imagine, make_predictor, make_settings, save
from torch import Tensor

from wmcache.cli import main
from wmcache.common.errors import UserError
from wmcache.trainer.import_jepa_wm import import_jepa_wm
from wmcache.trainer.models import rollout
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.runs import load_model, read_config
from wmcache.trainer.train import train

CPU, ACTIONS = torch.device("cpu"), 10
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the PointMaze data that its authors trained on, in its hubconf.py.
MEAN, STD = (
    torch.tensor([1.8130563, 1.9377128, -0.0039275, -0.0197780]),
    torch.tensor([1.0055010, 0.9630089, 1.6802770, 1.9319308]),
)
ACTION_MEAN, ACTION_STD = torch.tensor([7.8213387e-05, 6.0036598e-04]), torch.tensor([0.5769130, 0.5775879])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tokens are of the encoder in `make_settings`."""
    size = 14 * SIDE
    own = {"normalisation": IMAGENET, "resize": f"bilinear antialias {size}>{size}"}
    return make_store(tmp_path_factory.mktemp("stores") / "dinov2-28.zarr", SIDE, DIM, **own)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return write(tmp_path / "settings.yaml", make_settings())


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    predictor, encoder = make_predictor(ACTIONS)
    return save(tmp_path / "jepa.pth.tar", predictor.state_dict(), proprio_encoder=embedding_of(encoder))


def write(file: Path, settings: Any) -> Path:
    file.write_text(yaml.safe_dump(settings))
    return file


def embedding_of(encoder: Any) -> dict[str, Tensor]:
    return {f"patch_embed.{name}": value for name, value in encoder.state_dict().items()} if encoder else {}


def make_inputs(observed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, observed, TOKENS, DIM, generator=generator)
    proprio = 2 + torch.randn(2, observed, 4, generator=generator)
    return tokens, proprio, torch.randn(2, observed + 3, ACTIONS, generator=generator)


def standardised(proprio: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    return (proprio - MEAN) / STD, (action - ACTION_MEAN.repeat(5)) / ACTION_STD.repeat(5)


@pytest.mark.parametrize(("observed", "context", "proprio"), [(1, 3, 4), (2, 2, 4), (3, 3, 4), (1, 2, 0)])
def test_rollouts_are_those_of_an_independent_version(
    cache: Path, tmp_path: Path, observed: int, context: int, proprio: int
) -> None:
    predictor, encoder = make_predictor(ACTIONS, proprio)
    file = save(tmp_path / "jepa.pth.tar", predictor.state_dict(), proprio_encoder=embedding_of(encoder))
    imported = import_jepa_wm(file, write(tmp_path / "s.yaml", make_settings(proprio=proprio)), cache, tmp_path / "run")
    assert (imported.epoch, imported.predictor) == (50, "AdaLN")
    model = load_model(tmp_path / "run", CPU)
    model.context = context
    tokens, own, action = make_inputs(observed)
    found = rollout(model, tokens, own, action)
    for row, (state, scaled) in enumerate(zip(*standardised(own, action), strict=True)):
        latents, features = imagine(predictor, encoder, tokens[row], state, scaled, context)
        torch.testing.assert_close(found.latents[row, 0], latents, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.proprio[row, 0], features[:, 0], atol=2e-5, rtol=1e-4)


def test_their_dino_wm_has_embeddings_of_two_sizes_and_a_position_more(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = DIM + 5 + 3
    predictor = ViTPredictor(TOKENS, width, jepa.DEPTH, HEADS, 8, 20, 0.1).eval()
    action, proprio = ProprioceptiveEmbedding(ACTIONS, 3), ProprioceptiveEmbedding(4, 5)
    state = predictor.state_dict()
    state["pos_embedding"] = torch.cat([predictor.pos_embedding, torch.randn(1, TOKENS, width)], 1)
    frame = torch.arange(4 * TOKENS) // TOKENS
    state |= {
        f"transformer.layers.{n}.0.bias": (frame[:, None] >= frame)[None, None].float() for n in range(jepa.DEPTH)
    }
    file = save(tmp_path / "d.pth.tar", state, action_encoder=action.state_dict(), proprio_encoder=proprio.state_dict())
    import_jepa_wm(file, write(tmp_path / "s.yaml", make_settings("dino_wm")), cache, tmp_path / "run")
    tokens, own, actions = make_inputs(1)
    found = rollout(load_model(tmp_path / "run", CPU), tokens, own, actions)
    scaled, moves = standardised(own, actions)
    frames = torch.cat([tokens, proprio(scaled)[:, :, None].expand(-1, -1, TOKENS, -1)], 3)
    for end in range(1, actions.shape[1] + 1):
        acted = action(moves[:, :end])[:, :, None].expand(-1, -1, TOKENS, -1)
        window = torch.cat([frames, acted], 3)[:, -HISTORY:]
        following = predictor(window.flatten(1, 2)).unflatten(1, window.shape[1:3])[:, -1:, :, : DIM + 5]
        frames = torch.cat([frames, following], 1)
    torch.testing.assert_close(found.latents[:, 0], frames[:, 1:, :, :DIM], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.proprio[:, 0], frames[:, 1:, 0, DIM:], atol=1e-5, rtol=0)


def test_the_run_is_one_of_wmtrain_and_goes_on(cache: Path, settings: Path, theirs: Path, tmp_path: Path) -> None:
    words = ["import-run", "jepa-wm", str(theirs), "--config", str(settings), "--cache", str(cache)]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    config = read_config(tmp_path / "run")
    assert config["imported"]["epoch"] == 50
    options = TrainOptions(**{name: config[name] for name in ("model", "model_options", "history", "frameskip")})
    figures = train(
        cache,
        tmp_path / "more",
        TrainOptions(**{**vars(options), "start": str(tmp_path / "run"), "steps": 2, "batch": 4}),
    )
    assert set(figures) == {f"skill_{k}" for k in range(1, 6)}


def test_settings_of_an_evaluation_are_read_too(cache: Path, theirs: Path, tmp_path: Path) -> None:
    own = make_settings()
    nested = {"model_kwargs": {"pretrain_kwargs": own.pop("model"), **own}, "planner": {"horizon": 6}}
    for name, written in (("a", make_settings()), ("b", nested)):
        import_jepa_wm(theirs, write(tmp_path / f"{name}.yaml", written), cache, tmp_path / name)
    models = [load_model(tmp_path / name, CPU).state_dict() for name in "ab"]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.datasets", ["Push-T"]),
        ("data.img_size", 56),
        ("data_aug.normalize", [[0.5] * 3] * 2),
        ("model.action_conditioning", "feature"),
        ("model.visual_encoder.enc_version", "dinov2_vitb14"),
        ("model.predictor.pred_type", "vjepa2_ac"),
        ("model.predictor.use_rope", False),
        ("model.predictor.pred_depth", 3),
        ("model.attn.local_window_time", -1),
        ("model.wm_encoding.normalize_reps", True),
    ],
)
def test_settings_that_change_the_numbers_are_refused(
    cache: Path, theirs: Path, tmp_path: Path, path: str, value: Any
) -> None:
    settings = make_settings()
    *parents, last = path.split(".")
    table = settings
    for name in parents:
        table = table[name]
    table[last] = value
    with pytest.raises(UserError) as caught:
        import_jepa_wm(theirs, write(tmp_path / "s.yaml", settings), cache, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["missing", "more", "nan", "class"])
def test_a_checkpoint_that_does_not_fit_is_refused(cache: Path, settings: Path, tmp_path: Path, change: str) -> None:
    predictor, encoder = make_predictor(ACTIONS)
    state: dict[str, Any] = dict(predictor.state_dict())
    if change == "missing":
        del state["predictor_blocks.1.attn.qkv.bias"]
    elif change == "more":
        state["predictor_pos_embed"] = torch.zeros(3)
    elif change == "nan":
        state["predictor_proj.bias"] = torch.full((DIM,), torch.nan)
    else:
        state["predictor_proj.bias"] = Path("anything")
    file = save(tmp_path / "jepa.pth.tar", state, proprio_encoder=embedding_of(encoder))
    with pytest.raises(UserError, match=str(file)) as caught:
        import_jepa_wm(file, settings, cache, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
