"""Descriptions of named columns, and columns joined by role."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from wmcache.common.columns import (
    Column,
    action_bounds,
    default_columns,
    described_in_json,
    join_role,
    require_columns,
)
from wmcache.common.schema import adapter_of

ACTION = Column(("action",), "float32", (2,), (-2.0, 0.0), (2.0, 1.0))


def test_a_description_is_the_same_after_json_and_the_default_is_left_out() -> None:
    columns = {"push": ACTION, "on": Column(("extra",), "bool"), "grid": Column(("state", "proprio"), "int32", (2, 3))}
    written = json.dumps(described_in_json(columns)["columns"])
    assert adapter_of(dict[str, Column]).validate_json(written, strict=True) == columns
    assert described_in_json(default_columns(2, 4)) == described_in_json(None) == {}
    assert described_in_json({}) == {"columns": {}}
    assert described_in_json({**default_columns(2, 4), "push": ACTION})


@pytest.mark.parametrize(
    "values",
    [
        {"roles": ()},
        {"roles": ("action", "action")},
        {"shape": (0,)},
        {"shape": (4097,)},
        {"roles": ("reward",), "shape": (2,)},
        {"low": (0.0, 0.0)},
        {"low": (0.0,), "high": (1.0,)},
        {"low": (0.0, 2.0), "high": (1.0, 1.0)},
    ],
)
def test_a_description_that_contradicts_itself_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Column(**{"roles": ("action",), "dtype": "float32", "shape": (2,), **values})


@pytest.mark.parametrize(
    "columns",
    [
        {"episode": ACTION},
        {"../x": ACTION},
        {"": ACTION},
        {"push": ACTION, "Push": ACTION},
        {"push": ACTION, "a": Column(("reward",), "float32"), "b": Column(("reward",), "float32")},
    ],
)
def test_columns_that_no_store_can_have_are_refused(columns: dict[str, Column]) -> None:
    with pytest.raises(ValueError, match=r"."):
        require_columns(columns)


def test_columns_of_a_role_are_joined_in_the_order_of_their_names() -> None:
    columns = {
        "turn": Column(("action",), "float64"),
        "push": ACTION,
        "grid": Column(("state", "proprio"), "int32", (2, 2)),
    }
    rng = np.random.default_rng(0)
    arrays = {"turn": rng.normal(size=5), "push": rng.normal(size=(5, 2)).astype(np.float32)}
    arrays["grid"] = np.arange(20, dtype=np.int32).reshape(5, 2, 2)
    action = join_role(arrays, columns, "action", "float32")
    assert action is not None
    assert action.dtype == np.float32
    np.testing.assert_array_equal(action, np.column_stack([arrays["push"], arrays["turn"]]).astype(np.float32))
    np.testing.assert_array_equal(join_role(arrays, columns, "state"), arrays["grid"].reshape(5, 4))
    assert join_role(arrays, columns, "reward") is None
    low, high = action_bounds(arrays, columns)
    np.testing.assert_array_equal(low, np.float32([-2, 0, arrays["turn"].min()]))
    np.testing.assert_array_equal(high, np.float32([2, 1, arrays["turn"].max()]))
