"""One plan as DINO-WM's code makes it and as ours does, on the same weights and candidates, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from wmcache.bench.explicit import explicit_predict
from wmcache.common.device import choose_dtype, synchronise
from wmcache.common.errors import UserError
from wmcache.planner.base import Cost
from wmcache.planner.cem import Cem
from wmcache.planner.evaluate import EvalContext, random_episode
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import GoalDistance
from wmcache.trainer.models.dino_wm import DinoWm

REFERENCE_CHUNK = 30
"""Candidates at once in the reference's way, whose attention weights alone take 22 MB each; how many makes no difference to its speed."""
LIMIT_SIZE = 4096


@dataclass
class Stopwatch:
    """Seconds and candidates' costs of one way to plan."""

    seconds: float
    costs: Tensor
    plan: Tensor


def bench_plan(
    model: DinoWm,
    encode: Callable[[Tensor], Tensor],
    frame: Tensor,
    goal: Tensor,
    proprio: Tensor,
    *,
    frameskip: int,
    samples: int = 300,
    elites: int = 30,
    iterations: int = 1,
    horizon: int = 5,
    dtype: str = "auto",
) -> dict[str, float]:
    """Time one CEM plan of one episode in both ways.

    The reference's way (planning/cem.py, models/visual_world_model.py): every iteration encodes as many copies of the present frame as
    there are candidates, each predicted frame is computed from its whole window anew, attention is explicit under a mask, in float32.
    Iterations cost the same, so a few are enough to compare.

    Args:
        model: a `DinoWm`.
        encode: frames uint8 [n, S, S, 3] -> tokens [n, N, D].
        frame, goal: uint8 [S, S, 3]. proprio: [P], of the present frame.
        frameskip: env steps of a model step.
        samples, elites, iterations, horizon: of the plan; DINO-WM has 300, 30, 10 and 5.
        dtype: of our way, `auto`, `float32` or `bfloat16`.

    Returns:
        Seconds of each way; `ratio`; frames that each encodes; GFLOP of a candidate and the GFLOP/s that were reached and that the machine
        reaches on a large matrix product; and how far costs and plans are from the reference's.
    """
    device = proprio.device
    shape = model.shape
    goal_tokens = encode(goal[None]).float()
    solver = Cem(samples, elites, iterations, sigma=0.577)
    objective = GoalDistance(goal_tokens, "last")

    def reference(actions: Tensor) -> Tensor:
        tokens = torch.cat(
            [encode(frame.expand(len(part), *frame.shape)) for part in torch.split(actions[0], REFERENCE_CHUNK)]
        )
        rows = []
        for part, seen in zip(
            torch.split(actions[0], REFERENCE_CHUNK), torch.split(tokens, REFERENCE_CHUNK), strict=True
        ):
            latents = reference_rollout(model, seen[:, None].float(), proprio.expand(len(part), 1, -1), part)
            rows.append(objective(latents[None], latents[None, :, :, :0, 0], slice(0, 1)))
        return torch.cat(rows, 1)

    def ours(precision: torch.dtype) -> Cost:
        mpc = Mpc(model, solver, objective, horizon, shape.history, frameskip, device, precision)
        return mpc.cost_of(encode(frame[None])[:, None], proprio[None, None])

    def watch(begin: Callable[[], Cost]) -> Stopwatch:
        seen: list[Tensor] = []

        def noted(actions: Tensor) -> Tensor:
            seen.append(cost(actions))
            bar.update(actions.shape[1])
            return seen[-1]

        generators = [torch.Generator().manual_seed(0)]
        synchronise(device)
        begun = time.perf_counter()
        with torch.inference_mode():
            cost = begin()
            plan = solver(noted, torch.zeros(1, horizon, shape.action_dim, device=device), generators)
        synchronise(device)
        return Stopwatch(time.perf_counter() - begun, seen[0][0].float().cpu(), plan.float().cpu())

    precision = choose_dtype(dtype, device)
    with tqdm(total=samples * iterations * 3, desc="bench plan", unit=" candidates") as bar:
        fast, exact = watch(lambda: ours(precision)), watch(lambda: ours(torch.float32))
        slow = watch(lambda: reference)
    few = torch.zeros(1, 2, horizon, shape.action_dim, device=device)
    with torch.inference_mode():
        work = {
            name: count_flops(cost, few) / 2e9 for name, cost in (("reference", reference), ("ours", ours(precision)))
        }
    candidates = samples * iterations
    return {
        "reference_seconds": slow.seconds,
        "ours_seconds": fast.seconds,
        "ours_float32_seconds": exact.seconds,
        "ratio": slow.seconds / fast.seconds,
        "ratio_float32": slow.seconds / exact.seconds,
        "reference_encoder_frames": candidates + 1,
        "ours_encoder_frames": 2,
        "reference_gflop_per_candidate": work["reference"],
        "ours_gflop_per_candidate": work["ours"],
        "reference_gflops": work["reference"] * candidates / slow.seconds,
        "ours_gflops": work["ours"] * candidates / fast.seconds,
        "limit_gflops_float32": matmul_limit(device, torch.float32),
        "limit_gflops": matmul_limit(device, precision),
        "cost_difference_float32": relative(exact.costs, slow.costs),
        "cost_difference": relative(fast.costs, slow.costs),
        "cost_rank_correlation": float(spearmanr(fast.costs, slow.costs).statistic),
        "plan_difference_float32": float((exact.plan - slow.plan).abs().max()),
        "plan_difference": float((fast.plan - slow.plan).abs().max()),
    }


def reference_rollout(model: DinoWm, tokens: Tensor, proprio: Tensor, actions: Tensor) -> Tensor:
    """Latents [B, T, N, D] as DINO-WM's code computes them (VWorldModel.rollout): each frame from its whole window, under a mask.

    With rotary positions the window is all that a frame depends on: every frame so far.

    Args:
        model: a `DinoWm`. tokens: [B, 1, N, D]. proprio: [B, 1, P]. actions: [B, T, f * A].
    """
    tokens, proprio, actions = model.standardise(tokens, proprio, actions)
    code, history = model.embed(proprio), model.shape.history
    for end in range(1, actions.shape[1] + 1):
        window = slice(0 if model.options.position == "rope" else max(0, end - history), end)
        following = explicit_predict(model, tokens[:, window], code[:, window], actions[:, window])
        tokens = torch.cat([tokens, following[0][:, -1:]], 1)
        # The observed frame has one code for all its patches, an imagined one may have one for each.
        code = torch.cat([code.expand(-1, -1, following[1].shape[2], -1), following[1][:, -1:]], 1)
    latents: Tensor = tokens[:, 1:] * model.tokens_std + model.tokens_mean
    return latents


def count_flops(cost: Cost, actions: Tensor) -> float:
    """Floating point operations of a call, the encoder's included."""
    with FlopCounterMode(display=False) as counter:
        cost(actions)
    return float(counter.get_total_flops())


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large square matrix product: what this machine can do."""
    a = torch.randn(LIMIT_SIZE, LIMIT_SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        synchronise(device)
        begun = time.perf_counter()
        a @ a
        synchronise(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * LIMIT_SIZE**3 / best / 1e9


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the spread of `b`: what an order of candidates can notice."""
    return float((a - b).abs().max() / b.std())


def bench_run(setting: EvalContext, **settings: Any) -> dict[str, float]:
    """`bench_plan` on a run, from one random state to another; `settings` are its options.

    Raises:
        UserError: the run's model is not DINO-WM's.
    """
    if not isinstance(setting.model, DinoWm):
        raise UserError(f"{setting.run} is no model of DINO-WM's; compare runs with --model")
    (start, _), frames = random_episode(setting, 0)
    frame, goal_frame = map(torch.from_numpy, frames)
    proprio = torch.from_numpy(start.astype(np.float32)).to(setting.device)
    return bench_plan(
        setting.model, setting.encoder, frame, goal_frame, proprio, frameskip=setting.frameskip, **settings
    )
