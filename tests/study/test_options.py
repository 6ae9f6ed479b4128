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
        assert entry.fit or entry.spec.source.startswith(("no weights", "random")), choice.name
    assert [plan.name for plan in options.plan] == ["mpc-100", "open-loop-lite"]


def test_a_protocol_gives_defaults_and_what_stands_beside_it_wins(tmp_path: Path) -> None:
    options = read(tmp_path, TCN + '[[plan]]\nprotocol = "open-loop"\nbudget = 25\nsamples = 50\n')
    (plan,) = options.plan
    assert (plan.options.horizon, plan.options.budget) == (6, 25)
    assert plan.options.search == {"samples": 50, "elites": 30, "iterations": 20, "sigma": 0.577}


def test_what_a_protocol_says_of_its_solver_is_no_word_on_another(tmp_path: Path) -> None:
    (plan,) = read(tmp_path, TCN + '[[plan]]\nprotocol = "open-loop"\nsolver = "gd"\n').plan
    assert plan.options.search == {
        "sigma": 0.577
    }  # gradient descent has candidates too, but neither elites nor samples


def test_a_dataset_that_is_named_is_not_collected(tmp_path: Path) -> None:
    text = "dataset = 'here'\n" + TCN + "[collect]\nepisodes = 3\n"
    assert read(tmp_path, text).collect is not None
    options = read(tmp_path, text, dataset="there")
    assert (options.dataset, options.collect) == ("there", None)


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
    ("text", "message"),
    [
        ("", r"no encoder to study; add \[\[encoders\]\]"),
        ("seeds = [", "study.toml cannot be read"),
        (TCN + "steps = 3\n", "encoder 1: no setting steps; there are base"),
        ("seedz = [1]\n" + TCN, "study.toml: no setting seedz; there are"),
        ("seeds = [-1]\n" + TCN, "study.toml: seeds.0: Input should be greater than or equal to 0"),
        ("seeds = []\n" + TCN, "study.toml: seeds: Tuple should have at least 1 item"),
        ("fractions = [0.0]\n" + TCN, "study.toml: fractions.0: Input should be greater than 0"),
        ("encoders = 3\n", "encoders is not a list of tables"),
        ("train = 3\n" + TCN, "train is not a table"),
        (TCN + "[train]\nsteps = '9'\n", "train: steps: Input should be a valid integer"),
        (TCN + "[train]\nseed = 1\n", "train: seed is the study's own; say seeds instead"),
        (TCN + "[train.model_options]\nwidht = 1\n", "widht"),
        (TCN + "fit = {step = 3}\n", "the fit of tcn has no option step; it has batch"),
        (TCN + "fit = {seed = 3}\n", "the fit's seed is the study's own"),
        (TCN + "fit = {steps = 3}\nweights = 'a'\n", "tcn has both weights and fit"),
        (TCN + "base = 'dinov2'\n", "tcn is no adapter; leave out its base"),
        (TCN + TCN, "two encoders are called 'tcn'; give each a label"),
        ("[[encoders]]\nname = 'tnc'\n", "no encoder 'tnc'; did you mean tcn"),
        (TCN + "[[plan]]\nprotocol = 'mpc'\n", "plan 1: no protocol 'mpc'; known are dino-wm"),
        (TCN + "[[plan]]\nsampels = 3\n", "plan 1: no setting sampels; there are"),
        (TCN + "[[plan]]\nsolver = 'cme'\n", "plan 1: no solver 'cme'"),
        (TCN + "[[plan]]\nexecute = 9\n", "--execute 9 is more than the --horizon"),
        (TCN + "[[plan]]\nsamples = '100'\n", "plan 1: samples: Input should be a valid integer"),
        (TCN + "[[plan]]\nsamples = 0\n", "samples"),
        (TCN + "[[plan]]\nprotocol = []\n", r"plan 1: protocol is \[\]; it must be a word"),
        (TCN + "[[plan]]\nsolver = {}\n", r"plan 1: solver is \{\}; it must be a word"),
        (TCN + "[[plan]]\nname = 3\n", "plan 1: name is 3; it must be a word"),
        (TCN + "[[plan]]\nseed = -1\n", "plan 1: seed is -1; it must be 0 or more"),
        (TCN + "fit = {steps = '400'}\n", "the fit of tcn"),
        (TCN + "fit = {steps = 0}\n", "the fit of tcn"),
        (TCN + "label = 1979-05-27\n", "encoder 1 has a date, which no setting is"),
        (TCN + "[train]\nframeskip = -5\n", "train: frameskip is -5; it must be above 0"),
        (TCN + "lag = -3\n", "encoder 1: lag: Input should be greater than 0"),
        (TCN + "image_size = 0\n", "encoder 1: image_size: Input should be greater than 0"),
        (TCN + "store_dtype = 'int4'\n", "encoder 1: store_dtype: Input should be 'float16' or 'int8'"),
        (TCN + "base_weights = 'a'\n", "tcn is no adapter; leave out its base"),
        ("others = []\n" + TCN, "no setting others"),
        (TCN + "[collect]\nseed = -1\n", "collect: seed: Input should be greater than or equal to 0"),
        (TCN + "[train]\nlearning_rate = nan\n", "train: learning_rate is nan; it must be a finite number"),
        (TCN + "[[plan]]\nprotocol = 'mpc-100'\nthreshold = inf\n", "plan 1: threshold is inf; it must be a finite"),
        (TCN + "[[plan]]\n[[plan]]\n", "two plans are called 'plan'; give each a name"),
    ],
)
def test_a_study_that_makes_no_sense_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_study_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.toml does not exist; write it"):
        read_study(tmp_path / "nothing.toml")
