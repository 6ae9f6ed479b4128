"""`wmcache probe`: a row for each store that fits a terminal, all figures as JSON, and a picture if there is a maze."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from wmcache.cache import StoreWriter, TokenStore
from wmcache.cli import main
from wmcache.commands.probe import LEGEND, row


@pytest.fixture(scope="module")
def stores(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of a maze, and one of the same tokens without a maze."""
    folder = tmp_path_factory.mktemp("probed") / "pointmaze-umaze"
    copy, bare = Path(shutil.copytree(store_path, folder / "tcn-64.zarr")), folder / "bare.zarr"
    like = TokenStore.open(copy)
    card = dataclasses.replace(like.card, dataset={"name": "other"})
    columns = {name: getattr(like, name) for name in ("action", "state", "episode", "step")}
    writer = StoreWriter.create(bare, card, like.identity, columns)
    for shard in writer.pending():
        writer.write_shard(shard, like.gather(np.array(card.shard_frames(shard))))
    writer.finish()
    return copy, bare


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["probe", *map(str, words)])


def test_a_row_for_each_store_fits_a_terminal(stores: tuple[Path, Path]) -> None:
    result = run(*stores, "--frames", 100)
    assert result.exit_code == 0, result.output
    head, first, second = result.stdout.splitlines()[:3]
    assert max(map(len, (head, first, second))) <= 120
    assert first.endswith("  pointmaze-umaze/tcn-64.zarr")
    assert len(first.split()) == 12
    assert "-" not in first.split()[:-1]
    assert second.split()[:8] == ["-"] * 8
    assert stores[0].with_suffix(".probe.png").read_bytes().startswith(b"\x89PNG")
    assert not stores[1].with_suffix(".probe.png").exists()
    drawn, missing = result.stderr.splitlines()[-2:]
    assert drawn.startswith(f"{stores[0]}: ")
    assert drawn.endswith(str(stores[0].with_suffix(".probe.png")))
    assert missing.startswith(f"{stores[1]}: ")


def test_every_other_state_column_has_a_figure(stores: tuple[Path, Path]) -> None:
    result = run(*stores, "--frames", 100)
    found = {store["store"]: store for store in json.loads(run(*stores, "--frames", 100, "--json").stdout)}
    assert str(stores[0]) not in result.stdout
    start = result.stdout.splitlines().index(f"R^2 of each state column: {stores[1]}") + 2
    table = [line.split() for line in result.stdout.splitlines()[start : start + 4]]
    for number, (name, *figures) in enumerate(table):
        assert name == f"state_{number}"
        assert figures == [f"{found[str(stores[1])][kind][name]:.3f}" for kind in ("linear", "mlp")]


def test_every_header_is_explained_in_the_output_and_in_the_docs(stores: tuple[Path, Path]) -> None:
    lines = run(stores[0], "--frames", 100).stdout.splitlines()
    docs = (Path(__file__).parents[2] / "docs/encoders.md").read_text()
    assert lines[0].split() == [*" ".join(LEGEND).split(), "store"]
    for name, meaning in LEGEND.items():
        assert f"{name:8}  {meaning}" in lines
        assert f"| `{name}` | {meaning} |" in docs


@pytest.mark.parametrize("value", ["-12345.678", "12345.678"])
def test_columns_never_run_together(value: str) -> None:
    assert row([value] * len(LEGEND), "a/b.zarr").split() == [value] * len(LEGEND) + ["a/b.zarr"]


def test_json_has_all_figures(stores: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*stores, "--frames", 100, "--out", tmp_path / "pictures", "--json")
    assert result.exit_code == 0, result.output
    found, bare = json.loads(result.stdout)
    assert (found["encoder"], found["dataset"], found["frames"], found["held_out"]) == (
        "tcn",
        "pointmaze-umaze",
        100,
        60,
    )
    assert list(found["linear"]) == ["x", "y", "vx", "vy"] == list(found["mlp"])
    assert found["picture"] == str(tmp_path / "pictures/pointmaze-umaze-tcn-64.probe.png")
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["pointmaze-umaze-tcn-64.probe.png"]
    assert (bare["spearman"], bare["nearest"], bare["picture"]) == (None, None, None)
    assert bare["effective_rank"] == pytest.approx(found["effective_rank"])


def test_bad_arguments_are_one_line_before_any_output(stores: tuple[Path, Path], tmp_path: Path) -> None:
    for words in ([tmp_path / "none.zarr"], [stores[0], "--frames", 5], [stores[0], stores[0]]):
        result = run(*words)
        assert result.exit_code == 1
        assert result.stdout == ""
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1
        assert "Traceback" not in result.output
    assert run().exit_code == 2
