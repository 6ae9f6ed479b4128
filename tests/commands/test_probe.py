"""`wmcache probe`: a row for each store that fits a terminal, all figures as JSON, and a picture if there is a maze."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from wmcache.cache import TokenStore
from wmcache.commands.probe import LEGEND

from ..conftest import columns_of, write_tokens
from .conftest import error_of, run, succeed

PROBE = "wmcache probe {maze} {bare} --frames 100"
Stores = dict[str, Path]


@pytest.fixture(scope="module")
def stores(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """A store of a maze, and one of the same tokens without a maze."""
    folder = tmp_path_factory.mktemp("probed") / "pointmaze-umaze"
    copy, bare = Path(shutil.copytree(store_path, folder / "tcn-64.zarr")), folder / "bare.zarr"
    like = TokenStore.open(copy)
    card = dataclasses.replace(like.card, dataset={"name": "other"})
    write_tokens(bare, like.gather(np.arange(len(like))), card, like.identity, columns_of(like))
    return {"maze": copy, "bare": bare}


@pytest.fixture(scope="module")
def lines(stores: Stores) -> list[str]:
    """What is printed about both stores."""
    result = succeed(PROBE, **stores)
    drawn, missing = result.stderr.splitlines()[-2:]
    assert drawn.startswith(f"{stores['maze']}: ")
    assert drawn.endswith(str(stores["maze"].with_suffix(".probe.png")))
    assert missing.startswith(f"{stores['bare']}: ")
    return result.stdout.splitlines()


def test_a_row_for_each_store_fits_a_terminal(stores: Stores, lines: list[str]) -> None:
    head, first, second = lines[:3]
    assert max(map(len, (head, first, second))) <= 120
    assert first.endswith("  pointmaze-umaze/tcn-64.zarr")
    assert len(first.split()) == 12
    assert "-" not in first.split()[:-1]
    assert second.split()[:8] == ["-"] * 8
    assert stores["maze"].with_suffix(".probe.png").read_bytes().startswith(b"\x89PNG")
    assert not stores["bare"].with_suffix(".probe.png").exists()


def test_every_header_is_explained_in_the_output_and_in_the_docs(lines: list[str]) -> None:
    docs = (Path(__file__).parents[2] / "docs/encoders.md").read_text()
    assert lines[0].split() == [*" ".join(LEGEND).split(), "store"]
    for name, meaning in LEGEND.items():
        assert f"{name:8}  {meaning}" in lines
        assert f"| `{name}` | {meaning} |" in docs


def test_json_has_all_figures_and_the_table_every_other_state_column(
    stores: Stores, lines: list[str], tmp_path: Path
) -> None:
    found, bare = json.loads(succeed(f"{PROBE} --json --out {{out}}", **stores, out=tmp_path / "pictures").stdout)
    assert (found["encoder"], found["dataset"]) == ("tcn", "pointmaze-umaze")
    assert (found["frames"], found["held_out"]) == (100, 60)
    assert list(found["linear"]) == ["x", "y", "vx", "vy"] == list(found["mlp"])
    assert found["picture"] == str(tmp_path / "pictures/pointmaze-umaze-tcn-64.probe.png")
    assert [str(file) for file in (tmp_path / "pictures").iterdir()] == [found["picture"]]
    assert (bare["spearman"], bare["nearest"], bare["picture"]) == (None, None, None)
    assert bare["effective_rank"] == pytest.approx(found["effective_rank"])
    start = lines.index(f"R^2 of each state column: {stores['bare']}") + 2
    columns = [f"state_{number}" for number in range(4)]
    figures = [[f"{bare[kind][name]:.3f}" for kind in ("linear", "mlp")] for name in columns]
    assert [line.split() for line in lines[start : start + 4]] == [
        [name, *row] for name, row in zip(columns, figures, strict=True)
    ]
    assert not any(str(stores["maze"]) in line for line in lines)


@pytest.mark.parametrize("words", ["none.zarr", "{maze} --frames 5", "{maze} {maze}"])
def test_bad_arguments_are_one_line_before_any_output(stores: Stores, words: str) -> None:
    error_of(run(f"wmcache probe {words}", **stores))


def test_stores_of_one_token_have_a_mutual_information_gap(
    store_path: Path, stores: Stores, lines: list[str], tmp_path: Path
) -> None:
    like = TokenStore.open(store_path)
    rng, frames = np.random.default_rng(0), 2000
    state = rng.uniform(-1, 1, (frames, 2))
    columns = {
        "action": np.zeros((frames, 2), np.float32),
        "state": state,
        "episode": np.repeat(np.arange(40, dtype=np.int32), 50),
        "step": np.tile(np.arange(50, dtype=np.int32), 40),
    }
    card = dataclasses.replace(like.card, dataset={"name": "other"}, token_grid=(1, 1), frames_per_shard=500)
    mixed = state @ np.array([[1, 1], [-1, 1]])
    for name, latents in (("state", state), ("mixed", mixed)):
        write_tokens(tmp_path / f"{name}.zarr", latents[:, None], card, like.identity, columns)
    line = "wmcache probe {tmp}/state.zarr {tmp}/mixed.zarr {maze} --frames 100"
    own, rotated, none = json.loads(succeed(f"{line} --json", tmp=tmp_path, **stores).stdout)
    assert list(own["gaps"]) == ["state_0", "state_1"] == list(own["linear"])
    assert own["mig"] == pytest.approx(sum(own["gaps"].values()) / 2)
    assert own["mig"] > 0.9
    assert 0 <= rotated["mig"] < 0.1
    assert min(rotated["linear"].values()) > 0.99
    assert (none["gaps"], none["mig"]) == ({}, None)
    printed = succeed(line, tmp=tmp_path, **stores).stdout.splitlines()
    start = printed.index(f"R^2 and MIG of each state column: {tmp_path / 'state.zarr'}")
    titles, *rows = (text.split() for text in printed[start + 1 : start + 5])
    assert titles == ["column", "lin", "MLP", "MIG"]
    assert [row[0] for row in rows] == ["state_0", "state_1", "mean"]
    assert [row[3] for row in rows] == [f"{value:.3f}" for value in (*own["gaps"].values(), own["mig"])]
    assert printed[-1].startswith("no MIG    pointmaze-umaze/tcn-64.zarr: ")
    assert lines[-1].startswith("no MIG    pointmaze-umaze/tcn-64.zarr, pointmaze-umaze/bare.zarr: ")
