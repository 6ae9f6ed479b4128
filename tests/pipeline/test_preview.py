from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from wmcache.cache import TokenStore
from wmcache.pipeline.collect import collect
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.pictures import preview, principal_colours

from ..conftest import write_tokens

Tokens = NDArray[np.float16]
Make = Callable[..., Path]


@pytest.fixture
def make(store: TokenStore, dataset: FrameDataset, tmp_path: Path) -> Make:
    """(tokens [360, N, D], grid, dtype=…) -> a store of these tokens of the dataset's frames."""

    def write(tokens: Tokens, grid: tuple[int, int], dtype: str = "float16") -> Path:
        card = dataclasses.replace(store.card, token_grid=grid, dtype=dtype)
        return write_tokens(tmp_path / "made-up.zarr", tokens, card, store.identity, dataset.steps.store_columns())

    return write


def read_picture(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("count", [1, 8])
def test_the_picture_is_as_wide_as_its_frames(store_path: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "new folder" / "picture.png"
    chosen = preview(store_path, out, count=count)
    assert chosen.tolist() == np.linspace(0, 359, count).astype(int).tolist()
    pixels = read_picture(out)
    height, width, _ = pixels.shape
    assert 300 < height < 1000
    assert 100 * count < width < max(900, 400 * count)
    assert [file.name for file in out.parent.iterdir()] == ["picture.png"]
    for half in np.array_split(pixels, 2):  # frames above, tokens below
        assert len(np.unique(half.reshape(-1, 3), axis=0)) > 10
    title = pixels[:18]
    assert (title < 255).any()
    assert (title[:, [0, 1, -2, -1]] == 255).all()  # not cut off


def test_the_frames_are_those_of_the_dataset(
    store_path: Path, dataset: FrameDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw)))
    chosen = preview(store_path, tmp_path / "picture.png", count=3)
    assert chosen.tolist() == [0, 179, 359]
    drawn = [axes.images[0].get_array() for axes in figures[0].axes]
    np.testing.assert_array_equal(drawn[:3], dataset.read_frames(chosen))
    np.testing.assert_array_equal(drawn[3:], principal_colours(TokenStore.open(store_path), chosen))
    titles = [axes.get_title() for axes in figures[0].axes[:3]]
    assert titles == ["episode 0\nstep 0", "episode 2\nstep 59", "episode 5\nstep 59"]


def test_a_short_store_is_drawn_whole(store: TokenStore, tmp_path: Path) -> None:
    short, out = tmp_path / "short", tmp_path / "picture.png"
    collect("UMaze", short, episodes=1, length=3, image_size=32, frames_per_shard=4, cluster="local:1")
    frames = FrameDataset.open(short)
    card = dataclasses.replace(store.card, frames_per_shard=4, dataset={"path": str(short)})
    identity = dataclasses.replace(store.identity, dataset_fingerprint=frames.card.fingerprint)
    path = write_tokens(
        tmp_path / "short.zarr", store.gather(np.arange(3)), card, identity, frames.steps.store_columns()
    )
    assert preview(path, out, count=8).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("grid", "dim"), [((1, 1), 1), ((1, 1), 32), ((2, 2), 2), ((1, 5), 8), ((4, 3), 5)])
def test_any_grid_and_any_number_of_channels(
    make: Make, tmp_path: Path, grid: tuple[int, int], dim: int, dtype: str
) -> None:
    tokens = np.random.default_rng(0).normal(3, 2, (360, grid[0] * grid[1], dim)).astype(np.float16)
    path = make(tokens, grid, dtype)
    colours = principal_colours(TokenStore.open(path), np.array([0, 63, 64, 359]))
    assert (colours.shape, colours.dtype) == ((4, *grid, 3), np.float32)
    assert 0 <= colours.min() <= colours.max() <= 1
    # As many colours as components.
    assert [bool(colours[..., channel].std() > 0) for channel in range(3)] == [channel < dim for channel in range(3)]
    preview(path, tmp_path / "picture.png", count=2)
    assert read_picture(tmp_path / "picture.png").size > 0


@pytest.mark.parametrize("factor", [1e4, 1e-4, 0])
def test_huge_tiny_and_constant_tokens_have_colours(make: Make, tmp_path: Path, factor: float) -> None:
    tokens = (np.random.default_rng(0).uniform(-1, 1, (360, 4, 6)) * factor).astype(np.float16)
    path = make(tokens + np.float16(0 if factor else 7), (2, 2))
    colours = principal_colours(TokenStore.open(path), np.arange(20))
    assert 0 <= colours.min() <= colours.max() <= 1
    assert (colours.std(axis=(0, 1, 2)) > 0.1).all() if factor else not colours.std(axis=(0, 1, 2)).any()
    preview(path, tmp_path / "picture.png", count=2)


def test_colours_are_the_components_in_the_order_of_their_size(make: Make) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(360, 4, 3)) * [10, 3, 1]
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0][:3]
    path = make((hidden @ axes + 5).astype(np.float16), (2, 2))
    colours = principal_colours(TokenStore.open(path), np.arange(360)).reshape(-1, 3)
    truth = hidden.reshape(-1, 3)
    for component in range(3):
        assert abs(np.corrcoef(colours[:, component], truth[:, component])[0, 1]) > 0.95


def test_a_colour_means_the_same_in_every_picture(store: TokenStore) -> None:
    together = principal_colours(store, np.array([0, 100, 359]))
    for row, frame in enumerate((0, 100, 359)):
        np.testing.assert_array_equal(principal_colours(store, np.array([frame]))[0], together[row])


@pytest.mark.parametrize("name", ["a$^$.zarr", "50 $ and 60 $.zarr", "tcn_64^2\\alpha.zarr"])
def test_names_are_drawn_literally(store_path: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(store_path, tmp_path / name))
    preview(path, tmp_path / "picture.png", count=2)
    assert read_picture(tmp_path / "picture.png").size > 0
