"""What a search of a controller works with: its shape, and returns in the dream and in the real environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wmcache.cluster.tasks import open_pool
from wmcache.common.errors import UserError
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.fitness import DreamRollouts, Live, LiveBatch, LiveRollouts
from wmcache.planner.controllers.folder import linear_of
from wmcache.planner.controllers.linear import Linear
from wmcache.planner.controllers.options import ControllerOptions
from wmcache.planner.dream import Dream
from wmcache.planner.options import PlanOptions
from wmcache.trainer.dreaming import GOAL
from wmcache.trainer.runs import load_model, weights_checksum

Array = NDArray[np.float64]
Returns = Callable[[Array, Sequence[int], str], Array]
"""(candidates [n, parameters], numbers of episodes, label of the tasks) -> the sums of rewards, [n, episodes]."""


@dataclass(frozen=True)
class Trial:
    """See the module.

    Attributes:
        returns: what the search maximises. check: returns in the real environment; None where that is not checked.
    """

    linear: Linear
    returns: Returns
    check: Returns | None


@contextmanager
def open_trial(
    run: Path, options: ControllerOptions, unfinished: Path, *, cluster: str, weights: Path | None
) -> Iterator[Trial]:
    """Load a run, and the environment where it is needed; `unfinished` is the folder of its tasks' results.

    Raises:
        UserError: the model, the inputs or the environment do not suit a controller.
    """
    with ExitStack() as stack:
        dreamed = _dreamed(run, options) if options.where == "dream" else None
        live = None
        if dreamed is None or options.check_every:
            context = _open_context(run, options, weights)
            inputs = dreamed.linear.inputs if dreamed else _inputs(options, needs_goal=not context.by_return)
            linear = linear_of(context, inputs, options.choice(discrete=context.discrete))
            task = LiveBatch(
                run.absolute(),
                PlanOptions(device=str(context.device)),
                weights and weights.absolute(),
                linear.inputs,
                linear.choose,
                options.length or max(1, (context.store.longest_episode() - 1) // context.frameskip),
                unfinished.absolute(),
                weights_checksum(run),
            )
            pool = stack.enter_context(open_pool(cluster, label="wmcache controller"))
            live = LiveRollouts(task, Live(context, linear), pool)
            stack.callback(live.live.close)
        if dreamed is not None:
            check = live.returns if live else None
            yield Trial(dreamed.linear, lambda candidates, numbers, _: dreamed.returns(candidates, numbers), check)
        elif live is not None:
            yield Trial(live.live.linear, live.returns, live.returns if options.check_every else None)


def _open_context(run: Path, options: ControllerOptions, weights: Path | None) -> EvalContext:
    try:
        return EvalContext(run, PlanOptions(device=options.device), weights=weights)
    except UserError as error:
        if options.where == "env":
            raise
        raise UserError(f"{error}; to train without the real environment, pass --check-every 0") from error


def _dreamed(run: Path, options: ControllerOptions) -> DreamRollouts:
    temperature = options.dream_temperature(draws=load_model(run, torch.device("cpu")).draws)
    dream = Dream(run, temperature=temperature, device=options.device)
    inputs = _inputs(options, needs_goal=dream.needs_goals)
    choose = options.choice(discrete=dream.action.discrete)
    linear = Linear.of(dream.dreams, inputs, dream.bounds, dream.frameskip, choose)
    return DreamRollouts(dream, linear, options.length or dream.length, goals=GOAL in inputs or dream.needs_goals)


def _inputs(options: ControllerOptions, *, needs_goal: bool) -> list[str]:
    if options.inputs is not None:
        return options.inputs.split(",")
    return ["latent", "hidden", *([GOAL] if needs_goal else [])]
