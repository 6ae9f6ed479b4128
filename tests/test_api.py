"""The Python calls: each does what its command does, to the byte, and importing the package is quick."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import wmcache
from wmcache import api
from wmcache.cli import main, wmplan, wmtrain
from wmcache.common.options import options_in
from wmcache.pipeline.fit import read_fit
from wmcache.planner.protocols import PROTOCOLS
from wmcache.trainer.presets import PRESETS

SIZES = {"width": 16, "depth": 1, "heads": 2}
TRAIN: dict[str, Any] = {"steps": 4, "batch": 8, "device": "cpu", "dtype": "float32", "model_options": SIZES}
SEARCH = {"samples": 8, "elites": 3, "iterations": 2}
PLAN: dict[str, Any] = {"episodes": 2, "budget": 10, "horizon": 2, "device": "cpu", "search": SEARCH}
TIMED = ("made", "seconds_per_replan", "replans")


def succeed(command: click.Command, line: str, home: Path) -> None:
    done = CliRunner().invoke(command, line.format(home=home).split(), env={"WMCACHE_HOME": str(home)})
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home after the commands."""
    home = tmp_path_factory.mktemp("commands") / "home"
    sizes = "--width 16 --depth 1 --heads 2 --batch-size 8 --device cpu --dtype float32"
    plan = "--episodes 2 --budget 10 --samples 8 --elites 3 --iterations 2 --horizon 2 --device cpu"
    succeed(main, "collect --episodes 6 --length 40 --image-size 32 --frames-per-shard 64 --cluster local:1", home)
    succeed(main, "fit --steps 5 --batch-size 16 --device cpu", home)
    succeed(main, "extract --device cpu", home)
    succeed(wmtrain, f"--cache {{home}}/stores/pointmaze-umaze/tcn-64.zarr --steps 4 {sizes}", home)
    succeed(wmplan, f"--run {{home}}/runs/pointmaze-umaze-tcn-64 {plan}", home)
    return home


def call_all(*, plans: bool = True) -> tuple[Any, ...]:
    data = wmcache.collect(episodes=6, length=40, image_size=32, frames_per_shard=64, cluster="local:1")
    fitted = wmcache.fit(data, encoder_options={"steps": 5, "batch": 16}, device="cpu")
    store = wmcache.extract(data, device="cpu")
    run = wmcache.train(store, **TRAIN)
    return data, fitted, store, run, wmcache.plan(run, **PLAN) if plans else None


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What the calls return, with another home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WMCACHE_HOME", str(tmp_path_factory.mktemp("calls") / "home"))
        return call_all()


def files_of(home: Path) -> dict[str, bytes]:
    """The files that do not depend on when and where they were made."""
    inside = {str(file.relative_to(home)): file for file in home.rglob("*") if file.is_file()}
    # safetensors writes metadata in any order; the others have paths or times.
    varying = ("encoders/", "tensorboard/", "plan-", "metrics.jsonl", "config.json", "identity.json", "zarr/zarr.json")
    return {name: file.read_bytes() for name, file in inside.items() if not any(part in name for part in varying)}


def test_the_calls_write_what_the_commands_write(commands: Path, calls: tuple[Any, ...]) -> None:
    data, fitted, store, _, result = calls
    home = data.path.parent
    assert files_of(home) == files_of(commands)
    assert {str(file.relative_to(home)) for file in home.rglob("*.json")} == {
        str(file.relative_to(commands)) for file in commands.rglob("*.json")
    }
    for name in (
        "runs/pointmaze-umaze-tcn-64/config.json",
        "runs/pointmaze-umaze-tcn-64/identity.json",
        "stores/pointmaze-umaze/tcn-64.zarr/zarr.json",
    ):
        one, other = (json.loads((folder / name).read_text().replace(str(folder), "")) for folder in (home, commands))
        for seal in ("checksum", "consolidated"):
            one.get("attributes", {}).pop(seal, None), other.get("attributes", {}).pop(seal, None)
        assert one == other
    (theirs,) = commands.glob("runs/*/plan-*/results.json")
    assert result.path.relative_to(home) == theirs.parent.relative_to(commands)
    one, other = (
        {name: value for name, value in values.items() if name not in TIMED}
        for values in (json.loads((result.path / "results.json").read_text()), json.loads(theirs.read_text()))
    )
    assert one == other
    assert fitted.weights == home / "encoders/pointmaze-umaze-tcn.safetensors"
    files = fitted.weights, commands / fitted.weights.relative_to(home)
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert read_fit(files[0]) == read_fit(files[1])
    assert len(store) == data.card.frames == 240


def test_what_the_calls_return(calls: tuple[Any, ...]) -> None:
    data, _, store, run, result = calls
    assert isinstance(data, wmcache.FrameDataset)
    assert isinstance(store, wmcache.TokenStore)
    assert run.config["model"] == "dino-wm"
    assert run.validation.keys() == {f"skill_{k}" for k in range(1, 6)}
    assert run.load("cpu").shape.token_dim == store.card.token_dim
    low, high = result.success_interval
    assert low <= result.success_rate <= high
    assert result.success_rate == result.values["successes"] / result.episodes
    assert result.report.read_text().count(f"wmcache.plan(run=&#39;{run.path}&#39;, episodes=2") == 1
    with pytest.raises(wmcache.UserError, match="success_rate"):
        _ = result.mean_return


def test_a_call_continues_where_it_stopped_and_a_finished_one_changes_nothing(
    calls: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copytree(calls[0].path.parent, tmp_path / "home", symlinks=True)
    monkeypatch.setenv("WMCACHE_HOME", str(home))
    whole = files_of(home)
    for lost in ("pointmaze-umaze/frames-000001.tar", "stores/pointmaze-umaze/tcn-64.zarr/tokens/c.2.0.0"):
        (home / lost).unlink()
    times = {file: file.stat().st_mtime_ns for file in home.rglob("*.tar")}
    call_all(plans=False)
    assert files_of(home) == whole
    assert {file: file.stat().st_mtime_ns for file in times} == times
    run = wmcache.train(home / "stores/pointmaze-umaze/tcn-64.zarr", **{**TRAIN, "steps": 6}, resume=True)
    assert (run.path / "checkpoints/last/model.safetensors").resolve().parent.name == "step-00000006"


COMMANDS = {
    "collect": (main.commands["collect"], {}),
    "fit": (main.commands["fit"], {"data": "datasets", "store": "cache"}),
    "extract": (main.commands["extract"], {"data": "dataset", "change_maps": "frameskip"}),
    "train": (wmtrain, {"store": "caches"}),
    "plan": (wmplan, {"store": "cache"}),
}
"""Call -> its command, and {parameter: the command's name of it}."""
WITHOUT_CALL = {"part", "dry_run", "devices", "untrained", "version"}
OF_CALL = {"model_options", "encoder_options", "search"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_has_the_parameters_and_defaults_of_its_command(name: str) -> None:
    command, renamed = COMMANDS[name]
    options = {param.name: param for param in command.params if "--json" not in param.opts}
    parameters = inspect.signature(getattr(wmcache, name)).parameters
    assert {renamed.get(own, own) for own in parameters} - OF_CALL == set(options) - WITHOUT_CALL
    for own, parameter in parameters.items():
        if own not in OF_CALL and parameter.default is not inspect.Parameter.empty:
            theirs = options[renamed.get(own, own)].to_info_dict()["default"]
            assert parameter.default == (None if theirs == [] else theirs), own


def test_presets_and_protocols_are_those_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []

    def receive(*arguments: Any, **_: Any) -> None:
        received.append(arguments[-1])
        raise wmcache.UserError("received")

    monkeypatch.setattr("wmcache.trainer.train.train", receive)
    monkeypatch.setattr("wmcache.planner.plan.plan_run", receive)
    for preset in PRESETS:
        with pytest.raises(wmcache.UserError, match="received"):
            wmcache.train("x.zarr", preset=preset, history=2)
        CliRunner().invoke(wmtrain, ["--cache", "x.zarr", "--preset", preset, "--history", "2"])
        own, theirs = received[-2:]
        from wmcache.trainer.models import read_options

        assert read_options(own.model, own.model_options) == read_options(theirs.model, theirs.model_options)
        assert vars(own) | {"model_options": None} == vars(theirs) | {"model_options": None}
    for protocol in PROTOCOLS:
        with pytest.raises(wmcache.UserError, match="received"):
            wmcache.plan("run", protocol=protocol, budget=7, search={"samples": 9})
        CliRunner().invoke(wmplan, ["--run", "run", "--protocol", protocol, "--budget", "7", "--samples", "9"])
        assert received[-2] == received[-1]
    assert options_in({"lr": 1e-3, "decay-all": True, "width": 3}, type(own)) == {
        "learning_rate": 1e-3,
        "decay_all": True,
    }


@pytest.mark.parametrize(
    ("call", "arguments", "named"),
    [
        ("collect", {"env": "no-such-env"}, "--env"),
        ("collect", {"episodes": 0}, "--episodes"),
        ("collect", {"distract_seed": 3}, "--distract"),
        ("fit", {"data": "nowhere"}, "nowhere"),
        ("extract", {"data": "nowhere"}, "nowhere"),
        ("extract", {"encoder": "tcn,dinov2"}, "--encoder"),
        ("extract", {"batch": 0}, "--batch-size"),
        ("train", {"store": "nowhere.zarr"}, "nowhere.zarr"),
        ("train", {"store": "x.zarr", "learning_rate": -1.0}, "--lr"),
        ("train", {"store": "x.zarr", "steps": 2, "epochs": 2}, "--epochs"),
        ("train", {"store": "x.zarr", "preset": "dino"}, "dino-wm"),
        ("train", {"store": "x.zarr", "out": "s3://bucket/run"}, "s3://bucket/run"),
        ("plan", {"run": "nowhere"}, "nowhere"),
        ("plan", {"run": "nowhere", "search": {"samples": 2}, "solver": "no-such"}, "no-such"),
        ("plan", {"run": "nowhere", "cluster": "nothing"}, "nothing"),
    ],
)
def test_a_mistake_is_a_user_error(
    call: str, arguments: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(wmcache.UserError) as caught:
        getattr(wmcache, call)(**arguments)
    assert named in str(caught.value)
    assert not list(tmp_path.rglob("*"))


def test_an_unknown_keyword_or_name_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="wdith"):
        wmcache.train("x.zarr", wdith=3)
    with pytest.raises(AttributeError, match="nothing"):
        _ = wmcache.nothing
    assert {*wmcache.__all__} <= {*dir(wmcache)}
    assert all(inspect.getdoc(getattr(api, name)) for name in COMMANDS)


IMPORT = "import json, sys, wmcache; print(json.dumps(sorted(sys.modules)))"


def test_importing_the_package_is_quick() -> None:
    modules = json.loads(subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True).stdout)
    assert [name for name in modules if name.startswith("wmcache.")] == []
    assert {"torch", "numpy", "mujoco", "zarr", "click"} & set(modules) == set()


def test_several_stores_are_read_as_one(calls: tuple[Any, ...], tmp_path: Path) -> None:
    data, *_ = calls
    more = wmcache.collect(episodes=3, length=40, image_size=32, seed=1, cluster="local:1", out=tmp_path / "more")
    weights = calls[1].weights
    stores = [
        wmcache.extract(one, weights=weights, device="cpu", out=tmp_path / f"{n}.zarr")
        for n, one in enumerate((data, more))
    ]
    run = wmcache.train(stores, out=tmp_path / "run", **TRAIN)
    assert run.config["cache"] == [str(store.path) for store in stores]
    assert np.isfinite(stores[1].gather(np.arange(120))).all()
