"""Plan in your own simulator, with a run that was trained on imported frames. Copy this file and adapt it.

`simulator.observe()` returns a frame, uint8 [S, S, 3] as it was imported, and the values of the state columns. `simulator.step(action)`
takes one env step. Solvers search actions in [-1, 1], so the imported table must have actions within these bounds.
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
    """Act for at least `env_steps`, in whole model steps; returns the executed actions."""
    card, _ = read_identity(run)
    model, frameskip = load_model(run, torch.device(device)), int(read_config(run)["frameskip"])
    encoder = create_again(card.encoder, device=device)
    mpc = Mpc(
        model=model,
        solver=make_solver("cem", samples=100, elites=10, iterations=5),
        objective=GoalDistance(encoder(goal_image[None]).float(), "all"),
        horizon=5,  # model steps of `frameskip` env steps each
        device=torch.device(device),
        dtype=torch.float32,
    )
    model.context = model.observed = 1  # proprio has the velocity, so one frame is enough
    generators, plan = [torch.Generator().manual_seed(0)], None
    executed: list[Any] = []
    while len(executed) < env_steps:
        image, state = simulator.observe()
        proprio = torch.tensor(np.asarray(state), dtype=torch.float32, device=device)
        # One episode, one frame: tokens [1, N, D], proprio [1, P], plan [1, horizon, frameskip * A].
        belief = model.observe(model.start(1), encoder(image[None]), proprio[None], None)
        plan = mpc.plan(belief, plan, generators)
        for action in plan[0, 0].reshape(frameskip, -1).cpu().numpy():
            simulator.step(action)
            executed.append(action)
        plan = mpc.shift(plan, 1)
    return executed
