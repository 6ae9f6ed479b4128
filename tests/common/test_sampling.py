"""Farthest points and steepest descent over finite sets."""

from __future__ import annotations

import numpy as np
import torch

from wmcache.common.sampling import descend, farthest_points


def test_each_point_is_the_farthest_from_those_before() -> None:
    points = torch.tensor([0.0, 1.0, 10.0, 4.0, 9.0])
    assert farthest_points(lambda i: (points - points[i]).abs(), 5) == [0, 2, 3, 1, 4]
    assert farthest_points(lambda i: (points - points[i]).abs(), 2, first=3) == [3, 2]


def test_points_at_a_negative_distance_are_not_chosen() -> None:
    points = torch.tensor([0.0, 1.0, 10.0, 4.0])
    excluded = torch.tensor([False, False, True, False])
    assert farthest_points(lambda i: (points - points[i]).abs().where(~excluded, -1.0), 3) == [0, 3, 1]


def test_descent_ends_at_points_without_a_lower_neighbour() -> None:
    values = np.array([3.0, 2.0, 1.0, 2.0, 1.5, 0.0])
    near = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) <= 1
    assert descend(values, near).tolist() == [2, 2, 2, 2, 5, 5]
    near[4, 5] = near[5, 4] = False
    assert descend(values, near).tolist() == [2, 2, 2, 2, 4, 5]
