"""All settings of the training of a controller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from wmcache.common.options import Natural, Positive, Weight, option

Choice = Literal["argmax", "thresholds", "clip"]
"""How outputs become actions, where they are not scaled: see `Linear`."""
DREAM_TEMPERATURE = 1.15
"""Where the model draws (arXiv 1803.10122, table 2)."""


@dataclass(frozen=True)
class ControllerOptions:
    """All settings of a training; saved in config.json. Defaults are those of arXiv 1803.10122, appendix A.4, except the generations."""

    where: Literal["dream", "env"] = option(
        "dream",
        "Train on what the world model imagines, or in the real environment.",
        flag="--in",
        group="Training",
    )
    generations: Positive = option(100, "Generations of the search.")
    population: Annotated[int, Ge(4)] = option(64, "Candidates of a generation.")
    rollouts: Positive = option(16, "Episodes whose mean return is a candidate's fitness; the same for all candidates.")
    length: Positive | None = option(
        None, "Model steps of these episodes, at most.  [default: those of the longest episode of the data]"
    )
    sigma: Annotated[float, Gt(0)] = option(0.1, "First standard deviation of the parameters.")
    temperature: Weight | None = option(
        None, f"Temperature of the dream.  [default: {DREAM_TEMPERATURE} where the model draws what it imagines]"
    )
    start: str | None = option(
        None, "Folder of a controller whose parameters the search starts from.  [default: zeros]", flag="--from"
    )
    seed: Natural = option(0, "Seed of the search and of the episodes.")
    inputs: str | None = option(
        None,
        "What the controller sees, separated by commas: latent, hidden, cell, goal.  [default: latent,hidden; where no reward is known "
        "also goal]",
        group="Controller",
    )
    choose: Literal["argmax", "thresholds"] = option(
        "argmax",
        "A discrete action is the one of the largest output, or the part of [-1, 1] in which a single output is.",
    )
    squash: Literal["scale", "clip"] = option(
        "scale",
        "A continuous action is the tanh of an output, scaled to the bounds; or clipped to them, so that an output of 0 is an action of 0.",
    )
    check_every: Natural = option(
        5,
        "Generations between checks of the mean parameters in the real environment; the last is checked too. 0: never.",
        group="Run",
    )
    check_episodes: Positive = option(16, "Episodes of a check.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps.")

    def dream_temperature(self, *, draws: bool) -> float | None:
        """Return the temperature of the dream of a model that draws what it imagines, or does not."""
        return DREAM_TEMPERATURE if self.temperature is None and draws else self.temperature

    def choice(self, *, discrete: bool) -> Choice | None:
        """Return `Linear.choose` for discrete or continuous actions."""
        return self.choose if discrete else "clip" if self.squash == "clip" else None
