"""Which differences between encoders are real: paired tests over the same planning episodes.

What is assumed: the unit is the episode. Episode n has the same start, goal and search noise for every encoder, so two encoders are
compared by the episodes that one solved and the other did not (McNemar 1947, exact). Seeds of fit and training are pooled: with several,
episode n of each seed counts as an episode of its own, which takes the seeds' common starts and goals for independent. With one seed the
tests speak of the world models that were trained, and say nothing about what training again would have given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

LEVEL = 0.05

Reached = Mapping[str, Mapping[int, NDArray[np.bool_]]]
"""Encoder -> seed -> which episodes were solved, [episodes]."""


@dataclass(frozen=True)
class Pair:
    """Two encoders over the same episodes.

    Attributes:
        first, second: their labels.
        episodes: that both were tried on.
        only_first, only_second: solved by one of them alone.
        p: of the exact McNemar test. adjusted: by Holm, over all pairs.
        real: whether they differ at the level of 5 %.
    """

    first: str
    second: str
    episodes: int
    only_first: int
    only_second: int
    p: float
    adjusted: float
    real: bool


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact McNemar test: the two-sided p of that many discordant episodes under a fair coin; 1 where there are none."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the k-th smallest of m times m - k + 1, never falling, at most 1."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, values[place] * (len(values) - rank)))
        adjusted[place] = highest
    return adjusted


def compare(reached: Reached) -> list[Pair]:
    """Every pair of encoders, over the seeds that both have."""
    found = []
    for first, second in itertools.combinations(reached, 2):
        if seeds := [seed for seed in reached[first] if seed in reached[second]]:
            a, b = (np.concatenate([reached[name][seed] for seed in seeds]) for name in (first, second))
            found.append((first, second, len(a), int((a & ~b).sum()), int((b & ~a).sum())))
    values = [mcnemar(only_first, only_second) for *_, only_first, only_second in found]
    adjusted = holm(values)
    return [
        Pair(*pair, p, p_adjusted, p_adjusted < LEVEL)
        for pair, p, p_adjusted in zip(found, values, adjusted, strict=True)
    ]


def rank(reached: Reached, pairs: Sequence[Pair]) -> list[list[str]]:
    """Groups, the best first: the encoder of the highest success among those left, and all that do not differ from it for certain."""
    differ = {frozenset((pair.first, pair.second)) for pair in pairs if pair.real}
    rates = {name: np.concatenate(list(seeds.values())).mean() for name, seeds in reached.items() if seeds}
    left = sorted(rates, key=lambda name: -rates[name])
    groups = []
    while left:
        groups.append([name for name in left if frozenset((left[0], name)) not in differ])
        left = [name for name in left if name not in groups[-1]]
    return groups
