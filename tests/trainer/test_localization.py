"""What DDP-WM takes from the data, and how well it predicts what changes, for models whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wmcache.cache import TokenStore
from wmcache.cache.change_maps import open_change_maps
from wmcache.cache.windows import Windows
from wmcache.trainer.models import build, read_options
from wmcache.trainer.models.ddp_wm import DdpWm
from wmcache.trainer.models.ddp_wm.localization import foreground_size, localization
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import data_shape, statistics_of

CPU = torch.device("cpu")


def configured(store: TokenStore, **options: Any) -> int:
    """K for the windows of a store."""
    windows = store.windows(3, 1, 5, "train")
    return DdpWm.configure(store, windows, read_options("ddp-wm", options)).foreground


def figures_of(store: TokenStore, answers: Any, **chosen: Any) -> tuple[dict[str, float | None], Windows]:
    """Localization of a model that predicts `answers`, in all windows of one observed frame and five that follow."""
    options = TrainOptions(model="ddp-wm", model_options={"foreground": 1, "width": 12, **chosen})
    model = build("ddp-wm", data_shape(store, options), options.model_options, statistics_of(store, 5))
    assert isinstance(model, DdpWm)
    model.locate = answers  # type: ignore[method-assign]
    windows = store.windows(1, 5, 5, "all")
    windows = windows.with_extras(DdpWm.extras(store, windows, model.options))
    return localization(model, windows, CPU, torch.float32), windows


def no_change(tokens: Tensor, *_: Tensor) -> Tensor:
    return torch.full((len(tokens), tokens.shape[1] - 1, 4, 4), -1.0)


@pytest.mark.parametrize(
    ("tokens", "counts", "expected"),
    [
        (196, [5] * 100, 8),
        (196, [6] * 100, 16),
        # One step in a hundred may have more.
        (196, [3] * 1000 + [100] * 5, 8),
        (196, [3] * 1000 + [100] * 20, 98),
        (3, [3] * 100, 1),
        (196, [], 1),
    ],
)
def test_k_is_the_least_power_of_two_that_nearly_always_has_room_to_spare_and_at_most_half(
    tokens: int, counts: list[int], expected: int
) -> None:
    steps = np.random.default_rng(0).permutation(counts)
    assert foreground_size(np.arange(tokens) < steps[:, None]) == expected


@pytest.mark.parametrize(("labels", "thresholds"), [("pixels", (0.1, 0.2, 1.0)), ("features", (0.5, 1.5, 100.0))])
def test_k_comes_from_the_changes_in_the_steps_of_the_windows(
    ddp_store_path: Path, labels: str, thresholds: tuple[float, ...]
) -> None:
    store = TokenStore.open(ddp_store_path)
    windows = store.windows(3, 1, 5, "train")
    frames = windows.frames(np.arange(len(windows)))
    if labels == "pixels":
        changes = open_change_maps(store, 5).gather(frames[:, 1:].ravel()).max(-1)
    else:
        tokens = store.gather(frames.ravel()).reshape(*frames.shape, 4, 32) / store.std
        changes = np.sqrt(np.square(np.diff(tokens, axis=1)).mean(-1)).reshape(-1, 4)
    expected = [foreground_size(changes > threshold) for threshold in thresholds]
    assert [configured(store, labels=labels, threshold=threshold) for threshold in thresholds] == expected
    assert (expected[0], expected[-1]) == (2, 1)
    assert configured(store, labels=labels) == expected[0]  # the usual threshold
    assert configured(store, labels=labels, foreground=3) == 3


def test_a_constant_channel_hides_no_change(ddp_store_path: Path) -> None:
    store = TokenStore.open(ddp_store_path)
    expected = configured(store, labels="features")
    store.std[0], gather = 0, store.gather
    store.gather = lambda *args: gather(*args) * (np.arange(store.card.token_dim) > 0)  # type: ignore[method-assign]
    assert configured(store, labels="features") == expected


def test_a_constant_answer_is_right_as_often_as_those_patches_change(ddp_store_path: Path) -> None:
    store = TokenStore.open(ddp_store_path)

    def answers(tokens: Tensor, *_: Tensor) -> Tensor:
        logits = no_change(tokens)
        logits[:, :, 1, 2], logits[:, :, 2, 0] = 1.0, 2.0
        return logits

    figures, windows = figures_of(store, answers)
    frames = windows.frames(np.arange(len(windows)))[:, 1:]  # each has what changed since the frame before it
    changed = (open_change_maps(store, 5).gather(frames.ravel()) > 0.1).any(-1)
    changing = changed.sum()
    assert 0 < changed[:, 2].sum() < changed[:, [1, 2]].sum() < changing
    assert figures == pytest.approx(
        {
            "recall": changed[:, 2].sum() / changing,
            "precision": changed[:, 2].mean(),
            "recall_likely": changed[:, [1, 2]].sum() / changing,
            "precision_likely": changed[:, [1, 2]].mean(),
            "changed": changed.mean(),
        }
    )


def test_a_true_answer_finds_all_changes_but_those_that_k_leaves_out(store: TokenStore) -> None:
    threshold = 0.5

    def answers(tokens: Tensor, *_: Tensor) -> Tensor:
        change = tokens.float().diff(dim=1) / torch.from_numpy(store.std)
        return (change.square().mean(-1).sqrt() - threshold)[..., None].expand(-1, -1, -1, 4)

    figures, windows = figures_of(store, answers, labels="features", threshold=threshold)
    change = np.diff(windows.batch(np.arange(len(windows)))["tokens"].astype(np.float32) / store.std, axis=1)
    changed = np.sqrt((change**2).mean(-1)) > threshold
    assert (figures["recall_likely"], figures["precision_likely"]) == (1, 1)
    assert figures["changed"] == pytest.approx(changed.mean())
    # One patch is computed in each step, and it is a right one wherever there is one.
    assert figures["recall"] == pytest.approx(changed.any(-1).sum() / changed.sum())
    assert figures["precision"] == pytest.approx(changed.any(-1).mean())


def test_without_changes_all_figures_are_zero(store: TokenStore) -> None:
    assert set(figures_of(store, no_change, labels="features", threshold=1e3)[0].values()) == {0.0}
