"""Comparison of encoders over the same episodes: exact tests, their correction, and groups."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from wmcache.planner.judge import wilson
from wmcache.study.statistics import (
    compare,
    episodes_needed,
    holm,
    interval,
    rank,
    separated,
    sign_flip,
    smallest_p,
)


def solved(*episodes: int) -> dict[int, np.ndarray]:
    return {0: np.array(episodes, bool)}


@pytest.mark.parametrize(("first", "second"), [(1, 7), (7, 1), (0, 0)])
def test_with_one_seed_the_sign_flip_is_the_exact_mcnemar_test(first: int, second: int) -> None:
    differences = np.array([1] * first + [-1] * second + [0] * 5)
    discordant = first + second
    assert sign_flip(differences) == pytest.approx(binomtest(first, discordant).pvalue if discordant else 1.0)


def test_the_sign_flip_agrees_with_all_signs_tried() -> None:
    differences = np.array([3, -1, 2, 0, 2, 1, -1, 3])
    zeros = np.zeros_like(differences)
    tried = permutation_test(
        (differences, zeros), lambda a, b: (a - b).sum(), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(differences) == pytest.approx(tried.pvalue)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_encoders_are_compared_over_the_same_episodes_of_the_seeds_that_both_have() -> None:
    a = {0: np.array([1, 1, 0], bool), 1: np.array([1, 0, 1], bool), 2: np.ones(3, bool)}
    b = {0: np.array([0, 1, 1], bool), 1: np.array([0, 0, 0], bool)}
    (pair,) = compare({"a": a, "b": b})
    assert (pair.episodes, pair.seeds, pair.first_ahead, pair.second_ahead) == (3, 2, 1, 0)
    assert pair.p == 1.0


def test_seeds_that_repeat_each_other_are_no_more_evidence() -> None:
    a, b = np.array([1] * 5 + [0] * 15, bool), np.zeros(20, bool)
    once = compare({"a": {0: a}, "b": {0: b}})[0]
    often = compare({"a": dict.fromkeys(range(5), a), "b": dict.fromkeys(range(5), b)})[0]
    assert often.p == once.p == pytest.approx(2 / 2**5)
    assert not often.real


def test_only_differences_that_survive_the_correction_are_real() -> None:
    good, middling, bad = solved(*[1] * 20), solved(*[1] * 14, *[0] * 6), solved(*[0] * 20)
    pairs = {(pair.first, pair.second): pair for pair in compare({"good": good, "middling": middling, "bad": bad})}
    assert pairs["good", "middling"].p < 0.05
    assert not compare({"good": good, "middling": solved(*[1] * 15, *[0] * 5)})[0].real
    assert pairs["good", "bad"].real
    assert pairs["good", "middling"].adjusted == pairs["good", "middling"].p  # the largest of the three
    assert pairs["good", "bad"].adjusted == pytest.approx(3 * pairs["good", "bad"].p)


def test_a_group_is_what_does_not_differ_from_its_best() -> None:
    reached = {"bad": solved(*[0] * 20), "good": solved(*[1] * 20), "fair": solved(*[1] * 19, 0)}
    pairs = compare(reached)
    assert rank(reached, pairs) == [["good", "fair"], ["bad"]]
    assert separated(reached, pairs) == (None, ["bad"])
    del reached["fair"]
    assert separated(reached, compare(reached)) == ("good", ["bad"])


@pytest.mark.parametrize(
    ("encoders", "episodes", "enough"), [(2, 5, False), (2, 6, True), (8, 10, False), (8, 11, True)]
)
def test_too_few_episodes_separate_nothing_whatever_they_show(encoders: int, episodes: int, enough: bool) -> None:
    # The largest difference that there can be.
    reached = {f"good {n}": solved(*[1] * episodes) for n in range(encoders - 1)} | {"none": solved(*[0] * episodes)}
    pairs = compare(reached)
    assert min(pair.adjusted for pair in pairs) == pytest.approx(smallest_p(pairs))
    assert (smallest_p(pairs) < 0.05) is enough
    assert (episodes >= episodes_needed(pairs)) is enough
    assert any(pair.real for pair in pairs) is enough
    assert bool(rank(reached, pairs)) is enough
    assert separated(reached, pairs)[1] == (["none"] if enough else [])


@pytest.mark.parametrize(("successes", "episodes"), [(0, 8), (19, 50)])
def test_the_interval_of_seeds_that_agree_is_that_of_so_many_episodes(successes: int, episodes: int) -> None:
    rate = successes / episodes
    for seeds in (1, 3):
        assert interval([rate] * seeds, episodes) == pytest.approx(wilson(successes, episodes), abs=1e-12)


def test_seeds_that_differ_make_the_interval_wider() -> None:
    widths = [high - low for low, high in (interval([0.5 - d, 0.5, 0.5 + d], 50) for d in (0, 0.1, 0.2, 0.4))]
    assert widths == sorted(widths)
    assert widths[0] < 0.3 < 0.8 < widths[-1]


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_the_interval_covers_the_mean_over_all_seeds_and_episodes(spread: float) -> None:
    # Success of a seed on an episode has log odds that are a sum of both.
    rng = np.random.default_rng(0)
    everywhere = rng.normal(0.5, 1, 10**6) + rng.normal(0, spread, 10**6)
    true, covered = (1 / (1 + np.exp(-everywhere))).mean(), 0
    for _ in range(500):
        odds = rng.normal(0.5, 1, 50) + rng.normal(0, spread, (3, 1))
        low, high = interval((rng.random((3, 50)) < 1 / (1 + np.exp(-odds))).mean(1).tolist(), 50)
        covered += low <= true <= high
    assert covered >= 0.9 * 500
