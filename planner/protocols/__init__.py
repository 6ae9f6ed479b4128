"""Protocols: named settings of an evaluation, of papers and of wmcache. An option that is given beside `--protocol` wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wmcache.common.registry import Registry

PROTOCOLS: Registry[Mapping[str, Any]] = Registry(
    "protocol", package="wmcache.planner.protocols", group="wmcache.protocols"
)
"""Name -> fields of PlanOptions and options of its solver."""

# Its sigma is the deviation of the data's actions, which is 1 / sqrt(3) for uniform ones.
DINO_WM_SEARCH: dict[str, Any] = {"solver": "cem", "samples": 300, "elites": 30, "sigma": 0.577}

# DINO-WM (conf/plan_point_maze.yaml, plan.py): each replan starts from one frame and executes its whole plan. The reference replans until
# all episodes succeed; here the budget is fixed. Starts and goals are any two random states: 15 % of them in the U-maze begin within 0.5.
DINO_WM: dict[str, Any] = (
    {"horizon": 5, "execute": 5, "objective": "last", "distance": "latent", "context": 3, "observed": 1}
    | {"budget": 100, "episodes": 50, "strict": False}
    | {**DINO_WM_SEARCH, "iterations": 10}
)
PROTOCOLS.register("dino-wm")(DINO_WM)
# PushT (conf/plan_pusht.yaml; the deviation of its actions is that of datasets/pusht_dset.py) and Wall (conf/plan_wall.yaml; its model has
# a history of 1, arXiv 2411.04983, table 11). Both weight proprio.
PROTOCOLS.register("dino-wm-pusht")(
    DINO_WM | {"goals": "dataset", "goal_steps": 25, "alpha": 1.0, "sigma": 0.2, "iterations": 30}
)
PROTOCOLS.register("dino-wm-wall")(DINO_WM | {"alpha": 1.0, "context": 1, "sigma": 0.42})
# A single plan: DINO-WM's "CEM" row (arXiv 2411.04983, table 8) and JEPA-WM's table 1, whose plan has 6 model steps.
PROTOCOLS.register("open-loop")(
    {"horizon": 6, "execute": 6, "objective": "last", "budget": 30, "strict": True}
    | {**DINO_WM_SEARCH, "iterations": 20}
)
# TD-MPC2 (tdmpc2/config.yaml), but that the temperature is relative to the costs of the elites, and the mean acts.
PROTOCOLS.register("td-mpc2")(
    {"horizon": 3, "execute": 1, "objective": "all", "budget": 100, "strict": True}
    | {"solver": "mppi", "samples": 512, "elites": 64, "iterations": 6, "proposals": 24}
    | {"sigma": 2.0, "min_sigma": 0.05, "temperature": 0.5}
)
# Replans after every model step, within 100 env steps.
PROTOCOLS.register("mpc-100")({"horizon": 5, "execute": 1, "objective": "all", "budget": 100, "strict": True})
