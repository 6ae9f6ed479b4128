"""Folders of results: every evaluation has its own, by a name that stays the same."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from wmcache.planner.options import PlanOptions, default_out
from wmcache.planner.protocols import PROTOCOLS

OTHER_VALUES: dict[str, list[Any]] = {
    "episodes": [5, 500],
    "budget": [5, 1000],
    "threshold": [0.3, 0.31],
    "goals": ["dataset", "random-action"],
    "goal_steps": [3, 30],
    "judge_columns": ["state", "state,proprio", "state:0-1", "state:1"],
    "model_temperature": [0.5, 1.0],
    "draw": [True],
    "strict": [True, False],
    "min_distance": [1.5, 2.0],
    "policy": ["expert", "zero"],
    "subgoals": ["none"],
    "horizon": [7, 70],
    "execute": [2, 3],
    "objective": ["last", "all"],
    "distance": ["graph"],
    "alpha": [0.1, 1.0],
    "mask": [True],
    "keep_tokens": [0.25, 0.5],
    "proprio": ["none"],
    "context": [2, 4],
    "observed": [2, 3],
    "solver": ["gd", "icem", "mppi"],
    "batch": [1, 10],
    "seed": [1, 10],
    "env": ["Medium", "Large", "wmcache/PointMaze-Large-v0"],
    "device": ["cpu", "cuda", "cuda:1"],
    "dtype": ["float32", "bfloat16"],
}
CHANGES: list[dict[str, Any]] = [
    {},
    *({name: value} for name, values in OTHER_VALUES.items() for value in values),
    *({"search": {name: value}} for name, value in (("samples", 32), ("samples", 320), ("steps", 7), ("lr", 0.7))),
    {"goals": "a/far.parquet"},
    {"goals": "b/far.parquet"},
    {"goals": "far"},
    {"env": "a/Spiral.txt"},
    {"env": "b/Spiral.txt"},
    {"horizon": 7, "seed": 5},
    {"horizon": 75},
]


def options_by(protocol: str | None, changed: dict[str, Any]) -> PlanOptions:
    """A protocol's options, and what is given beside it."""
    known = PROTOCOLS.get(protocol) if protocol else {}
    own = {name: value for name, value in known.items() if name in asdict(PlanOptions())}
    search = {name: value for name, value in known.items() if name not in own} | changed.get("search", {})
    return replace(PlanOptions(), **{**own, **changed, "search": search})


@pytest.mark.parametrize(
    ("protocol", "changed", "name"),
    [
        (None, {"objective": "last", "execute": 5}, "plan-last-x5-50x100"),
        (None, {"env": "wmcache/PointMaze-Medium-v0"}, "plan-all-x1-50x100-PointMaze-Medium-v0"),
        ("dino-wm", {"solver": "icem", "distance": "graph", "episodes": 8}, "plan-dino-wm-icem-graph-8x100"),
        (None, {"search": {"samples": 32, "optimiser": "adam"}}, "plan-all-x1-samples32-optimiser-adam-50x100"),
        (None, {"strict": False}, "plan-all-x1-no-strict-50x100"),
        ("dino-wm", {"execute": 2, "objective": "all"}, "plan-dino-wm-x2-all-50x100"),
        ("mpc-100", {}, "plan-mpc-100-50x100"),
        (None, {"horizon": 6, "seed": 50, "threshold": 1.0}, "plan-all-x1-threshold1.0-horizon6-seed50-50x100"),
        (None, {"device": "cuda:1"}, "plan-all-x1-device-cuda1-50x100"),
    ],
)
def test_names_stay_the_same(protocol: str | None, changed: dict[str, Any], name: str) -> None:
    assert default_out(Path("run"), protocol, options_by(protocol, changed)) == Path("run") / name


@pytest.mark.parametrize("protocol", [None, *PROTOCOLS])
def test_no_two_evaluations_share_a_folder(protocol: str | None) -> None:
    assert set(OTHER_VALUES) == set(asdict(PlanOptions())) - {"search", "baselines"}  # every option is tried
    usual = options_by(protocol, {})
    different = [options for change in CHANGES if (options := options_by(protocol, change)) != usual]
    names = {default_out(Path("run"), protocol, options).name for options in (usual, *different)}
    assert len(names) == 1 + len(different)
    assert max(map(len, names)) < 100
    every = replace(PlanOptions(), **{name: values[0] for name, values in OTHER_VALUES.items()})
    long = {default_out(Path("run"), None, options).name for options in (every, replace(every, env="Large"))}
    assert (len(long), max(map(len, long)) < 150) == (2, True)
