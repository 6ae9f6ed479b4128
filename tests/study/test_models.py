"""Studies of several models: a real one from end to end, what its cells share, and settings that are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from wmcache.common.errors import UserError
from wmcache.study import cells, run
from wmcache.study.branches import Branch, make_branches
from wmcache.study.options import read_study
from wmcache.study.statistics import sign_flip

from .conftest import ADAPTER
from .conftest import run as run_command

STUDY = """
probe_frames = 100
device = "cpu"
dataset = {dataset}

[train]
steps = 2
batch = 8
dtype = "float32"
model_options = {{ width = 16, depth = 1, heads = 2 }}

[[plan]]
protocol = "mpc-100"
episodes = 7
threshold = 1.0
strict = false
budget = 10
horizon = 2
samples = 8
elites = 2
iterations = 1
baselines = "random,zero,untrained,expert"
untrained_episodes = 4

[[plan]]
name = "gradients"
protocol = "mpc-100"
episodes = 2
budget = 10
horizon = 2
solver = "gd"
steps = 1
restarts = 2

[[encoders]]
name = "pixels"
label = "small frames"
image_size = 16

[[models]]
label = "transformer"

[[models]]
model = "rssm"
model_options = {{ deter = 16, hidden = 16, stoch = 4, layers = 1, sequence = 4 }}
evaluations = ["mpc-100"]
plan = {{ horizon = 3 }}

[[models]]
label = "rssm (actor)"
model = "rssm"
model_options = {{ deter = 16, hidden = 16, stoch = 4, layers = 1, sequence = 4 }}
[models.actor]
steps = 2
batch = 4
horizon = 2
units = 8
layers = 1

[[models]]
model = "gcbc"
model_options = {{ width = 16 }}
"""
BROKEN = """
[[models]]
label = "broken"
model = "ddp-wm"
model_options = { width = 16, depth = 1, heads = 2 }
"""
SYSTEMS = ("transformer", "rssm", "rssm (actor)", "gcbc")
EARLIER = "a8363e4e816062dd"
"""SHA-256 of all keys of a study without models, before there were any."""

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def file(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's file."""
    path = tmp_path_factory.mktemp("models") / "models.toml"
    path.write_text(STUDY.format(dataset=json.dumps(str(dataset_path))))
    return path


@pytest.fixture(scope="module")
def out(file: Path) -> Path:
    """The finished study; read only. What the command printed is in printed.txt."""
    folder = file.parent / "out"
    (file.parent / "printed.txt").write_text(run_command(file, folder).stdout)
    return folder


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, to be changed."""
    return copytree(out, tmp_path / "out", symlinks=True)


def results_of(out: Path) -> dict[str, Any]:
    """Key -> episodes that each plan reached."""
    return {path.name: json.loads(path.read_text())["result"]["reached"] for path in (out / "cells").glob("plan-*")}


def branches_of(file: Path, **flags: Any) -> dict[str, Branch]:
    """Label -> branch."""
    return {branch.label: branch for branch in make_branches(read_study(file, flags), "0" * 64)}


def test_the_cells_of_a_study_without_models_have_the_keys_that_they_had(write_study: Write, tmp_path: Path) -> None:
    branches = make_branches(read_study(write_study(tmp_path, more=ADAPTER)), "0" * 64)
    keys = list(dict.fromkeys(cell.key for branch in branches for cell in branch.cells()))
    assert hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16] == EARLIER


def test_a_model_with_the_settings_of_the_only_one_has_its_cells(write_study: Write, tmp_path: Path) -> None:
    alone = write_study(tmp_path)
    keys = [
        [cell.key for branch in make_branches(read_study(alone, flags), "0" * 64) for cell in branch.cells()]
        for flags in ({}, {"models": ("dino-wm",)})
    ]
    assert keys[0] == keys[1]


def test_a_study_of_models_is_done_from_start_to_report(out: Path) -> None:
    stages = [path.name.split("-")[0] for path in (out / "cells").iterdir()]
    # The two systems of rssm share a training; untrained is each model's own, and the expert is of no model.
    wanted = {"extract": 1, "probe": 1, "train": 3, "actor": 1, "plan": 5 + 3 + 1}
    assert {stage: stages.count(stage) for stage in wanted} == wanted
    rows = pq.read_table(out / "study.parquet").to_pylist()
    acts = [(row["system"], row["protocol"]) for row in rows]
    assert sorted(acts) == sorted([*((name, "mpc-100") for name in SYSTEMS), ("transformer", "gradients")])
    by_name = {row["system"]: row for row in rows if row["protocol"] == "mpc-100"}
    for name, row in by_name.items():
        assert row["failed"] is None
        assert (row["model_parameters"], row["train_seconds"], row["seconds_per_replan"]) > (0, 0, 0)
        assert row["operations_per_decision"] > 0
        assert all(0 <= row[f"successes_{at}"] <= 7 for at in (0.5, 0.25, 0.1))
        assert (row["skill_1"] is None) is (name == "gcbc")
        assert row["untrained_episodes"] == (None if name == "rssm (actor)" else 4)
        assert (row["actor_seconds"] is None) is (row["untrained_held"] is not None) is (name != "rssm (actor)")
    assert [row["expert_successes"] for row in by_name.values()].count(None) == len(SYSTEMS) - 1
    assert by_name["rssm"]["train_seconds"] == by_name["rssm (actor)"]["train_seconds"]


def test_all_models_are_tried_on_the_same_starts_and_goals(out: Path) -> None:
    tables = [pq.read_table(path) for path in (out / "plans").glob("*/episodes.parquet")]
    for column in ("start", "goal"):
        values = [np.array(table[column].to_pylist()) for table in tables]
        assert {len(value) for value in values} == {2, 4, 7}
        longest = max(values, key=len)
        assert all(np.array_equal(longest[: len(value)], value) for value in values)


def test_models_are_compared_by_paired_tests(out: Path, file: Path) -> None:
    printed = json.loads(run_command(file, out, "--json").stdout)
    pairs = printed["mpc-100"]["pairs"]
    assert len(pairs) == 6
    assert printed["gradients"]["pairs"] == []
    reached = {row["system"]: row for row in printed["rows"] if row["protocol"] == "mpc-100"}
    assert {pair["first"] for pair in pairs} | {pair["second"] for pair in pairs} == set(reached)
    plans = {
        json.loads(path.read_text())["label"]: json.loads(path.read_text()) for path in (out / "cells").glob("plan-*")
    }
    solved = {
        name: np.array(cell["result"]["reached"]["1.0"])
        for name in SYSTEMS
        for label, cell in plans.items()
        if label.startswith(f"mpc-100 {name}, seed")
    }
    for pair in pairs:
        difference = solved[pair["first"]] - solved[pair["second"]]
        assert (pair["first_ahead"], pair["second_ahead"]) == ((difference > 0).sum(), (difference < 0).sum())
        assert pair["p"] == sign_flip(difference)


def test_the_table_and_the_page_show_models_in_place_of_encoders(out: Path, file: Path) -> None:
    printed = (file.parent / "printed.txt").read_text().splitlines()
    assert max(map(len, printed)) <= 120
    for name in (*SYSTEMS, "random actions", "expert actions"):
        assert any(line.startswith(name) for line in printed)
    page = (out / "study.html").read_text()
    success = page.partition("<h2>Success")[2].partition("<h2>Models")[0]
    assert all(f"<td>{name}</td>" in success for name in SYSTEMS)
    assert "<td>small frames</td>" not in success
    assert page.count("<td>small frames</td>") == 3  # probes, costs and representations, each once


def test_a_study_of_models_that_is_killed_goes_on(file: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, stamps = results_of(copy), {path: path.stat().st_mtime_ns for path in (copy / "cells").iterdir()}
    lost = [path for path in stamps if path.name.startswith(("actor", "plan"))]
    for path in lost:
        path.unlink()
    left = iter(range(3))

    def do_and_die(space: cells.Workspace, cell: cells.Cell, **settings: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        cells.do_cell(space, cell, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(run, "do_cell", do_and_die)
        run_command(file, copy, status=130)
    run_command(file, copy)
    assert results_of(copy) == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path not in lost)
    after = {path: path.stat().st_mtime_ns for path in stamps}
    moved = copy.rename(copy.with_name("moved"))
    run_command(file, moved)
    assert {moved / path.relative_to(copy): stamp for path, stamp in after.items()} == {
        path: path.stat().st_mtime_ns for path in (moved / "cells").iterdir()
    }


def test_a_model_that_fails_leaves_the_others(file: Path, copy: Path, tmp_path: Path) -> None:
    before = results_of(copy)
    broken = tmp_path / "broken.toml"
    broken.write_text(
        file.read_text()
        + '\n[[models]]\nlabel = "broken"\nmodel = "ddp-wm"\nmodel_options = { width = 16, depth = 1, heads = 2 }\n'
    )
    result = run_command(broken, copy, status=1)  # it needs change maps
    assert results_of(copy) == before
    rows = pq.read_table(copy / "study.parquet").to_pylist()
    assert {row["system"] for row in rows if row["failed"]} == {"broken"}
    assert any(line.startswith("broken") and "- " in line for line in result.stdout.splitlines())
    assert "<td>broken</td>" in (copy / "study.html").read_text()


def test_the_page_of_one_model_has_only_what_there_is(file: Path, copy: Path) -> None:
    before = results_of(copy)
    run_command(file, copy, "--models", "gcbc")  # no actor, no rollouts
    page = (copy / "study.html").read_text()
    assert "<td>gcbc</td>" in page
    assert "<td>transformer</td>" not in page
    assert before.items() <= results_of(copy).items()


def test_a_part_of_the_models_can_be_studied_and_others_by_their_defaults(file: Path) -> None:
    options = read_study(file, {"models": ("rssm (actor)", "gcbc", "mdn-rnn"), "steps": 7})
    assert [(choice.label, choice.train.model, choice.train.steps) for choice in options.models] == [
        ("rssm (actor)", "rssm", 7),
        ("gcbc", "gcbc", 7),
        ("mdn-rnn", "mdn-rnn", 7),
    ]
    assert [choice.actor and choice.actor.steps for choice in options.models] == [7, None, None]
    # By the model's name: both of its systems.
    assert [choice.label for choice in read_study(file, {"models": ("rssm",)}).models] == ["rssm"]
    assert options.models[2].train.batch == 8  # of [train], whose model_options are another model's
    assert "width" not in options.models[2].train.model_options


@pytest.mark.parametrize(
    ("encoders", "models", "what", "labels"),
    [
        (("pixels",), (), "model", list(SYSTEMS)),
        (("pixels", "tcn"), ("gcbc",), "representation", ["small frames", "tcn"]),
        (("tcn",), ("gcbc",), "model", ["gcbc"]),
        (
            ("pixels", "tcn"),
            ("gcbc", "rssm"),
            "system",
            ["gcbc on small frames", "rssm on small frames", "gcbc on tcn", "rssm on tcn"],
        ),
    ],
)
def test_systems_are_named_by_what_differs(
    file: Path, encoders: tuple[str, ...], models: tuple[str, ...], what: str, labels: list[str]
) -> None:
    options = read_study(file, {"encoder": encoders, "models": models})
    assert (options.what, [label for label, _, _ in options.systems]) == (what, labels)


def test_a_models_own_plan_wins_and_leaves_the_episodes(file: Path, tmp_path: Path) -> None:
    text = (
        file.read_text()
        + '\n[[models]]\nmodel = "td-mpc2"\nevaluations = ["mpc-100"]\nplan = { protocol = "td-mpc2", horizon = 1 }\n'
    )
    own = tmp_path / "own.toml"
    own.write_text(text)
    found = branches_of(own)
    plain, rssm, planner = (found[name].plan[1.0, "mpc-100"].settings for name in ("transformer", "rssm", "td-mpc2"))
    assert (plain["horizon"], rssm["horizon"], planner["horizon"]) == (2, 3, 1)
    assert (rssm["search"], planner["solver"]) == (plain["search"], "mppi")
    assert {settings["episodes"] for settings in (plain, rssm, planner)} == {7}
    assert {settings["budget"] for settings in (plain, rssm, planner)} == {10}
    assert found["transformer"].train[1.0].key != found["rssm"].train[1.0].key == found["rssm (actor)"].train[1.0].key


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("frameskip = 2", "model 1.*frameskip.*train"),
        ("seed = 2", "model 1.*seed.*seeds"),
        ("stepz = 2", "model 1.*stepz.*steps"),
        ("model_options = { widht = 1 }", "model 1.*widht.*width"),
        ('model = "dino"', "model 1.*'dino'.*dino-wm"),
        ("plan = { episodes = 3 }", r"model 1: plan.*episodes.*\[\[plan\]\]"),
        ('evaluations = ["gradient"]', "model 1.*'gradient'.*gradients"),
        ("evaluations = []", "model 1: evaluations"),
        ("actor = { }", "model 1.*actor.*dino-wm.*rssm"),
        ('model = "rssm"\nmodel_options = { }\nactor = { seed = 1 }', "model 1: actor.*seed"),
        ('model = "gcbc"\nplan = { execute = 2 }', "model 1.*mpc-100.*execute"),
        ('label = "gcbc"', "'gcbc'"),
    ],
)
def test_a_bad_setting_of_a_model_is_one_line_that_names_it(file: Path, tmp_path: Path, more: str, named: str) -> None:
    bad = tmp_path / "bad.toml"
    label = "" if more.startswith("label") else 'label = "transformer"\n'
    bad.write_text(file.read_text().replace('label = "transformer"\n', f"{label}{more}\n", 1))
    with pytest.raises(UserError, match=named) as caught:
        read_study(bad)
    assert "\n" not in str(caught.value)


def test_a_baseline_that_sees_frames_is_refused(file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(file.read_text().replace("untrained,expert", "mpc", 1))
    with pytest.raises(UserError, match=r"plan 1: baselines.*mpc"):
        read_study(bad)
