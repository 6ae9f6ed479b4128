"""The commands, from end to end, and every wrong input that a user is likely to give."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shutil import copytree

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from wmcache import __version__
from wmcache.cache import TokenStore, files
from wmcache.cli import main, wmplan, wmtrain
from wmcache.trainer import loop

COMMANDS: dict[str, click.Command] = {"wmcache": main, "wmtrain": wmtrain, "wmplan": wmplan}

MODEL = "--width 16 --depth 1 --heads 2 --batch-size 8 --device cpu --dtype float32"
PLAN = "--episodes 2 --budget 10 --samples 8 --elites 3 --iterations 2 --horizon 2 --device cpu"


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
        "wmcache collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --workers 1",
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
    return {file: (file.lstat().st_mtime_ns, file.lstat().st_size) for file in found}


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
            "runs/pointmaze-umaze-tcn-64/plan-all-x1-2x10/results.json",
            "runs/pointmaze-umaze-tcn-64/plan-all-x1-2x10/report.html",
        ):
            assert (home / place).exists()
        assert not list(home.rglob("*.tmp"))

    @pytest.mark.parametrize(
        "line",
        [
            "wmcache collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --workers 1",
            "wmcache fit --steps 5 --batch-size 16 --device cpu",
            "wmcache extract --device cpu",
        ],
    )
    def test_a_finished_command_changes_nothing_when_it_is_run_again(self, home: Path, line: str) -> None:
        def data() -> dict[Path, bytes]:
            return {file: file.read_bytes() for file in home.rglob("*") if file.is_file() and "runs" not in file.parts}

        before = data()
        assert run(line, home).exit_code == 0
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


class TestQuestions:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_version(self, home: Path, command: str) -> None:
        assert run(f"{command} --version", home).stdout == f"{command}, version {__version__}\n"

    @pytest.mark.parametrize("flag", ["--help", "-h"])
    @pytest.mark.parametrize("command", [*COMMANDS, *(f"wmcache {name}" for name in [*main.commands, "bench extract"])])
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
            ("wmtrain --cache {tmp}/none", "wmcache extract"),
            ("wmplan --run {tmp}/none", "wmtrain"),
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
            "wmtrain --cache {home}/pointmaze-umaze",
            "wmtrain --cache {home}/pointmaze-umaze/dataset.json",
            "wmtrain --cache {home}/stores/pointmaze-umaze/tcn-64.zarr/tokens",
            "wmplan --run {home}/stores/pointmaze-umaze/tcn-64.zarr",
            "wmplan --run {home}/pointmaze-umaze/dataset.json",
        ],
    )
    def test_a_folder_of_another_kind(self, refused: Callable[..., None], line: str) -> None:
        refused(line, "{home}")

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
        assert result.stderr.splitlines() == [
            "Error: encoder tcn has no fitted weights yet; make them with: wmcache fit --encoder tcn"
        ]

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
            ("{tmp}/none.safetensors", "not an existing .safetensors file"),
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
            "wmcache extract --workers 0",
            "wmtrain --cache x --steps 0",
            "wmtrain --cache x --dropout 1",
            "wmtrain --cache x --history 0",
            "wmtrain",
            "wmplan",
            "wmplan --run x --objective first",
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
            "wmcache collect --episodes 2 --length 4 --image-size 32 --workers 1 --out {out}",
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
            "wmcache collect --episodes 1 --length 40 --image-size 32 --workers 1 --out {tmp}/one",
            "wmcache extract --dataset {tmp}/one --weights {weights} --device cpu --out {tmp}/one.zarr",
            "wmtrain --cache {tmp}/one.zarr --out {tmp}/run",
        )
        weights = home / "encoders" / "pointmaze-umaze-tcn.safetensors"
        *_, result = [run(line, home, tmp=tmp_path, weights=weights) for line in lines]
        assert result.stderr.startswith("Error: 1 episodes are too few for a train split")
        assert not (tmp_path / "run").exists()

    def test_a_dataset_with_other_settings(self, refused: Callable[..., None]) -> None:
        line = "wmcache collect --length 40 --image-size 32 --frames-per-shard 64 --workers 1 --episodes 7"
        refused(line, "episodes 6, not 7")

    def test_a_store_with_other_settings(self, refused: Callable[..., None]) -> None:
        refused("wmcache extract --normalisation imagenet --device cpu", "normalisation: ")

    def test_the_weights_of_another_fit(self, refused: Callable[..., None]) -> None:
        refused("wmcache fit --steps 6 --batch-size 16 --device cpu", "--overwrite")

    def test_the_run_of_another_store(self, refused: Callable[..., None], other_store: Path) -> None:
        run = "{home}/runs/pointmaze-umaze-tcn-64"
        refused(f"wmtrain --cache {{other}} --out {run} --steps 4 {MODEL}", "identity", other=other_store)
        refused(f"wmplan --run {run} --cache {{other}} {PLAN}", "normalisation: ", "--cache", other=other_store)

    def test_a_run_without_a_checkpoint(self, refused: Callable[..., None], home: Path, tmp_path: Path) -> None:
        copytree(home / "runs" / "pointmaze-umaze-tcn-64", tmp_path / "run", ignore=lambda *_: ["checkpoints"])
        refused("wmplan --run {tmp}/run", "no checkpoint yet")


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
