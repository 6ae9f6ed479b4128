from __future__ import annotations

import numpy as np
import pytest
from wmcache.study.statistics import compare, holm, mcnemar, rank


def solved(*episodes: int) -> dict[int, np.ndarray]:
    return {0: np.array(episodes, bool)}


def test_mcnemar_is_a_fair_coin_on_the_episodes_that_one_alone_solved() -> None:
    # 1 of 8 heads or rarer, on both sides: 2 * (1 + 8) / 256
    assert mcnemar(1, 7) == pytest.approx(18 / 256)
    assert mcnemar(7, 1) == mcnemar(1, 7)
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_encoders_are_compared_over_the_same_episodes_of_all_their_seeds() -> None:
    a = {0: np.array([1, 1, 0], bool), 1: np.array([1, 0, 1], bool), 2: np.ones(3, bool)}
    b = {0: np.array([0, 1, 1], bool), 1: np.array([0, 0, 0], bool)}
    (pair,) = compare({"a": a, "b": b})
    assert (pair.episodes, pair.only_first, pair.only_second) == (6, 3, 1)
    assert pair.p == mcnemar(3, 1)


def test_only_differences_that_survive_the_correction_are_real() -> None:
    good, middling, bad = solved(*[1] * 20), solved(*[1] * 14, *[0] * 6), solved(*[0] * 20)
    pairs = {(pair.first, pair.second): pair for pair in compare({"good": good, "middling": middling, "bad": bad})}
    assert pairs["good", "middling"].p < 0.05
    assert not compare({"good": good, "middling": solved(*[1] * 15, *[0] * 5)})[0].real
    assert pairs["good", "bad"].real
    assert pairs["good", "middling"].adjusted == pairs["good", "middling"].p  # the largest of the three
    assert pairs["good", "bad"].adjusted == pytest.approx(3 * pairs["good", "bad"].p)


def test_a_group_holds_what_cannot_be_told_from_its_best() -> None:
    reached = {"bad": solved(*[0] * 20), "good": solved(*[1] * 20), "fair": solved(*[1] * 19, 0)}
    assert rank(reached, compare(reached)) == [["good", "fair"], ["bad"]]
