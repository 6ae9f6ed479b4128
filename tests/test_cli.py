"""The commands, from end to end, and every wrong input that a user is likely to give."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from shutil import copytree

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from wmcache import __version__
from wmcache.cache import StoreWriter, TokenStore
from wmcache.cli import main, wmplan, wmtrain
from wmcache.common import files
from wmcache.trainer import loop

BENCHMARKS = ["bench extract", "bench read", "bench train", "bench memory", "bench codecs", "bench plan"]
COMMANDS: dict[str, click.Command] = {"wmcache": main, "wmtrain": wmtrain, "wmplan": wmplan}

MODEL = "--width 16 --depth 1 --heads 2 --batch-size 8 --device cpu --dtype float32"
PLAN = "--episodes 2 --budget 10 --samples 8 --elites 3 --iterations 2 --horizon 2 --device cpu"
PLAN_FOLDER = "plan-all-x1-horizon2-device-cpu-samples8-elites3-iterations2-2x10"


@pytest.fixture(scope="module", autouse=True)
def _leave_the_process_as_it_was() -> Iterator[None]:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    # Models this small only wait for each other's threads.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def run(line: str, home: Path, **places: object) -> Result:
    """Run a command line; `{name}` in it stands for a place, which may hold spaces."""
    name, *words = (word.format(home=home, **places) for word in line.split())
    return CliRunner().invoke(COMMANDS[name], words, env={"WMCACHE_HOME": str(home)}, prog_name=name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the whole road leaves behind; read only, so copy it to change it."""
    home = tmp_path_factory.mktemp("home") / "Läufe mit Leerzeichen"
    for line in (
        "wmcache collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1",
        "wmcache fit --steps 5 --batch-size 16 --device cpu",
        "wmcache extract --device cpu",
        f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64.zarr --steps 4 {MODEL}",
        f"wmplan --run {{home}}/runs/pointmaze-umaze-tcn-64 {PLAN}",
    ):
        result = run(line, home)
        assert result.exit_code == 0, result.output
    return home


@pytest.fixture(scope="module")
def other_store(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "other.zarr"
    assert run("wmcache extract --normalisation imagenet --device cpu --out {out}", home, out=path).exit_code == 0
    return path


def contents(*folders: Path) -> dict[Path, tuple[int, int]]:
    found = [file for folder in folders for file in folder.rglob("*")]
    # A folder's own time tells of a lock that came and went, and of nothing that is left.
    return {file: (0, 0) if file.is_dir() else (file.lstat().st_mtime_ns, file.lstat().st_size) for file in found}


@pytest.fixture
def refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks that a command line gives one line of error and a status, and leaves every file and folder as it was."""
    monkeypatch.chdir(tmp_path)

    def check(line: str, *said: str, **places: object) -> None:
        before = contents(home, tmp_path)
        result = run(line, home, tmp=tmp_path, **places)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stdout == ""
        # What click itself refuses comes with a reminder of the usage, and status 2.
        *usage, error = result.stderr.splitlines()
        assert result.exit_code == (2 if usage else 1)
        assert all(line == "" or line.startswith(("Usage: ", "Try ")) for line in usage)
        assert error.startswith("Error: ")
        for part in said:
            assert part.format(home=home, tmp=tmp_path, **places) in error
        assert contents(home, tmp_path) == before

    return check


class TestTheRoad:
    def test_everything_lies_where_the_next_command_looks_for_it(self, home: Path) -> None:
        for place in (
            "pointmaze-umaze/dataset.json",
            "encoders/pointmaze-umaze-tcn.safetensors",
            "stores/pointmaze-umaze/tcn-64.zarr/zarr.json",
            "runs/pointmaze-umaze-tcn-64/checkpoints/last/model.safetensors",
            f"runs/pointmaze-umaze-tcn-64/{PLAN_FOLDER}/results.json",
            f"runs/pointmaze-umaze-tcn-64/{PLAN_FOLDER}/report.html",
        ):
            assert (home / place).exists()
        assert not list(home.rglob("*.tmp"))

    @pytest.mark.parametrize(
        "line",
        [
            "wmcache collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1",
            "wmcache fit --steps 5 --batch-size 16 --device cpu",
            "wmcache extract --device cpu",
        ],
    )
    def test_a_finished_command_changes_nothing_when_it_is_run_again(self, home: Path, line: str) -> None:
        def data() -> dict[Path, bytes]:
            return {file: file.read_bytes() for file in home.rglob("*") if file.is_file() and "runs" not in file.parts}

        before = data()
        result = run(line, home)
        assert result.exit_code == 0
        assert "already complete" in result.stdout
        assert data() == before

    def test_planning_prints_json_and_nothing_else(self, home: Path, tmp_path: Path) -> None:
        line = f"wmplan --run {{home}}/runs/pointmaze-umaze-tcn-64 --json --out {{out}} {PLAN}"
        result = run(line, home, out=tmp_path / "plan")
        assert json.loads(result.stdout) == json.loads((tmp_path / "plan" / "results.json").read_text())

    def test_without_a_home_it_is_data_in_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("WMCACHE_HOME", raising=False)
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(main, ["extract"])
        assert "data/pointmaze-umaze" in result.stderr

    def test_the_advice_after_training_can_be_followed(self, home: Path, tmp_path: Path) -> None:
        line = f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64.zarr --steps 1 --out {{out}} {MODEL}"
        result = run(line, home, out=tmp_path / "run")
        assert result.stdout.splitlines()[-1].endswith(f"wmplan --run {tmp_path / 'run'}")


class TestWhatIsNotThere:
    """A store, a dataset or a run that is missing where the README has it, and is there under the user's own $WMCACHE_HOME."""

    @pytest.mark.parametrize(
        ("line", "there"),
        [
            ("wmcache info data/demo/{}", "stores/pointmaze-umaze/tcn-64.zarr"),
            ("wmcache verify {}", "stores/pointmaze-umaze/tcn-64.zarr"),
            ("wmtrain --cache /no/where/{}", "stores/pointmaze-umaze/tcn-64.zarr"),
            ("wmcache extract --dataset data/demo/{}", "pointmaze-umaze"),
            ("wmplan --run data/demo/{}", "runs/pointmaze-umaze-tcn-64"),
        ],
    )
    def test_the_same_place_under_home_is_named(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, there: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = run(line.format(there), home)
        assert result.exit_code == 1
        assert f"did you mean {home / there}?" in result.stderr

    @pytest.mark.parametrize(
        ("line", "there"),
        [
            ("wmcache info {home}/stores/pointmaze-umaze/tcn-46.zarr", "stores/pointmaze-umaze/tcn-64.zarr"),
            ("wmcache extract --dataset {home}/pointmaze-umase", "pointmaze-umaze"),
            ("wmplan --run {home}/runs/pointmaze-umaze-tcn", "runs/pointmaze-umaze-tcn-64"),
        ],
    )
    def test_the_nearest_name_is_named(self, home: Path, line: str, there: str) -> None:
        assert f"did you mean {home / there}?" in run(line, home).stderr

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("wmcache info nothing-like-it", "wmcache extract"),
            ("wmcache extract --dataset nothing-like-it", "wmcache collect"),
            ("wmplan --run nothing-like-it", "wmtrain"),
        ],
    )
    def test_where_there_is_nothing_like_it_the_command_that_makes_one_is_named(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = run(line, home)
        assert "nothing-like-it" in result.stderr
        assert said in result.stderr
        assert "did you mean" not in result.stderr


class TestQuestions:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_version(self, home: Path, command: str) -> None:
        assert run(f"{command} --version", home).stdout == f"{command}, version {__version__}\n"

    @pytest.mark.parametrize("flag", ["--help", "-h"])
    @pytest.mark.parametrize("command", [*COMMANDS, *(f"wmcache {name}" for name in [*main.commands, *BENCHMARKS])])
    def test_help(self, home: Path, command: str, flag: str) -> None:
        result = run(f"{command} {flag}", home)
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: {command} ")

    def test_encoders_can_be_read_by_programs(self, home: Path) -> None:
        rows = {row["name"]: row for row in json.loads(run("wmcache encoders --json", home).stdout)}
        assert rows.keys() >= {"dinov2", "tcn"}
        assert rows["dinov2"]["token_grid"] == [14, 14]
        assert rows["dinov2"]["token_dim"] == 384

    def test_encoders_can_be_read_by_people(self, home: Path) -> None:
        said = run("wmcache encoders", home).stdout
        assert "14 x 14" in said
        assert "Apache-2.0" in said

    def test_a_dry_run_writes_nothing(self, home: Path, tmp_path: Path) -> None:
        before = contents(home, tmp_path)
        result = run("wmcache extract --dry-run --device cpu --out {out}", home, out=tmp_path / "new.zarr")
        assert result.exit_code == 0
        assert "4 shards, 240 frames to do" in result.stdout
        # 240 frames of 4 tokens of 32 numbers of 2 bytes.
        assert "61.4 kB needed" in result.stdout
        assert contents(home, tmp_path) == before

    def test_a_dry_run_sees_what_is_there(self, home: Path) -> None:
        assert "0 shards, 0 frames to do" in run("wmcache extract --dry-run --device cpu", home).stdout

    def test_extraction_is_measured_against_the_bare_network(self, home: Path) -> None:
        figures = json.loads(run("wmcache bench extract --json --device cpu", home).stdout)
        ratio = figures["extract_frames_per_second"] / figures["network_frames_per_second"]
        assert figures["ratio_to_network"] == pytest.approx(ratio)
        assert figures["frames"] == 240


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("wmcache fit --dataset {tmp}/none", "wmcache collect"),
            ("wmcache extract --dataset {tmp}/none", "wmcache collect"),
            ("wmcache bench extract --dataset {tmp}/none", "wmcache collect"),
            ("wmcache bench train --cache {tmp}/none", "wmcache extract"),
            ("wmcache bench codecs {tmp}/none", "wmcache extract"),
            ("wmcache info {tmp}/none", "wmcache extract"),
            ("wmcache verify {tmp}/none", "wmcache extract"),
            ("wmcache verify --deep {tmp}/none", "wmcache extract"),
            ("wmcache repair {tmp}/none", "wmcache extract"),
            ("wmcache preview {tmp}/none", "wmcache extract"),
            ("wmcache rm --yes {tmp}/none", "wmcache ls"),
            ("wmtrain --cache {tmp}/none", "wmcache extract"),
            ("wmtrain --cache {tmp}/none --out {tmp}/new/run", "wmcache extract"),
            ("wmplan --run {tmp}/none", "wmtrain"),
            ("wmcache bench plan --run {tmp}/none", "wmtrain"),
        ],
    )
    def test_what_is_missing(self, refused: Callable[..., None], line: str, said: str) -> None:
        refused(line, "{tmp}/none", "does not exist", said)

    @pytest.mark.parametrize(
        "line",
        [
            "wmcache extract --dataset {home}/stores/pointmaze-umaze/tcn-64.zarr",
            "wmcache extract --dataset {home}/pointmaze-umaze/dataset.json",
            "wmcache extract --out {home}/pointmaze-umaze --device cpu",
            "wmcache info {home}/pointmaze-umaze",
            "wmcache verify {home}/pointmaze-umaze",
            "wmcache verify --deep {home}/runs/pointmaze-umaze-tcn-64",
            "wmcache repair {home}/pointmaze-umaze/dataset.json",
            "wmcache preview {home}/pointmaze-umaze",
            "wmcache preview {home}/stores/pointmaze-umaze/tcn-64.zarr --dataset {home}/stores",
            "wmcache rm --yes {home}/pointmaze-umaze",
            "wmcache rm --yes {home}/pointmaze-umaze/dataset.json",
            "wmcache rm --yes {home}/stores",
            "wmcache rm --yes {home}/runs/pointmaze-umaze-tcn-64",
            "wmcache rm --yes {home}/stores/pointmaze-umaze/tcn-64.zarr/tokens",
            "wmtrain --cache {home}/pointmaze-umaze",
            "wmtrain --cache {home}/pointmaze-umaze/dataset.json",
            "wmtrain --cache {home}/stores/pointmaze-umaze/tcn-64.zarr/tokens",
            "wmplan --run {home}/stores/pointmaze-umaze/tcn-64.zarr",
            "wmplan --run {home}/pointmaze-umaze/dataset.json",
        ],
    )
    def test_a_folder_of_another_kind(self, refused: Callable[..., None], line: str) -> None:
        refused(line, "{home}")

    @pytest.mark.parametrize(
        ("line", "kind"),
        [
            ("wmtrain --cache {home}/pointmaze-umaze", "a frame dataset, not a token store"),
            (
                "wmcache extract --dataset {home}/stores/pointmaze-umaze/tcn-64.zarr",
                "a token store, not a frame dataset",
            ),
            ("wmcache info {home}/runs/pointmaze-umaze-tcn-64", "a run or a decoder, not a token store"),
            ("wmplan --run {home}/stores/pointmaze-umaze/tcn-64.zarr", "a token store, not a run"),
            ("wmplan --run {home}/pointmaze-umaze/dataset.json", "a file, not a run"),
        ],
    )
    def test_a_folder_of_another_kind_is_named(self, refused: Callable[..., None], line: str, kind: str) -> None:
        refused(line, kind)

    def test_an_encoder_that_is_almost_spelt_right(self, refused: Callable[..., None]) -> None:
        refused("wmcache extract --encoder dinov22", "did you mean", "dinov2")

    def test_a_listing_of_no_folder(self, refused: Callable[..., None]) -> None:
        refused("wmcache ls {tmp}/none", "{tmp}/none")

    @pytest.mark.parametrize("name", ["dataset", "store", "run"])
    def test_somebody_elses_json(self, refused: Callable[..., None], tmp_path: Path, name: str) -> None:
        folder, file, line = {
            "dataset": (tmp_path / "d", "dataset.json", "wmcache extract --dataset {folder}"),
            "store": (tmp_path / "s", "zarr.json", "wmtrain --cache {folder}"),
            "run": (tmp_path / "r", "config.json", "wmplan --run {folder}"),
        }[name]
        folder.mkdir()
        (folder / file).write_text('{"attributes": {}, "node_type": "group"}')
        refused(line, "{folder}", folder=folder)

    @pytest.mark.parametrize("command", ["extract", "fit", "bench extract"])
    def test_an_unknown_encoder(self, refused: Callable[..., None], command: str) -> None:
        refused(f"wmcache {command} --encoder clip", "'clip'", "dinov2", "tcn")

    def test_an_encoder_that_is_not_fitted(self, refused: Callable[..., None]) -> None:
        refused("wmcache fit --encoder dinov2", "timm/vit_small_patch14_dinov2", "tcn")

    def test_an_encoder_that_has_not_been_fitted_yet(self, home: Path, tmp_path: Path) -> None:
        result = run(
            "wmcache extract --dataset {data} --out {out}", tmp_path, data=home / "pointmaze-umaze", out=tmp_path
        )
        assert len(result.stderr.splitlines()) == 1
        assert all(word in result.stderr for word in ("Error: ", "--weights", "wmcache fit --encoder tcn", "--dataset"))

    def test_an_unknown_policy(self, refused: Callable[..., None]) -> None:
        refused("wmcache collect --policy clever --out {tmp}/new", "'clever'", "random", "held")

    @pytest.mark.parametrize(
        "line", ["wmcache collect --out {tmp}/new", "wmplan --run {home}/runs/pointmaze-umaze-tcn-64"]
    )
    @pytest.mark.parametrize("env", ["Spiral", "wmcache/PointMaze-Spiral-v0", "spiral.txt"])
    def test_an_unknown_env(self, refused: Callable[..., None], line: str, env: str) -> None:
        refused(f"{line} --env {env}", "UMaze", "Large")

    def test_an_image_size_that_is_no_multiple_of_the_patch(self, refused: Callable[..., None]) -> None:
        refused("wmcache extract --image-size 65", "--image-size 65", "multiple of 32")
        refused("wmcache extract --encoder dinov2 --image-size 200", "--image-size 200", "multiple of 14")

    def test_an_image_size_that_the_weights_were_not_fitted_for(self, refused: Callable[..., None]) -> None:
        refused("wmcache extract --image-size 96", "96 px", "fit it again")

    def test_a_hub_that_cannot_be_reached(
        self, refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub.constants

        # HF_HUB_OFFLINE and HF_HOME are read once, at import; a process of its own would cost nine seconds.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        refused("wmcache extract --encoder dinov2 --device cpu", "--weights", "--encoder tcn")

    @pytest.mark.parametrize(
        ("weights", "said"),
        [
            ("{home}/runs/pointmaze-umaze-tcn-64/checkpoints/last/model.safetensors", "does not fit tcn"),
            ("{tmp}/garbage.safetensors", "does not fit tcn"),
            ("{tmp}/none.safetensors", "neither an existing .safetensors file"),
            ("{tmp}/pickle.pth", "it could hold code"),
        ],
    )
    def test_weights_of_another_kind(
        self, refused: Callable[..., None], tmp_path: Path, weights: str, said: str
    ) -> None:
        (tmp_path / "garbage.safetensors").write_bytes(b"garbage" * 100)
        torch.save({"weight": torch.zeros(1)}, tmp_path / "pickle.pth")
        refused(f"wmcache extract --weights {weights} --out {{tmp}}/new.zarr", weights, said)

    def test_weights_of_another_kind_for_a_model_of_the_hub(self, refused: Callable[..., None], home: Path) -> None:
        refused(
            "wmcache extract --encoder dinov2 --device cpu --weights {home}/encoders/pointmaze-umaze-tcn.safetensors",
            "pointmaze-umaze-tcn.safetensors does not hold",
            "vit_small_patch14_dinov2",
        )

    @pytest.mark.parametrize("options", ["--history 12", "--frameskip 11", "--history 40 --frameskip 1"])
    def test_episodes_too_short_for_a_window(self, refused: Callable[..., None], options: str) -> None:
        line = f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64.zarr --out {{tmp}}/run {options}"
        refused(line, "collect longer episodes")

    @pytest.mark.parametrize(
        "options",
        [
            "--heads 3",
            "--model dreamer",
            "--dtype float8",
            "--device abacus",
            "--lr -1",
            "--lr nan",
            "--weight-decay -1",
            "--clip -1",
        ],
    )
    def test_training_options_that_make_no_sense(self, refused: Callable[..., None], options: str) -> None:
        line = f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64.zarr --out {{tmp}}/run --steps 1 {MODEL}"
        refused(f"{line} {options}")

    @pytest.mark.parametrize("options", ["--lr -1", "--lr nan", "--device abacus", "--batch-size 100000"])
    def test_fitting_options_that_make_no_sense(self, refused: Callable[..., None], options: str) -> None:
        refused(f"wmcache fit --steps 1 --batch-size 16 --device cpu --out {{tmp}}/new.safetensors {options}")

    @pytest.mark.parametrize(
        "options",
        [
            "--elites 9",
            "--execute 3",
            "--budget -1",
            "--episodes 0",
            "--batch-size 0",
            "--sigma nan",
            "--dtype float8",
            "--solver guess",
            "--temperature 1",
            "--proprio none",
        ],
    )
    def test_planning_options_that_make_no_sense(self, refused: Callable[..., None], options: str) -> None:
        line = f"wmplan --run {{home}}/runs/pointmaze-umaze-tcn-64 --out {{tmp}}/plan {PLAN}"
        refused(f"{line} {options}", options.split()[0].removeprefix("--"))

    @pytest.mark.parametrize(
        "line",
        [
            "wmcache collect --episodes 0",
            "wmcache collect --length 0",
            "wmcache collect --seed -1",
            "wmcache collect --frames-per-shard 0",
            "wmcache fit --steps 0",
            "wmcache extract --batch-size 0",
            "wmcache extract --store-dtype float64",
            "wmcache preview x --count 0",
            "wmcache preview",
            "wmcache verify",
            "wmcache rm",
            "wmcache bench read --frames 10",
            "wmcache bench train",
            "wmtrain --cache x --residence attic",
            "wmtrain --cache x --steps 0",
            "wmtrain --cache x --dropout 1",
            "wmtrain --cache x --history 0",
            "wmtrain",
            "wmplan",
            "wmplan --run x --objective first",
            "wmplan --run x --protocol dreamer",
            "wmcache bench plan",
            "wmcache explode",
        ],
    )
    def test_words_that_are_no_command(self, tmp_path: Path, line: str) -> None:
        result = run(line, tmp_path)
        assert result.exit_code == 2
        assert [error for error in result.stderr.splitlines() if "Error" in error] == result.stderr.splitlines()[-1:]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "line",
        [
            "wmcache collect --episodes 2 --length 4 --image-size 32 --cluster local:1 --out {out}",
            "wmcache fit --steps 1 --batch-size 16 --device cpu --out {out}",
            "wmcache extract --device cpu --out {out}",
            f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64.zarr --steps 1 {MODEL} --out {{out}}",
            f"wmplan --run {{home}}/runs/pointmaze-umaze-tcn-64 {PLAN} --out {{out}}",
        ],
        ids=["collect", "fit", "extract", "wmtrain", "wmplan"],
    )
    @pytest.mark.parametrize("place", ["{tmp}/file", "{tmp}/file/below", "/proc/wmcache/below"])
    def test_a_place_that_cannot_be_written(self, home: Path, tmp_path: Path, line: str, place: str) -> None:
        (tmp_path / "file").write_text("precious")
        out = place.format(tmp=tmp_path)
        before = contents(home, tmp_path)
        result = run(line, home, out=out)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        # Progress bars of what is done before anything is written may stand above it.
        error = result.stderr.splitlines()[-1]
        assert error.startswith("Error: ")
        # Which one it is of a path's folders, but not a temporary name that the user never gave.
        assert str(tmp_path / "file") in error or "/proc/wmcache" in error
        assert ".tmp" not in error
        assert contents(home, tmp_path) == before
        assert (tmp_path / "file").read_text() == "precious"

    @pytest.mark.parametrize(
        "line", ["wmcache collect --episodes 2000 --out {tmp}/new", "wmcache extract --device cpu --out {tmp}/new.zarr"]
    )
    def test_a_disk_too_small(self, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, line: str) -> None:
        monkeypatch.setattr(files, "free_space", lambda path: 1000)
        refused(line, "needs", "1.0 kB are free", "{tmp}/new")

    def test_one_episode_is_none_to_train_on(self, home: Path, tmp_path: Path) -> None:
        lines = (
            "wmcache collect --episodes 1 --length 40 --image-size 32 --cluster local:1 --out {tmp}/one",
            "wmcache extract --dataset {tmp}/one --weights {weights} --device cpu --out {tmp}/one.zarr",
            "wmtrain --cache {tmp}/one.zarr --out {tmp}/run",
        )
        weights = home / "encoders" / "pointmaze-umaze-tcn.safetensors"
        *_, result = [run(line, home, tmp=tmp_path, weights=weights) for line in lines]
        assert result.stderr.startswith("Error: 1 episodes are too few for a train split")
        assert not (tmp_path / "run").exists()

    def test_a_dataset_with_other_settings(self, refused: Callable[..., None]) -> None:
        line = "wmcache collect --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1 --episodes 7"
        refused(line, "episodes 6, not 7")

    def test_a_store_with_other_settings(self, refused: Callable[..., None]) -> None:
        refused("wmcache extract --normalisation imagenet --device cpu", "normalisation: ")

    def test_the_weights_of_another_fit(self, refused: Callable[..., None]) -> None:
        refused("wmcache fit --steps 6 --batch-size 16 --device cpu", "--out")

    def test_the_run_of_another_store(self, refused: Callable[..., None], other_store: Path) -> None:
        run = "{home}/runs/pointmaze-umaze-tcn-64"
        refused(f"wmtrain --cache {{other}} --out {run} --steps 4 {MODEL}", "identity", other=other_store)
        refused(f"wmplan --run {run} --cache {{other}} {PLAN}", "normalisation: ", "--cache", other=other_store)

    def test_a_run_without_a_checkpoint(self, refused: Callable[..., None], home: Path, tmp_path: Path) -> None:
        copytree(home / "runs" / "pointmaze-umaze-tcn-64", tmp_path / "run", ignore=lambda *_: ["checkpoints"])
        refused("wmplan --run {tmp}/run", "no checkpoint yet")


STORE = "{home}/stores/pointmaze-umaze/tcn-64.zarr"


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


class TestStores:
    @pytest.fixture
    def store(self, home: Path, tmp_path: Path) -> Path:
        """A store of one's own, of 4 shards, to be damaged at will."""
        return Path(copytree(home / "stores/pointmaze-umaze/tcn-64.zarr", tmp_path / "own stores" / "tcn-64.zarr"))

    @pytest.fixture
    def damaged(self, store: Path) -> Path:
        """Frame 66 has a flipped bit, and the last shard is gone."""
        flip(store / "tokens/c.1.0.0", 2 * (4 * 32 * 2 + 4))
        (store / "tokens/c.3.0.0").unlink()
        return store

    def test_stores_are_listed_for_people(self, home: Path) -> None:
        header, *rows = run("wmcache ls", home).stdout.splitlines()
        assert header.split() == ["state", "size", "frames", "tokens", "dtype", "store"]
        (row,) = (row for row in rows if "tcn-64.zarr" in row)
        assert row.split()[0] == "complete"
        assert " 240 " in row
        assert " 4 x 32 " in row
        assert row.endswith(str(home / "stores/pointmaze-umaze/tcn-64.zarr"))

    def test_stores_of_every_state_are_listed_for_programs(self, home: Path, store: Path) -> None:
        folder = store.parent
        copytree(store, folder / "b.zarr")
        (folder / "b.zarr" / "zarr.json").write_text("{")
        result = run("wmcache ls {folder} --json", home, folder=folder)
        assert result.exit_code == 0
        broken, whole = json.loads(result.stdout)
        assert (whole["path"], whole["complete"], whole["fault"]) == (str(store), True, "")
        assert (whole["frames"], whole["tokens"], whole["token_dim"], whole["dtype"]) == (240, 4, 32, "float16")
        assert (whole["encoder"], whole["dataset"], whole["shards_done"]) == ("tcn", "pointmaze-umaze", 4)
        assert (broken["path"], broken["complete"]) == (str(folder / "b.zarr"), False)
        assert "zarr.json" in broken["fault"]
        assert "damaged" in run("wmcache ls {folder}", home, folder=folder).stdout

    def test_where_there_are_no_stores_none_are_listed(self, tmp_path: Path) -> None:
        assert json.loads(run("wmcache ls --json", tmp_path).stdout) == []
        assert len(run("wmcache ls", tmp_path).stdout.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    def test_a_store_says_what_it_is(self, home: Path) -> None:
        values = json.loads(run(f"wmcache info {STORE} --json", home).stdout)
        store = TokenStore.open(home / "stores/pointmaze-umaze/tcn-64.zarr")
        assert values["identity"]["weights_sha256"] == store.identity.weights_sha256
        assert values["card"]["dataset"]["path"] == str(home / "pointmaze-umaze")
        assert values["versions"]["torch"] == version("torch")
        assert (values["frames"], values["complete"], values["fault"]) == (240, True, "")
        rows = dict(
            line.split(maxsplit=1)
            for line in run(f"wmcache info {STORE}", home).stdout.splitlines()
            if " " in line.strip()
        )
        assert rows["identity.weights_sha256"] == store.identity.weights_sha256
        assert rows["card.token_grid"] == "[2, 2]"
        assert rows["frames"] == "240"

    def test_the_info_of_a_damaged_store_is_refused(self, refused: Callable[..., None], store: Path) -> None:
        (store / "zarr.json").write_text("{")
        for command in ("info", "info --json", "preview", "bench codecs"):
            refused(f"wmcache {command} {{store}}", "{store}/zarr.json", "run its wmcache extract again", store=store)

    @pytest.mark.parametrize("options", ["", "--deep --device cpu"])
    def test_a_sound_store_is_verified(self, home: Path, options: str) -> None:
        result = run(f"wmcache verify {STORE} {options}", home)
        assert result.exit_code == 0
        assert "4 of 4 shards as they were written, 240 frames" in result.stdout
        assert "fault" not in result.stdout
        assert ("cosine" in result.stdout) == bool(options)
        result = run(f"wmcache verify {STORE} {options} --json", home)
        found = json.loads(result.stdout)
        assert (found["sound"], found["complete"], found["shards_done"], found["faults"]) == (True, True, 4, [])
        assert (found["drift"] is not None) == bool(options)

    @pytest.mark.parametrize("options", ["", "--deep --device cpu"])
    def test_a_damaged_store_is_found_out_and_left_alone(self, home: Path, damaged: Path, options: str) -> None:
        before = contents(damaged)
        result = run(f"wmcache verify {{store}} {options}", home, store=damaged)
        assert result.exit_code == 1
        faults = [line for line in result.stdout.splitlines() if line.startswith("fault: ")]
        assert len(faults) == 2
        assert "tokens/c.1.0.0: it differs from its checksum, in frames 66" in faults[0]
        assert "tokens/c.3.0.0" in faults[1]
        said = f"Error: {damaged} is damaged; hint it with: wmcache repair {shlex.quote(str(damaged))}"
        assert result.stderr.splitlines()[-1] == said
        result = run(f"wmcache verify {{store}} {options} --json", home, store=damaged)
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert (found["sound"], [fault["shard"] for fault in found["faults"]]) == (False, [1, 3])
        assert result.stderr.splitlines()[-1] == said
        assert contents(damaged) == before

    def test_wrong_tokens_are_found_by_encoding_anew(self, home: Path, store: Path) -> None:
        known = TokenStore.open(store)
        made_up = np.random.default_rng(0).normal(size=(64, 4, 32)).astype(np.float16)
        writer = StoreWriter.resume(store, known.identity)
        writer.write_shard(1, made_up)
        assert run("wmcache verify {store}", home, store=store).exit_code == 1
        writer.reopen([])
        writer.finish()
        assert run("wmcache verify {store}", home, store=store).exit_code == 0
        result = run("wmcache verify {store} --deep --device cpu", home, store=store)
        assert result.exit_code == 1
        assert "gives other tokens" in result.stdout

    def test_an_unfinished_store_is_called_so(self, home: Path, store: Path) -> None:
        known = TokenStore.open(store)
        StoreWriter.resume(store, known.identity).reopen([2])
        result = run("wmcache verify {store}", home, store=store)
        assert result.exit_code == 1
        assert "3 of 4 shards" in result.stdout
        assert result.stderr.splitlines()[-1].startswith(f"Error: {store} is incomplete; hint it with: wmcache repair")
        assert "3 of 4 shards" in run("wmcache ls {folder}", home, folder=store.parent).stdout

    def test_what_belongs_to_nobody_is_named(self, home: Path, store: Path) -> None:
        (store / "tokens/commits/notes.txt").write_text("mine")
        result = run("wmcache verify {store}", home, store=store)
        assert result.exit_code == 0
        assert f"left over, harmless: {store}/tokens/commits/notes.txt" in result.stdout

    def test_a_damaged_store_is_mended_as_the_message_says(self, home: Path, damaged: Path) -> None:
        assert (
            run("wmtrain --cache {store} --out {out}", home, store=damaged, out=damaged.parent / "run").exit_code == 1
        )
        said = run("wmcache verify {store}", home, store=damaged).stderr.splitlines()[-1]
        command = shlex.split(said.partition("hint it with: ")[2])
        result = CliRunner().invoke(main, [*command[1:], "--device", "cpu"])
        assert result.exit_code == 0
        assert result.stdout == f"{damaged}: complete; 2 faults repaired\n"
        assert run("wmcache verify {store}", home, store=damaged).exit_code == 0
        original = home / "stores/pointmaze-umaze/tcn-64.zarr"
        for file in original.rglob("*"):
            assert file.is_dir() or (damaged / file.relative_to(original)).read_bytes() == file.read_bytes()

    def test_a_sound_store_needs_no_mending(self, home: Path) -> None:
        before = contents(home)
        assert run(f"wmcache repair {STORE}", home).stdout == f"{STORE.format(home=home)}: complete\n"
        assert contents(home) == before

    def test_frames_and_weights_that_have_moved_are_said(
        self, home: Path, tmp_path: Path, refused: Callable[..., None]
    ) -> None:
        lines = (
            "wmcache collect --episodes 2 --length 8 --image-size 32 --frames-per-shard 8 --cluster local:1 --out {tmp}/a",
            "wmcache fit --dataset {tmp}/a --steps 1 --batch-size 4 --device cpu --out {tmp}/a.safetensors",
            "wmcache extract --dataset {tmp}/a --weights {tmp}/a.safetensors --device cpu --out {tmp}/a.zarr",
        )
        assert [run(line, home, tmp=tmp_path).exit_code for line in lines] == [0, 0, 0]
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
        (tmp_path / "a.zarr/tokens/c.1.0.0").unlink()
        at = "--dataset {tmp}/b --weights {tmp}/b.safetensors --device cpu"
        for line in ("wmcache repair {tmp}/a.zarr", "wmcache repair {tmp}/a.zarr --dataset {home}/pointmaze-umaze"):
            result = run(line, home, tmp=tmp_path)
            assert result.exit_code == 1
            assert "--dataset" in result.stderr.splitlines()[-1] or "--weights" in result.stderr.splitlines()[-1]
        assert run(f"wmcache repair {{tmp}}/a.zarr {at}", home, tmp=tmp_path).exit_code == 0
        assert run(f"wmcache verify --deep {{tmp}}/a.zarr {at}", home, tmp=tmp_path).exit_code == 0
        assert run("wmcache verify --deep {tmp}/a.zarr", home, tmp=tmp_path).exit_code == 1
        assert run("wmcache preview {tmp}/a.zarr --dataset {tmp}/b --count 2", home, tmp=tmp_path).exit_code == 0

    def test_a_picture_lies_beside_its_store(self, home: Path, store: Path) -> None:
        result = run("wmcache preview {store} --count 3", home, store=store)
        assert result.exit_code == 0
        assert result.stdout == f"{store.with_suffix('.png')}: frames 0, 119, 239\n"
        assert store.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert (
            run(
                "wmcache preview {store} --count 1 --out {out}", home, store=store, out=store.parent / "x.png"
            ).exit_code
            == 0
        )
        assert (store.parent / "x.png").exists()

    @pytest.mark.parametrize("answer", ["n\n", "\n", "", "perhaps\n"])
    def test_a_store_is_deleted_only_by_who_says_yes(self, home: Path, store: Path, answer: str) -> None:
        before = contents(store)
        result = CliRunner().invoke(main, ["rm", str(store)], input=answer)
        assert result.exit_code == 1
        assert f"delete {store}?" in result.stdout
        assert contents(store) == before

    @pytest.mark.parametrize(("options", "answer"), [([], "y\n"), (["--yes"], "")])
    def test_a_store_is_deleted(self, store: Path, options: list[str], answer: str) -> None:
        result = CliRunner().invoke(main, ["rm", str(store), *options], input=answer)
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1].startswith(f"{store}: deleted, ")
        assert list(store.parent.iterdir()) == []

    def test_a_damaged_store_can_be_deleted_too(self, home: Path, damaged: Path) -> None:
        (damaged / "zarr.json").write_text("{")
        assert run("wmcache rm --yes {store}", home, store=damaged).exit_code == 0
        assert not damaged.exists()

    @pytest.mark.parametrize("command", ["info", "verify", "repair", "preview --count 1", "rm --yes"])
    def test_a_store_can_be_named_from_inside(
        self, home: Path, store: Path, monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        monkeypatch.chdir(store)
        result = run(f"wmcache {command} .", home)
        # Done, or refused in one line; but no traceback.
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)

    @pytest.mark.parametrize("command", ["info", "verify", "repair", "preview --count 1"])
    def test_a_link_to_a_store_is_as_good(self, home: Path, store: Path, tmp_path: Path, command: str) -> None:
        link = tmp_path / "link.zarr"
        link.symlink_to(store)
        assert run(f"wmcache {command} {{link}}", home, link=link).exit_code == 0
        assert {path.name for path in tmp_path.iterdir()} <= {"link.zarr", "link.png", "own stores"}


@pytest.fixture(scope="module")
def narrow(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a road of its own, whose store is of int8."""
    own = Path(copytree(home, tmp_path_factory.mktemp("int8") / "home"))
    for line in (
        "wmcache extract --store-dtype int8 --device cpu",
        f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64-int8.zarr --steps 4 {MODEL}",
        f"wmplan --run {{home}}/runs/pointmaze-umaze-tcn-64-int8 {PLAN}",
    ):
        result = run(line, own)
        assert result.exit_code == 0, result.output
    return own


class TestResidences:
    def test_where_tokens_are_kept_changes_no_number(self, home: Path, tmp_path: Path) -> None:
        logged = {}
        for residence in ("device", "ram", "disk", "auto"):
            out = tmp_path / residence
            line = f"wmtrain --cache {STORE} --out {{out}} --steps 6 --log-every 1 --residence {residence} {MODEL}"
            result = run(line, home, out=out)
            assert result.exit_code == 0, result.output
            where = "in ram" if residence == "auto" else f"{'in' if residence == 'ram' else 'on'} {residence}"
            assert f"61.4 kB of tokens {where} (" in result.output
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            logged[residence] = [
                {k: v for k, v in row.items() if k not in ("windows_per_second", "waiting_share")} for row in rows
            ]
        assert len(logged["disk"]) == 7
        assert logged["device"] == logged["ram"] == logged["disk"] == logged["auto"]

    def test_a_run_goes_on_from_another_residence(self, home: Path, tmp_path: Path) -> None:
        line = f"wmtrain --cache {STORE} --out {{out}} {MODEL} --steps"
        assert run(f"{line} 2 --residence ram", home, out=tmp_path / "run").exit_code == 0
        result = run(f"{line} 4 --residence disk --resume", home, out=tmp_path / "run")
        assert result.exit_code == 0, result.output
        assert "steps 2 to 4" in result.output


class TestBytes:
    def test_a_store_of_bytes_is_beside_the_other_and_half_as_large(self, narrow: Path) -> None:
        entries = {Path(row["path"]).name: row for row in json.loads(run("wmcache ls --json", narrow).stdout)}
        assert entries.keys() >= {"tcn-64.zarr", "tcn-64-int8.zarr"}
        assert [entries[name]["dtype"] for name in ("tcn-64.zarr", "tcn-64-int8.zarr")] == ["float16", "int8"]
        assert entries["tcn-64-int8.zarr"]["bytes"] < entries["tcn-64.zarr"]["bytes"]
        wide, small = (
            TokenStore.open(narrow / "stores/pointmaze-umaze" / name) for name in ("tcn-64.zarr", "tcn-64-int8.zarr")
        )
        np.testing.assert_allclose(small.gather(np.arange(240)), wide.gather(np.arange(240)), atol=0.05)

    def test_it_is_trained_and_planned_on(self, narrow: Path) -> None:
        results = json.loads((narrow / "runs/pointmaze-umaze-tcn-64-int8" / PLAN_FOLDER / "results.json").read_text())
        assert results["episodes"] == 2
        identity = json.loads((narrow / "runs/pointmaze-umaze-tcn-64-int8/identity.json").read_text())
        assert (identity["identity"]["store_dtype"], identity["card"]["dtype"]) == ("int8", "int8")

    def test_it_is_verified_drawn_and_finished_again_like_the_other(self, narrow: Path, tmp_path: Path) -> None:
        store = narrow / "stores/pointmaze-umaze/tcn-64-int8.zarr"
        before = contents(store)
        for line in (
            "wmcache verify --deep --device cpu {store}",
            "wmcache preview {store} --out {tmp}/x.png --count 1",
            "wmcache extract --store-dtype int8 --device cpu",
        ):
            result = run(line, narrow, store=store, tmp=tmp_path)
            assert result.exit_code == 0, result.output
        assert contents(store) == before

    def test_the_one_is_not_taken_for_the_other(self, narrow: Path) -> None:
        result = run("wmcache extract --device cpu --out {home}/stores/pointmaze-umaze/tcn-64-int8.zarr", narrow)
        assert "other settings (store_dtype: int8 != float16)" in result.stderr
        run_path = "{home}/runs/pointmaze-umaze-tcn-64"
        result = run(
            f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64-int8.zarr --out {run_path} --steps 4 {MODEL}",
            narrow,
        )
        assert "store_dtype: float16 != int8" in result.stderr

    def test_the_forecast_is_of_half_the_room(self, narrow: Path, tmp_path: Path) -> None:
        line = "wmcache extract --dry-run --store-dtype int8 --device cpu --out {out}"
        assert "30.7 kB needed" in run(line, narrow, out=tmp_path / "new.zarr").stdout


class TestBenchmarks:
    @pytest.mark.parametrize("dtype", ["float16", "int8"])
    def test_reading(self, home: Path, tmp_path: Path, dtype: str) -> None:
        line = (
            f"wmcache bench read --frames 100 --tokens 2 --dim 4 --batch-size 2 --store-dtype {dtype} --keep {{keep}}"
        )
        figures = json.loads(run(f"{line} --json", home, keep=tmp_path / "kept").stdout)
        assert figures["frames"] == 100
        assert all(value > 0 for value in figures.values())
        assert np.load(tmp_path / "kept/bench.npy").dtype == dtype
        for row in run(line, home, keep=tmp_path / "kept").stdout.splitlines():
            name, value = row.split()
            assert name in figures
            assert float(value) >= 0

    def test_training(self, home: Path) -> None:
        sizes = "--steps 2 --width 16 --depth 1 --heads 2 --batch-size 4 --device cpu --residence ram"
        result = run(f"wmcache bench train --cache {STORE} {sizes} --json", home)
        figures = json.loads(result.stdout)
        assert figures["windows_per_step"] == 4
        assert all(figures[name] > 0 for name in figures if name != "waiting_share")
        assert "61.4 kB of tokens in ram" in result.output

    def test_smaller_forms(self, home: Path) -> None:
        rows = json.loads(run(f"wmcache bench codecs {STORE} --frames 100 --json", home).stdout)
        assert [row["form"] for row in rows] == ["float16", "int8", "zstd", "blosc lz4 shuffled"]
        header, *lines = run(f"wmcache bench codecs {STORE} --frames 100", home).stdout.splitlines()
        assert header.split() == list(rows[0])
        assert [line.split()[0] for line in lines] == ["float16", "int8", "zstd", "blosc"]


class Interrupted(loop.Log):
    def write(self, step: int, values: Mapping[str, float]) -> None:
        raise KeyboardInterrupt


class TestInterruptions:
    def test_training_says_how_to_go_on(self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "Log", Interrupted)
        line = f"wmtrain --cache {{home}}/stores/pointmaze-umaze/tcn-64.zarr --out {{out}} {MODEL}"
        result = run(line, home, out=tmp_path / "run")
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1].startswith("stopped; go on with: ")

    @pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
    def test_a_stopped_extraction_goes_on(self, home: Path, tmp_path: Path, sent: signal.Signals) -> None:
        data = copytree(home / "pointmaze-umaze", tmp_path / "data")
        # A tar that never answers, as on a file system that hangs: the signal comes while it is being read, on any machine.
        tar = data / "frames-000001.tar"
        whole = tar.read_bytes()
        tar.unlink()
        os.mkfifo(tar)
        store, weights = tmp_path / "store.zarr", home / "encoders" / "pointmaze-umaze-tcn.safetensors"
        words = ["extract", "--dataset", data, "--weights", weights, "--out", store, "--device", "cpu"]
        process = subprocess.Popen(
            [Path(sys.executable).with_name("wmcache"), *words],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        # Opening waits for the reader.
        with tar.open("wb"):
            process.send_signal(sent)
        _, said = process.communicate(timeout=60)
        # What a batch system sends has a status of its own, which it can requeue on.
        assert process.returncode == (130 if sent == signal.SIGINT else 75)
        assert said.splitlines()[-1] == f"stopped; go on with: {shlex.join(['wmcache', *map(str, words)])}"
        assert "Traceback" not in said
        assert "incomplete" in run("wmtrain --cache {store}", home, store=store).stderr

        tar.unlink()
        tar.write_bytes(whole)
        assert CliRunner().invoke(main, [str(word) for word in words]).exit_code == 0
        everything = np.arange(240)
        straight = TokenStore.open(home / "stores" / "pointmaze-umaze" / "tcn-64.zarr").gather(everything)
        np.testing.assert_array_equal(TokenStore.open(store).gather(everything), straight)


def test_places_with_spaces_reach_the_commands_whole(home: Path) -> None:
    # `run` splits lines at spaces before it fills in places; were it the other way round, no test above would mean much.
    assert " " in str(home)
    assert run("wmplan --run {home}/none", home).stderr.startswith(f"Error: {home}/none")
