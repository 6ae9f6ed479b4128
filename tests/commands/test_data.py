"""wmcache collect, fit, extract and derive on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from wmcache.cache import TokenStore
from wmcache.cache.change_maps import open_change_maps
from wmcache.cluster import tasks as cluster
from wmcache.pipeline import encoders
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.frames import FrameDataset

from ..conftest import shards_of
from .conftest import ADAPTER, run, succeed

ALREADY = "already complete"


@pytest.fixture
def stores(home: Path) -> Path:
    """Where extract puts the stores."""
    return home / "stores/pointmaze-umaze"


def test_a_finished_extraction_is_reported_and_one_that_lost_a_shard_is_not(stores: Path) -> None:
    line, store = "wmcache extract --device cpu --change-maps", stores / "tcn-64.zarr"
    assert [succeed(line).output.count(ALREADY) for _ in range(2)] == [0, 2]
    assert ALREADY in succeed("wmcache derive change-maps {store}", store=store).output
    (store / "tokens/c.1.0.0").unlink()
    assert succeed(line).output.count(ALREADY) == 1


def test_the_landscape_is_not_measured_without_the_frames(home: Path, stores: Path) -> None:
    succeed("wmcache extract --encoder tcn-layers --device cpu")
    (home / "pointmaze-umaze").rename(home / "moved")
    result = succeed(f"{ADAPTER} --cache {{layers}} --out a.safetensors", layers=stores / "tcn-layers-64.zarr")
    assert "--dataset" in result.output
    assert str(home / "pointmaze-umaze") in result.output


def test_the_bar_moves_with_every_batch_of_a_shard(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "seconds_between_updates", lambda: 0.0)
    frames = FrameDataset.open(home / "pointmaze-umaze")
    extract_together(frames, [(encoders.create("pixels", device="cpu"), home / "pixels.zarr")], batch=16)
    counts = [int(count) for count in re.findall(r"(\d+)/360", capfd.readouterr().err)]
    assert {16, 32, 48} <= set(counts)  # a shard has 64 frames
    assert counts == sorted(counts)
    assert counts[-1] == 360


def test_an_adapter_is_fitted_on_layers_that_are_extracted_first_and_its_store_derived(
    home: Path, stores: Path
) -> None:
    layers, derive = stores / "tcn-layers-64.zarr", "wmcache derive {layers} --encoder dino-tok --device cpu"
    for line in (
        f"{ADAPTER} --base tcn-layers",
        derive,
        "wmcache extract --encoder dino-tok --device cpu --out extracted.zarr",
    ):
        assert ALREADY not in succeed(line, layers=layers).output
    # From the store alone, which records the location of its frames: the landscape is measured.
    again = succeed(f"{ADAPTER} --cache {{layers}}", layers=layers)
    assert ALREADY in again.output
    assert "Spearman" in again.output
    assert ALREADY in succeed(derive, layers=layers).output
    derived = TokenStore.open(stores / "dino-tok-64.zarr")
    assert derived.identity == TokenStore.open(Path("extracted.zarr")).identity
    assert derived.card.token_dim == 36
    # The base's weights have moved with the adapter's.
    weights = (home / "encoders").rename(home / "elsewhere") / "pointmaze-umaze-dino-tok.safetensors"
    verify = "wmcache verify {store} --deep --weights {weights} --device cpu"
    succeed(verify, store=derived.path, weights=weights)


def test_change_maps_come_with_the_tokens_or_later_and_are_the_same(stores: Path) -> None:
    result = succeed("wmcache extract --encoder tcn,pixels --change-maps --device cpu")
    names = ["pixels-32.changes-5.zarr", "pixels-32.zarr", "tcn-64.changes-5.zarr", "tcn-64.zarr"]
    assert sorted(path.name for path in stores.glob("*.zarr")) == names
    maps = stores / "pixels-32.changes-5.zarr"
    assert f"{maps}: 360 frames, 4 x 4 tokens of 4" in result.stdout
    source, extracted = TokenStore.open(stores / "pixels-32.zarr"), shards_of(maps)
    identity = open_change_maps(source, 5).identity
    succeed("wmcache rm {maps} --yes", maps=maps)
    result = succeed("wmcache derive change-maps {store}", store=source.path)
    assert result.stdout == f"{maps}: 360 frames, 8 x 8 cells, since 5 env steps before\n"
    assert (open_change_maps(source, 5).identity, shards_of(maps)) == (identity, extracted)


def test_change_maps_are_made_where_they_are_missing_and_nowhere_else(stores: Path) -> None:
    succeed("wmcache extract --encoder tcn --device cpu")
    succeed("wmcache extract --encoder tcn --change-maps 3 --shard-slice 0/2 --device cpu")
    before = {file: file.stat().st_mtime_ns for file in stores.rglob("c.*")}
    assert len(before) == 6 + 3
    succeed("wmcache derive change-maps {store} --frameskip 3", store=stores / "tcn-64.zarr")
    assert open_change_maps(TokenStore.open(stores / "tcn-64.zarr"), 3).complete
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_change_maps_are_verified_and_repaired_as_every_store(stores: Path) -> None:
    succeed("wmcache extract --encoder tcn --change-maps --device cpu")
    maps, deep = stores / "tcn-64.changes-5.zarr", "wmcache verify {maps} --deep --device cpu"
    counts, drift = succeed(deep, maps=maps).stdout.splitlines()
    assert counts.startswith(f"{maps}: 6 of 6 shards")
    assert drift == "cosine 1.000000, relative_error 0.000000"
    (maps / "tokens/c.3.0.0").write_bytes(b"nonsense")
    assert run("wmcache verify {maps}", maps=maps).exit_code == 1
    succeed("wmcache repair {maps} --device cpu", maps=maps)
    succeed(deep, maps=maps)


@pytest.mark.parametrize("words", ["derive {store} --encoder tcn", "derive tokens --encoder tcn {store}"])
def test_the_first_word_of_derive_may_be_left_out(home: Path, store_path: Path, words: str) -> None:
    out = home / "again.zarr"
    result = succeed(f"wmcache {words} --device cpu --out {{out}}", store=store_path, out=out)
    assert f"{out}: 360 frames, 2 x 2 tokens of 32, derived from {store_path}" in result.stdout
    assert TokenStore.open(out).identity == TokenStore.open(store_path).identity


@pytest.mark.parametrize("encoder", ["tcn", "vae", "pca", "dino-tok-vq"])
def test_help_of_a_fit_has_the_options_of_the_encoder(encoder: str) -> None:
    text = run(f"wmcache fit --encoder {encoder} --help").stdout
    own = {"tcn": "--max-lag", "vae": "--free-bits", "pca": "--dim", "dino-tok-vq": "--variance"}
    assert {name for name, flag in own.items() if flag in text} == {encoder}


def test_all_encoders_are_listed() -> None:
    rows = {row["name"]: row for row in json.loads(run("wmcache encoders --json").stdout)}
    named = {"dinov2", "dinov2-cls", "dinov3", "vjepa2", "siglip2", "resnet18", "r3m", "dino-tok", "vfm-vae"}
    assert named <= set(rows)
    assert (rows["tcn"]["fitted"], rows["dinov2"]["fitted"]) == (True, False)
    for line in run("wmcache encoders").stdout.splitlines()[1:]:
        assert line.split()[0] in rows
