"""Models that imagine some patches of a frame, and learn to: the numbers of a model that has no others, copied from it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import DDP_SIZES, SHAPE, SIZES, VARIANTS, make_batch, make_futures, name_of, randomise, remember
from run_tools import make_go, stopped_at, weights_of
from torch import Tensor

from wmcache.trainer.models import MODELS, Imagined, KeepsPatches, build
from wmcache.trainer.models.masking import Masking, draw_patches
from wmcache.trainer.options import TrainOptions
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


class TestTrainingWithout:
    @pytest.mark.parametrize("masking", ["random", "block", "foreground"])
    def test_what_is_left_out(self, masking: Masking) -> None:
        torch.manual_seed(0)
        tokens, columns, counts = torch.randn(6, 4, 12, 5), 4, set()
        for _ in range(40):
            kept = draw_patches(masking, 0.5, tokens, columns)
            if kept is None:
                counts.add(12)
                continue
            counts.add(kept.shape[1])
            assert (kept.diff(dim=1) > 0).all()
            for window, rows in zip(tokens, kept.tolist(), strict=True):
                out = [patch for patch in range(12) if patch not in rows]
                changes = [
                    sum(float((window[t + 1, p] - window[t, p]).square().sum()) for t in range(3)) for p in range(12)
                ]
                distances = [
                    [max(abs(p // columns - c // columns), abs(p % columns - c % columns)) for p in range(12)]
                    for c in range(12)
                ]
                if masking == "foreground":
                    assert min(changes[p] for p in out) >= max(changes[p] for p in rows)
                if masking == "block":  # of some centre
                    assert any(max(near[p] for p in out) <= min(near[p] for p in rows) for near in distances)
        assert counts == set(range(6, 13))

    @pytest.mark.parametrize("options", [{}, {"rollout_loss": 0.5, "combine": "tokens"}], ids=name_of)
    def test_the_loss_is_that_of_models_that_have_no_others(self, options: dict[str, Any]) -> None:
        model = make("dino-wm", SIZES | {"token_masking": "random", "masked": 0.7, **options}).train()
        batch = make_batch(frames=4)
        torch.manual_seed(1)
        loss = model.loss(batch)["loss"]
        torch.manual_seed(1)
        kept = draw_patches("random", 0.7, batch["tokens"], SHAPE.columns)
        assert kept is not None
        expected = []
        for number, rows in enumerate(kept):
            own = {key: value[number : number + 1] for key, value in batch.items()}
            alone = make("dino-wm", asdict(model.options), model, rows)
            expected.append(alone.loss({**own, "tokens": own["tokens"][:, :, rows]})["loss"])
        torch.testing.assert_close(loss, torch.stack(expected).mean())
        assert torch.equal(model.eval().loss(batch)["loss"], make("dino-wm", SIZES | options).loss(batch)["loss"])

    def test_a_run_resumes_to_the_bit(self, store_path: Path, tiny: TrainOptions, tmp_path: Path) -> None:
        sizes = {"width": 16, "depth": 1, "heads": 2, "token_masking": "random"}
        go = make_go(store_path, replace(tiny, model_options=sizes))
        go(tmp_path / "straight")
        with stopped_at(6):
            go(tmp_path / "stopped")
        go(tmp_path / "stopped")
        assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
        go(tmp_path / "whole", model_options={"token_masking": "none"})
        assert weights_of(tmp_path / "whole") != weights_of(tmp_path / "straight")
