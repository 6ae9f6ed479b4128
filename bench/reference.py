"""One plan and training steps by DINO-WM's code and by this implementation, on the same weights and data, in one run."""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from wmcache.bench.limit import MatmulLimit, count_flops
from wmcache.bench.timing import median_ratio, seconds
from wmcache.cache.store import TokenStore
from wmcache.common.device import autocast, choose_device, choose_dtype, synchronise
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.planner.base import Cost
from wmcache.planner.context import EvalContext, random_episode
from wmcache.planner.mpc import Mpc
from wmcache.planner.objective import GoalDistance
from wmcache.planner.solvers.cem import Cem
from wmcache.trainer.feed import Feed, choose_residence
from wmcache.trainer.models import Imagined, build
from wmcache.trainer.models.attention import Block, gated, modulated, rotate
from wmcache.trainer.models.dino_wm import DinoWm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import data_shape, make_optimiser, statistics_of

REFERENCE_CHUNK = 30
"""Candidates that the reference imagines at once; its attention weights take 22 MB each. The number does not change its speed."""
ROUNDS = 5
Batch = Mapping[str, Tensor]


class Timed(NamedTuple):
    """A timed plan, and the costs [S] of its first candidates."""

    seconds: float
    costs: Tensor
    plan: Tensor


class PlanRace:
    """One planning problem: a random start and goal, the same for both implementations."""

    def __init__(self, context: EvalContext, solver: Cem, horizon: int) -> None:
        """Render and encode the goal; raise UserError unless the run's model is DINO-WM."""
        if not isinstance(context.model, DinoWm):
            raise UserError(f"not a DINO-WM model: {context.run}; compare runs with --model")
        self.context, self.solver, self.horizon, self.model = context, solver, horizon, context.model
        (start, _), frames = random_episode(context, 0)
        self.frame, goal = map(torch.from_numpy, frames)
        self.proprio = torch.from_numpy(start.astype(np.float32)).to(context.device)
        self.objective = GoalDistance(context.encoder(goal[None]).float(), "last")

    def reference(self, actions: Tensor) -> Tensor:
        """Compute costs as the reference does (planning/cem.py): it encodes a copy of the present frame for every candidate."""
        costs = []
        for chunk in torch.split(actions[0], REFERENCE_CHUNK):
            seen = self.context.encoder(self.frame.expand(len(chunk), *self.frame.shape))
            proprio = self.proprio.expand(len(chunk), 1, -1)
            latents = reference_rollout(self.model, seen[:, None].float(), proprio, chunk)
            costs.append(self.objective(Imagined(latents[None], latents[None, :, :, :0, 0]), slice(0, 1)))
        return torch.cat(costs, 1)

    def cost_in(self, dtype: torch.dtype) -> Cost:
        """Encode the present frame once; returns the cost of this implementation."""
        context, model = self.context, self.model
        model.context = model.shape.history  # as the reference
        mpc = Mpc(model, self.solver, self.objective, self.horizon, context.device, dtype)
        belief = model.observe(model.start(1), context.encoder(self.frame[None]), self.proprio[None], None)
        return mpc.cost_of(belief, [torch.Generator()])

    def time(self, begin: Callable[[], Cost], bar: tqdm[Any]) -> Timed:
        """Time a plan, from the first encoding on."""
        costs: list[Tensor] = []

        def recorded(actions: Tensor) -> Tensor:
            costs.append(cost(actions))
            bar.update(actions.shape[1])
            return costs[-1]

        device = self.context.device
        start = torch.zeros(1, self.horizon, self.model.shape.action_dim, device=device)
        synchronise(device)
        begun = time.perf_counter()
        with torch.inference_mode():
            cost = begin()
            plan = self.solver(recorded, start, [torch.Generator().manual_seed(0)])
        synchronise(device)
        return Timed(time.perf_counter() - begun, costs[0][0].float().cpu(), plan.float().cpu())


def bench_run(
    context: EvalContext,
    *,
    samples: int = 300,
    elites: int = 30,
    iterations: int = 1,
    horizon: int = 5,
    dtype: str = "auto",
) -> dict[str, float]:
    """Time one CEM plan of one episode by both implementations.

    The reference encodes a copy of the present frame for every candidate in every iteration, computes each predicted frame from its whole
    window, and writes attention out under a mask, in float32. Iterations cost the same, so a few are enough to compare.

    Returns:
        Seconds of each and their ratio; frames that each encodes; GFLOP of a candidate, the GFLOP/s that were reached and those of a large
        matrix product on this machine, measured before and after the plan; this implementation's `share_of_limit`; and how far costs and
        plans are from the reference's.
    """
    race = PlanRace(context, Cem(samples, elites, iterations, sigma=0.577), horizon)
    precision, candidates = choose_dtype(dtype, context.device), samples * iterations
    with tqdm(total=candidates * 3, desc="bench plan", unit=" candidates") as bar:
        (fast, limit), (exact, limit_float32) = (_limited(race, kind, bar) for kind in (precision, torch.float32))
        slow = race.time(lambda: race.reference, bar)
    two = torch.zeros(1, 2, horizon, race.model.shape.action_dim, device=context.device)
    with torch.inference_mode():
        reference_gflop, gflop = (count_flops(cost, two) / 2e9 for cost in (race.reference, race.cost_in(precision)))

    def difference(plan: Timed) -> float:
        """Over the spread of the reference's costs: what can change the order of candidates."""
        return float((plan.costs - slow.costs).abs().max() / slow.costs.std())

    return {
        "reference_seconds": slow.seconds,
        "ours_seconds": fast.seconds,
        "ours_float32_seconds": exact.seconds,
        "ratio": slow.seconds / fast.seconds,
        "ratio_float32": slow.seconds / exact.seconds,
        "reference_encoder_frames": candidates + 1,
        "ours_encoder_frames": 2,
        "reference_gflop_per_candidate": reference_gflop,
        "ours_gflop_per_candidate": gflop,
        "reference_gflops": reference_gflop * candidates / slow.seconds,
        "ours_gflops": gflop * candidates / fast.seconds,
        "limit_gflops_float32": limit_float32,
        "limit_gflops": limit,
        "share_of_limit": gflop * candidates / fast.seconds / limit,
        "cost_difference_float32": difference(exact),
        "cost_difference": difference(fast),
        "cost_rank_correlation": float(spearmanr(fast.costs, slow.costs).statistic),
        "plan_difference_float32": float((exact.plan - slow.plan).abs().max()),
        "plan_difference": float((fast.plan - slow.plan).abs().max()),
    }


def _limited(race: PlanRace, dtype: torch.dtype, bar: tqdm[Any]) -> tuple[Timed, float]:
    """Time this implementation's plan; returns also the limit, the mean of before and after it."""
    limit = MatmulLimit(race.context.device, dtype)
    before = limit.gflops()
    return race.time(partial(race.cost_in, dtype), bar), (before + limit.gflops()) / 2


def reference_rollout(model: DinoWm, tokens: Tensor, proprio: Tensor, actions: Tensor) -> Tensor:
    """Imagine latents [B, T, N, D] as DINO-WM's code does (VWorldModel.rollout): each frame from its whole window, under a mask.

    Takes tokens [B, 1, N, D], proprio [B, 1, P] and actions [B, T, f * A]. With rotary positions the window is every frame so far.
    """
    tokens, proprio, actions = model.standardise(tokens, proprio, actions)
    embedding, history = model.embed(proprio), model.shape.history
    for end in range(1, actions.shape[1] + 1):
        window = slice(0 if model.options.position == "rope" else max(0, end - history), end)
        following = explicit_predict(model, tokens[:, window], embedding[:, window], actions[:, window])
        tokens = torch.cat([tokens, following[0][:, -1:]], 1)
        # The observed frame has one embedding for all its patches, an imagined one may have one for each.
        embedding = torch.cat([embedding.expand(-1, -1, following[1].shape[2], -1), following[1][:, -1:]], 1)
    latents: Tensor = tokens[:, 1:] * model.tokens_std + model.tokens_mean
    return latents


def explicit_predict(
    model: DinoWm, tokens: Tensor, embedding: Tensor, action: Tensor, pool: int = 1, patches: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `DinoWm.predict` as DINO-WM's code does: all queries meet all keys under a mask (models/vit.py)."""
    x, arguments = model.enter(tokens, embedding, action, range(tokens.shape[1]), pool, patches)
    frame = torch.arange(x.shape[1], device=x.device).repeat_interleave(x.shape[2])
    age = frame[:, None] - frame[None, :]
    mask = (age >= 0) & (age < model.shape.history)
    for block in model.blocks:
        assert isinstance(block, Block)
        x = explicit_block(block, x, mask, arguments["condition"])
    return model.split(x, tokens, embedding)


def explicit_block(block: Block, x: Tensor, mask: Tensor, condition: Tensor | None) -> Tensor:
    """See `Block.forward`; attention weights [B, heads, T * tokens, T * tokens] are computed and then masked."""
    frames = x.shape[1]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.modulation(condition)
    normed = modulated(block.norm_attention(x), shift, scale)
    q, k, v = rearrange(block.qkv(normed), "b t n (three h c) -> three b h (t n) c", three=3, h=block.heads)
    if block.rotary:
        q, k = rotate(q, 0, frames), rotate(k, 0, frames)
    weights = torch.matmul(q, k.transpose(-1, -2)) * block.head_dim**-0.5
    attended = torch.matmul(weights.masked_fill(~mask, float("-inf")).softmax(-1), v)
    x = x + gated(block.out(rearrange(attended, "b h (t n) c -> b t n (h c)", t=frames)), gate)
    return x + gated(block.mlp(modulated(block.norm_mlp(x), shift_mlp, scale_mlp)), gate_mlp)


def bench_train(
    cache: AnyPath,
    model_options: dict[str, Any],
    encode: Callable[[int], Tensor],
    *,
    batch: int = 64,
    steps: int = 20,
    device: str = "auto",
    residence: str = "auto",
) -> dict[str, float]:
    """Time the same training steps of DINO-WM from three sources of batches, and as its code computes them, in turns.

    Batches come from `memory`, from the `store`, or with every frame encoded (`encoding`). The `reference` encodes too, in float32, with
    explicit attention under a mask. Ratios are of the store to the others, medians over the rounds. `share_of_limit` is that of the rate of
    a large matrix product in the same precision (`limit_gflops`), measured in turn, which the store's steps reach.

    Args:
        encode: n -> tokens [n, N, D]; encodes n frames, as DINO-WM does for every batch.
        batch: windows of 3 + 1 frames, 5 env steps apart.
        steps: in each round; a tenth of them where frames are encoded.
    """
    store, where = TokenStore.open(cache), choose_device(device)
    options = TrainOptions(model_options=model_options, batch=batch, device=device)
    dtype = choose_dtype(options.dtype, where)
    windows = store.windows(options.history, 1, options.frameskip, "train")
    model = build("dino-wm", data_shape(store, options), model_options, statistics_of(store, options.frameskip))
    assert isinstance(model, DinoWm)
    model.to(where).train()
    reference = copy.copy(model)  # the same parameters
    reference.predict = partial(explicit_predict, model)  # type: ignore[method-assign]
    optimiser = make_optimiser(model, options)
    chosen, why = choose_residence(store, where, residence)
    tqdm.write(why, file=sys.stderr)
    with Feed(store, windows, batch, 0, where, residence=chosen) as feed:
        held, few = {name: value.clone() for name, value in feed.next().items()}, max(1, steps // 10)
        variants = {
            "memory": (itertools.repeat(held), model, dtype, optimiser, steps),
            "store": (iter(feed.next, None), model, dtype, optimiser, steps),
            "encoding": (_encoded(held, encode), model, dtype, optimiser, few),
            "reference": (_encoded(held, encode), reference, torch.float32, optimiser, few),
        }
        # The first steps include set-up.
        gflop = {name: count_flops(_train, *variant[:-1], 1) / 1e9 for name, variant in variants.items()}
        limit, limits = MatmulLimit(where, dtype), []
        waited = feed.waited
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in tqdm(range(ROUNDS), desc="bench train", unit=" rounds"):
            limits.append(limit.gflops())
            for name, variant in variants.items():
                rates[name].append(variant[-1] / seconds(_train, *variant, device=where))
        waiting = (feed.waited - waited) / sum(steps / rate for rate in rates["store"])
    peers = ("memory", "encoding", "reference")
    ratios = {f"ratio_to_{name}": median_ratio(rates["store"], rates[name]) for name in peers}
    medians = {f"{name}_steps_per_second": statistics.median(values) for name, values in rates.items()}
    share = {
        "gflop_per_step": gflop["store"],
        "limit_gflops": statistics.median(limits),
        "share_of_limit": gflop["store"] * median_ratio(rates["store"], limits),
    }
    return {"windows_per_step": batch, **medians, **ratios, "waiting_share": waiting, **share}


def _train(
    batches: Iterator[Batch], model: DinoWm, dtype: torch.dtype, optimiser: torch.optim.Optimizer, steps: int
) -> None:
    for batch in itertools.islice(batches, steps):
        with autocast(model.tokens_mean.device, dtype):
            loss = model.loss(batch)["loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _encoded(held: Batch, encode: Callable[[int], Tensor]) -> Iterator[Batch]:
    """Yield a batch again and again, its tokens replaced by those of as many frames that are encoded for it."""
    tokens = held["tokens"]
    while True:
        yield {**held, "tokens": encode(tokens.shape[0] * tokens.shape[1]).view(tokens.shape).to(tokens.device)}
