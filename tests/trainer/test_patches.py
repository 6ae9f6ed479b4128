"""Models that imagine some patches of a frame: the numbers of a model that has no others, copied from it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from model_tools import DDP_SIZES, SHAPE, SIZES, VARIANTS, make_batch, make_futures, name_of, randomise, remember
from torch import Tensor

from wmcache.trainer.models import MODELS, Imagined, KeepsPatches, build
from wmcache.trainer.presets import PRESETS

PATCHES = torch.tensor([[0, 1, 4, 5], [0, 1, 4, 5]])  # 2 x 2 of 2 x 4, so that a model of these alone has a grid
OTHERS = torch.tensor([[1, 2, 4, 7], [0, 3, 5, 6]])
SPATIAL: dict[str, Any] = {"position": "rope-3d", "head_dim": 12}
CASES: list[tuple[str, dict[str, Any], Tensor]] = [
    *(("dino-wm", SIZES | variant, OTHERS) for variant in VARIANTS),
    *(("ddp-wm", DDP_SIZES | {"proprio": proprio}, OTHERS) for proprio in ("raw", "embedding", "none")),
    ("dino-wm", SIZES | SPATIAL, PATCHES),
    ("vjepa2-ac", {"width": 32, "depth": 2, "heads": 2, "mlp": 12}, PATCHES),
    ("vjepa2-ac", {"width": 32, "depth": 2, "heads": 2, "mlp": 12, "normalize": "store", "predict": "change"}, PATCHES),
]


def make(name: str, options: dict[str, Any], model: Any = None, patches: Tensor | None = None) -> Any:
    """A model with random weights, or one of some patches [K] of a model, with its weights."""
    shape = SHAPE if patches is None else replace(SHAPE, tokens=len(patches), columns=2)
    statistics = {key: value for key, value in (model.named_buffers() if model else ()) if key != "stage"}
    if not statistics:
        sizes = {"tokens": SHAPE.token_dim, "proprio": SHAPE.proprio_dim, "action": SHAPE.action_dim}
        random = torch.Generator().manual_seed(1)
        statistics = {f"{key}_mean": torch.randn(size, generator=random) for key, size in sizes.items()}
        statistics |= {f"{key}_std": 0.5 + torch.rand(size, generator=random) for key, size in sizes.items()}
    torch.manual_seed(0)
    made: Any = build(name, shape, options, statistics)
    if model is None:
        randomise(made)
    else:
        assert patches is not None
        state = {}
        for key, value in model.state_dict().items():
            if key.endswith("position"):  # [..., tokens, width], with those of proprio and action after the patches
                rows = torch.cat([patches, torch.arange(SHAPE.tokens, value.shape[-2])])
                value = value[..., rows, :]
            state[key] = value
        made.load_state_dict(state)
    if made.stages:
        made.begin(made.stages[-1])
    return made.eval()


def imagine(model: Any, batch: dict[str, Tensor], observed: int, context: int, patches: Tensor | None) -> Imagined:
    model.context = model.observed = context
    belief = remember(model, batch, observed)
    found: Imagined = model.imagine(
        belief if patches is None else model.keep(belief, patches), make_futures(batch["action"], past=0)
    )
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: name_of(CASES[number][0]))
def test_they_are_those_of_a_model_that_has_no_others(number: int) -> None:
    name, options, patches = CASES[number]
    observed, context = [(2, 2), (1, 3), (1, 1)][number % 3]
    model, batch = make(name, options), make_batch(frames=5)
    found = imagine(model, batch, observed, context, patches)
    assert found.latents.shape == (2, 3, 5, 4, SHAPE.token_dim)
    assert found.patches is patches
    for episode, rows in enumerate(patches):
        share = {"foreground": -(-options["foreground"] * 4 // 8)} if "foreground" in options else {}
        alone = make(name, asdict(model.options) | share, model, rows)
        own = {key: value[episode : episode + 1] for key, value in batch.items()}
        own["tokens"] = own["tokens"][:, :, rows]
        expected = imagine(alone, own, observed, context, None)
        torch.testing.assert_close(found.latents[episode], expected.latents[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.proprio[episode], expected.proprio[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dino-wm", "ddp-wm"])
def test_all_patches_are_the_whole_frame(name: str) -> None:
    model, batch = make(name, SIZES if name == "dino-wm" else DDP_SIZES), make_batch(frames=5)
    everything = torch.arange(SHAPE.tokens).expand(2, -1)
    found, whole = (imagine(model, batch, 2, 2, patches) for patches in (everything, None))
    torch.testing.assert_close(found.latents, whole.latents, rtol=1e-5, atol=1e-5)


def test_models_of_whole_frames_do_not_claim_to() -> None:
    able = {name for name in MODELS if issubclass(MODELS.get(name), KeepsPatches)}
    assert able >= {"dino-wm", "ddp-wm", "vjepa2-ac"}
    assert not able & {"avdc", "mdn-rnn", "rssm", "iris", "rwm", "td-mpc2"}
    assert {preset["model"] for name, preset in PRESETS.items() if name in ("dino-wm", "jepa-wm")} <= able
