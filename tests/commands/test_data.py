"""wmcache collect, fit, extract and derive on the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from wmcache.bench import extract as bench
from wmcache.cache import TokenStore
from wmcache.cache.change_maps import open_change_maps
from wmcache.cli import main
from wmcache.cluster import tasks as cluster
from wmcache.pipeline import encoders
from wmcache.pipeline.collect import collect
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.frames import FrameDataset


@pytest.fixture
def home(tmp_path: Path, dataset_path: Path, tcn_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the frames and tcn's weights where the commands look for them."""
    monkeypatch.setenv("WMCACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(dataset_path, tmp_path / "home/pointmaze-umaze")
    (tmp_path / "home/encoders").mkdir()
    shutil.copy(tcn_weights, tmp_path / "home/encoders/pointmaze-umaze-tcn.safetensors")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def other_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("others") / "pointmaze-umaze"
    collect("UMaze", path, episodes=2, length=12, image_size=32, frames_per_shard=24, cluster="local:1")
    return path


def run(line: str, **places: Path) -> Result:
    return CliRunner().invoke(main, [word.format(**places) for word in line.split()])


def test_several_encoders_are_extracted_in_one_pass(home: Path) -> None:
    result = run("extract --encoder tcn,pixels,tcn-layers --device cpu")
    assert result.exit_code == 0, result.output
    stores = home / "stores/pointmaze-umaze"
    assert sorted(path.name for path in stores.glob("*.zarr")) == [
        "pixels-32.zarr",
        "tcn-64.zarr",
        "tcn-layers-64.zarr",
    ]
    assert all(TokenStore.open(path).complete for path in stores.glob("*.zarr"))
    assert f"{stores / 'pixels-32.zarr'}: 360 frames, 4 x 4 tokens of 192" in result.output


def test_a_finished_extraction_is_reported_and_one_that_lost_a_shard_is_not(home: Path) -> None:
    assert "already complete" not in run("extract --device cpu --change-maps").output
    store = home / "stores/pointmaze-umaze/tcn-64.zarr"
    again = run("extract --device cpu --change-maps").output
    assert again.count("already complete") == 2
    assert "already complete" in run("derive change-maps {store}", store=store).output
    (store / "tokens/c.1.0.0").unlink()
    again = run("extract --device cpu --change-maps").output
    assert again.count("already complete") == 1


def test_the_landscape_is_not_measured_without_the_frames(home: Path, tmp_path: Path) -> None:
    assert run("extract --encoder tcn-layers --device cpu").exit_code == 0
    (home / "pointmaze-umaze").rename(home / "moved")
    line = "fit --encoder dino-tok --cache {layers} --steps 1 --batch-size 8 --shallow 4 --device cpu --out {out}"
    result = run(line, layers=home / "stores/pointmaze-umaze/tcn-layers-64.zarr", out=tmp_path / "a.safetensors")
    assert result.exit_code == 0, result.output
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


def test_an_adapter_is_fitted_on_layers_that_are_extracted_first_and_its_store_derived(home: Path) -> None:
    fitted = run("fit --encoder dino-tok --base tcn-layers --steps 2 --batch-size 8 --shallow 4 --device cpu")
    assert fitted.exit_code == 0, fitted.output
    layers = home / "stores/pointmaze-umaze/tcn-layers-64.zarr"
    derived = run("derive {layers} --encoder dino-tok --device cpu", layers=layers)
    assert derived.exit_code == 0, derived.output
    extracted = run("extract --encoder dino-tok --device cpu --out {out}", out=home / "extracted.zarr")
    assert extracted.exit_code == 0, extracted.output
    assert "already complete" not in fitted.output + derived.output + extracted.output
    # From the store alone, which records the location of its frames: the landscape is measured.
    again = run(
        "fit --encoder dino-tok --cache {layers} --steps 2 --batch-size 8 --shallow 4 --device cpu", layers=layers
    )
    assert again.exit_code == 0, again.output
    assert "already complete" in again.output
    assert "Spearman" in again.output
    again = run("derive {layers} --encoder dino-tok --device cpu", layers=layers)
    assert "already complete" in again.output
    by_derivation = TokenStore.open(home / "stores/pointmaze-umaze/dino-tok-64.zarr")
    assert by_derivation.identity == TokenStore.open(home / "extracted.zarr").identity
    assert by_derivation.card.token_dim == 36
    # The base's weights have moved with the adapter's.
    moved = (home / "encoders").rename(home / "elsewhere")
    found = run(
        "verify {store} --deep --weights {weights} --device cpu",
        store=by_derivation.path,
        weights=moved / "pointmaze-umaze-dino-tok.safetensors",
    )
    assert found.exit_code == 0, found.output


def test_change_maps_come_with_the_tokens_or_later_and_are_the_same(home: Path) -> None:
    stores = home / "stores/pointmaze-umaze"
    result = run("extract --encoder tcn,pixels --change-maps --device cpu")
    assert result.exit_code == 0, result.output
    names = ["pixels-32.changes-5.zarr", "pixels-32.zarr", "tcn-64.changes-5.zarr", "tcn-64.zarr"]
    assert sorted(path.name for path in stores.glob("*.zarr")) == names
    assert f"{stores / 'pixels-32.changes-5.zarr'}: 360 frames, 4 x 4 tokens of 4" in result.stdout
    together = open_change_maps(TokenStore.open(stores / "pixels-32.zarr"), 5)
    extracted = {file.name: file.read_bytes() for file in together.path.glob("tokens/c.*")}
    assert run("rm {store} --yes", store=together.path).exit_code == 0
    result = run("derive change-maps {store}", store=stores / "pixels-32.zarr")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{together.path}: 360 frames, 8 x 8 cells, since 5 env steps before\n"
    later = open_change_maps(TokenStore.open(stores / "pixels-32.zarr"), 5)
    assert later.identity == together.identity
    assert {file.name: file.read_bytes() for file in later.path.glob("tokens/c.*")} == extracted


def test_change_maps_are_made_where_they_are_missing_and_nowhere_else(home: Path) -> None:
    stores = home / "stores/pointmaze-umaze"
    assert run("extract --encoder tcn --device cpu").exit_code == 0
    assert run("extract --encoder tcn --change-maps 3 --shard-slice 0/2 --device cpu").exit_code == 0
    files = [*(stores / "tcn-64.zarr").rglob("c.*"), *(stores / "tcn-64.changes-3.zarr").rglob("c.*")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(before) == 6 + 3
    result = run("derive change-maps {store} --frameskip 3", store=stores / "tcn-64.zarr")
    assert result.exit_code == 0, result.output
    assert open_change_maps(TokenStore.open(stores / "tcn-64.zarr"), 3).complete
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_change_maps_are_verified_and_repaired_as_every_store(home: Path) -> None:
    assert run("extract --encoder tcn --change-maps --device cpu").exit_code == 0
    maps = home / "stores/pointmaze-umaze/tcn-64.changes-5.zarr"
    result = run("verify {maps} --deep --device cpu", maps=maps)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{maps}: 6 of 6 shards as they were written, 360 frames",
        "cosine 1.000000, relative_error 0.000000",
    ]
    (maps / "tokens/c.3.0.0").write_bytes(b"nonsense")
    assert run("verify {maps}", maps=maps).exit_code == 1
    assert run("repair {maps} --device cpu", maps=maps).exit_code == 0
    assert run("verify {maps} --deep --device cpu", maps=maps).exit_code == 0


@pytest.mark.parametrize("words", ["derive", "derive tokens"])
def test_the_first_word_of_derive_may_be_left_out(home: Path, store_path: Path, words: str) -> None:
    for line in ("{store} --encoder tcn", "--encoder tcn {store}"):
        out = home / "again.zarr"
        result = run(f"{words} {line} --device cpu --out {{out}}", store=store_path, out=out)
        assert result.exit_code == 0, result.output
        assert f"{out}: 360 frames, 2 x 2 tokens of 32, derived from {store_path}" in result.stdout
        assert TokenStore.open(out).identity == TokenStore.open(store_path).identity
        shutil.rmtree(out)


def test_help_of_derive_names_both(home: Path) -> None:
    for line, words in (
        ("derive --help", ("change-maps", "tokens", "wmcache derive STORE")),
        ("derive some.zarr --help", ("--encoder", "--base-weights")),
        ("derive change-maps --help", ("--frameskip", "--dataset")),
    ):
        result = run(line)
        assert result.exit_code == 0
        assert all(word in result.stdout for word in words), result.stdout


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("extract --encoder pixels,pixels", "--encoder pixels,pixels"),
        ("extract --encoder pixels,dinov9", "dinov9"),
        ("extract --encoder tcn,vae --weights {weights}", "--weights NAME="),
        ("extract --encoder tcn --weights tnc={weights}", "tnc="),
        ("extract --encoder tcn,pixels --weights tcn={weights} --weights tcn={weights}", "--weights tcn="),
        ("extract --encoder pixels,tcn --base-weights {weights}", "--base-weights"),
        ("extract --encoder pixels --lag 5", "--lag"),
        ("extract --encoder vae", "wmcache fit --encoder vae"),
        ("extract --encoder dino-tok", "wmcache fit --encoder dino-tok"),
        ("extract --encoder dinov2 --image-size 200 --weights {weights}", "14"),
        ("extract --encoder dinov2 --weights {weights}", "vit_small_patch14_dinov2"),
        ("fit --encoder tcn --codes 5", "--codes"),
        ("fit --encoder tnc", "tcn"),
        ("fit --encoder tcn --cache {store}", "--cache and --base"),
        ("fit --encoder pca --cache {store} --base tcn", "--base"),
        ("fit --encoder dino-tok --cache {store}", "dinov2-layers"),
        ("fit --encoder dino-tok --cache {store} --decoder pixels --dataset {store}", "{store}"),
        ("fit --encoder pixels", "pixels"),
        ("derive {store} --encoder dinov2-cls", "dinov2-cls"),
        ("derive {store} --encoder tcn-layers", "tcn-layers"),
        ("derive {store} --encoder dino-tok", "wmcache fit --encoder dino-tok"),
        ("derive {store} --encoder tcn --base-weights {weights}", "--base-weights"),
        ("derive nowhere.zarr --encoder tcn", "nowhere.zarr"),
        ("derive change-maps nowhere.zarr", "nowhere.zarr"),
        ("derive change-maps {store} --dataset nowhere", "--dataset"),
        ("derive change-maps {store} --dataset {others}", "{others}"),
        ("extract --encoder random-vit-layers --change-maps", "1 x 17"),
        ("extract --encoder tcn,random-vit-layers --change-maps 1", "1 x 17"),
        ("collect --env Umaz --out {others}-new", "--env"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    home: Path, store_path: Path, tcn_weights: Path, other_frames: Path, line: str, named: str
) -> None:
    before = sorted(home.rglob("*"))
    paths = {"weights": tcn_weights, "store": store_path, "others": other_frames}
    result = run(line, **paths)
    assert result.exit_code == 1, result.output
    (error,) = [words for words in result.stderr.splitlines() if words.startswith("Error: ")]
    assert named.format(**paths) in error
    assert sorted(path for path in home.rglob("*") if path.name != ".lock") == before


@pytest.mark.parametrize("encoder", ["tcn", "vae", "pca", "dino-tok-vq"])
def test_help_of_a_fit_has_the_options_of_the_encoder(encoder: str) -> None:
    text = run(f"fit --encoder {encoder} --help").stdout
    own = {"tcn": "--max-lag", "vae": "--free-bits", "pca": "--dim", "dino-tok-vq": "--variance"}
    assert {name for name, flag in own.items() if flag in text} == {encoder}


def test_a_bad_value_has_exit_status_2(home: Path) -> None:
    for line in ("fit --encoder vae --beta -1", "fit --lr inf", "fit --batch-size 1", "extract --lag 0"):
        result = run(line)
        assert result.exit_code == 2
        assert line.split()[-2] in result.stderr


def test_all_encoders_are_listed(home: Path) -> None:
    rows = {row["name"]: row for row in json.loads(run("encoders --json").stdout)}
    assert {"dinov2", "dinov2-cls", "dinov3", "vjepa2", "siglip2", "resnet18", "r3m", "dino-tok", "vfm-vae"} <= set(
        rows
    )
    assert rows["tcn"]["fitted"]
    assert not rows["dinov2"]["fitted"]
    for line in run("encoders").stdout.splitlines()[1:]:
        assert line.split()[0] in rows


@pytest.mark.usefixtures("home")
def test_encoders_in_one_pass_are_measured_against_one_pass_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    result = run("bench extract --encoder tcn,tcn-layers --json --device cpu")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["frames"] == 360
    assert figures["more_than_first"] > -1
    assert figures["one_after_the_other"] > 0
