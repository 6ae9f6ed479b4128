"""Protocols: what wmplan is told by one name. An option that is given beside `--protocol` wins."""

from __future__ import annotations

from typing import Any

PROTOCOLS: dict[str, dict[str, Any]] = {
    # DINO-WM's evaluation (conf/plan_point_maze.yaml, plan.py): every replan starts from one frame and executes its whole plan. The
    # reference replans until all episodes succeed; here the budget is stated. Its candidates have the deviation of the data's actions,
    # which for uniform ones is 1 / sqrt(3). Starts and goals are any two random states, 15 % of them in the U-maze already within 0.5.
    "dino-wm": {
        "horizon": 5,
        "execute": 5,
        "objective": "last",
        "distance": "latent",
        "context": 3,
        "observed": 1,
        "solver": "cem",
        "samples": 300,
        "elites": 30,
        "iterations": 10,
        "sigma": 0.577,
        "budget": 100,
        "episodes": 50,
        "strict": False,
    },
    # One plan and nothing more: DINO-WM's "CEM" row (arXiv 2411.04983, table 8) and JEPA-WM's table 1, whose plan has 6 model steps.
    "open-loop": {
        "horizon": 6,
        "execute": 6,
        "objective": "last",
        "budget": 30,
        "solver": "cem",
        "samples": 300,
        "elites": 30,
        "iterations": 20,
        "sigma": 0.577,
        "strict": True,
    },
    # Replans after every model step, within 100 env steps.
    "mpc-100": {"horizon": 5, "execute": 1, "objective": "all", "budget": 100, "strict": True},
}
