"""Plan in a simulator of your own, with a run that was trained on imported frames. Copy it and change what you need.

`simulator.observe()` returns a frame, uint8 [S, S, 3] as it was imported, and the numbers of the state columns; `simulator.step(action)`
takes one env step. The solvers search actions in [-1, 1], so the table that is imported has to hold actions in these bounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmcache.pipeline.encoders import create_again
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import GoalDistance
from wmcache.planner.solvers import make_solver
from wmcache.trainer.runs import load_model, read_config, read_identity


def plan_elsewhere(run: Path, simulator: Any, goal_image: np.ndarray, env_steps: int, device: str = "cpu") -> list[Any]:
    """Act until `env_steps` are done; returns the actions taken."""
    card, _ = read_identity(run)
    model, frameskip = load_model(run, torch.device(device)), int(read_config(run)["frameskip"])
    encoder = create_again(card.encoder, device=device)
    mpc = Mpc(
        model=model,
        solver=make_solver("cem", samples=100, elites=10, iterations=5),
        objective=GoalDistance(encoder(goal_image[None]).float(), "all"),
        horizon=5,  # model steps of `frameskip` env steps each
        context=1,
        frameskip=frameskip,
        device=torch.device(device),
        dtype=torch.float32,
    )
    generators, plan = [torch.Generator().manual_seed(0)], None
    taken: list[Any] = []
    while len(taken) < env_steps:
        image, state = simulator.observe()
        proprio = torch.tensor(np.asarray(state), dtype=torch.float32, device=device)
        # One episode, one frame: tokens [1, 1, N, D], proprio [1, 1, P], plan [1, horizon, frameskip * A].
        plan = mpc.plan(encoder(image[None])[:, None], proprio[None, None], plan, generators)
        for action in plan[0, 0].reshape(frameskip, -1).cpu().numpy():
            simulator.step(action)
            taken.append(action)
        plan = mpc.shift(plan, 1)
    return taken
