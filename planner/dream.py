"""Episodes that a trained world model imagines, for policies that learn without frames (arXiv 1803.10122, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.common.columns import Column
from wmcache.common.device import choose_device
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.trainer.dreaming import constant_reward, goal_distance, imagined_reward, load_dreams
from wmcache.trainer.models import Belief, Imagined
from wmcache.trainer.runs import data_split, open_store, read_config

LEAST_CONTINUES = 0.5
"""An imagined episode ends where the probability that it goes on is below this: the paper's logit of 0."""
DEFAULT_FPS = 20
"""Env steps per second, of stores that record none."""
BLOCKS = {"cpu": 64}
"""By device, episodes that the model steps at once, always: the last bits of a matrix product depend on the number of rows."""
LARGE_BLOCK = 512
"""Of other devices."""

Frames = NDArray[np.int64]


@dataclass(frozen=True)
class _Episodes:
    """Of E episodes: one generator and one start frame each, which have ended [E], and goals with their features."""

    generators: list[torch.Generator]
    starts: Frames
    ended: Tensor
    goal_latents: Tensor | None
    goal: Tensor | None


class Dream:
    """E episodes at once, each from the first frame of an episode of the run's store.

    An episode with seed s depends on s alone: its start, its goal and its noise. Features are those of `Dreams.features`, and where
    episodes have goals also `goal`, the goal's `latent`. Actions are env actions of `action`, one-hot where it is discrete.

    Attributes:
        model, dreams: of the run; the same object.
        store: of its frames.
        action: the env's action space.
        frameskip: f, env actions of a model step.
        length: most model steps of an episode, those of the longest one in the store.
        needs_goals: the model imagines neither reward nor end, so only a goal gives a reward.
        belief: of the newest imagined frames.
        latents: [E, N, D] of the newest imagined frames, in the store's units; D is 0 of a model that imagines proprio alone, whose
            distances to goals are those of proprio.
    """

    belief: Belief
    latents: Tensor

    def __init__(
        self,
        run: Path,
        *,
        temperature: float | None = None,
        device: str = "cpu",
        split: str = "train",
        cache: AnyPath | Sequence[AnyPath] | None = None,
    ) -> None:
        """Load a run.

        Args:
            temperature: of what the model draws; None: the run's.
            split: episodes of the store whose first frames are starts: `train`, `val` or `all`.
            cache: the store, or the stores, if they have moved.

        Raises:
            UserError: the run is of a model that cannot be stepped without frames, or that draws nothing at a temperature.
        """
        self.run, self.device = run, choose_device(device)
        self._block = BLOCKS.get(self.device.type, LARGE_BLOCK)
        self.model, self.dreams = load_dreams(run, self.device, temperature)
        self.store, config = open_store(run, cache), read_config(run)
        self.frameskip, (seed, fraction) = int(config["frameskip"]), data_split(config)
        self.action = action_space(self.store)
        self.length = max(1, (self.store.longest_episode() - 1) // self.frameskip)
        self.needs_goals = not (self.model.shape.has_reward or self.model.shape.has_end)
        self._each = constant_reward(self.store)
        self._split = (split, seed, fraction if split == "train" else 1.0)
        self._starts = np.searchsorted(self.store.episode, self.store.split(*self._split))

    @property
    def temperature(self) -> float:
        """Of what the model draws."""
        return self.model.temperature

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest env actions, [A] each."""
        low, high = (torch.tensor(bound, device=self.device) for bound in (self.action.low, self.action.high))
        return low, high

    @property
    def fps(self) -> float:
        """Model steps per second of the environment."""
        return float(self.store.card.dataset.get("fps") or DEFAULT_FPS) / self.frameskip

    @property
    def goal_latents(self) -> Tensor:
        """[E, N, D] in the store's units; only after `reset` with goals."""
        assert self._now.goal_latents is not None
        return self._now.goal_latents

    @property
    def starts(self) -> Frames:
        """The frame of the store that each episode starts from, int64 [E]."""
        return self._now.starts

    def require_latents(self) -> None:
        """Raise UserError where the model imagines no latents to draw."""
        if not self.model.has_latents:
            raise UserError(
                f"{self.run} imagines proprio alone, which no decoder draws; draw nothing with --pictured 0"
            )

    @torch.no_grad()
    def reset(self, seeds: Sequence[int], *, goals: bool = False) -> dict[str, Tensor]:
        """Start an episode for each seed; returns features.

        Args:
            goals: draw a goal for each, a held-out frame of the store.
        """
        self.latents, self.belief, self._now = self._begin(seeds, goals=goals)
        return self._features()

    @torch.no_grad()
    def restart(self, rows: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Start other episodes in some rows of E, with goals if the others have them; returns features of all."""
        before, places = self._now, torch.tensor(rows, dtype=torch.int64, device=self.device)
        latents, belief, begun = self._begin(seeds, goals=before.goal is not None)
        self.latents = _with_rows(self.latents, places, latents)
        self.belief = {name: _with_rows(value, places, belief[name]) for name, value in self.belief.items()}
        generators, starts = list(before.generators), before.starts.copy()
        for row, generator, start in zip(rows, begun.generators, begun.starts, strict=True):
            generators[row], starts[row] = generator, start
        ended = _with_rows(before.ended, places, begun.ended)
        self._now = _Episodes(generators, starts, ended, before.goal_latents, before.goal)
        if before.goal_latents is not None and before.goal is not None:
            assert begun.goal_latents is not None
            assert begun.goal is not None
            latest = _with_rows(before.goal_latents, places, begun.goal_latents)
            self._now = replace(self._now, goal_latents=latest, goal=_with_rows(before.goal, places, begun.goal))
        return self._features()

    @torch.no_grad()
    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Imagine one model step.

        An episode that has ended stays as it is, with reward 0.

        Args:
            actions: [E, f * A] in env units.

        Returns:
            Features; rewards [E] of these env steps; ended, bool [E]. The reward is minus the distance to the goal where there is one,
            and what the model imagines, unless all rewards of the store are equal, or it has none but ends: then it is that number, or
            1, for each env step.
        """
        actions, ended = actions.to(self.device, torch.float32), self._now.ended.clone()
        self.belief = {name: value.clone() for name, value in self.belief.items()}
        self.latents, reward = self.latents.clone(), torch.zeros(len(ended), device=self.device)
        for rows, block in _blocks(torch.nonzero(~self._now.ended)[:, 0], self._block):
            # Rows that fill a block must not draw from the generators of episodes.
            generators = [self._now.generators[row] for row in rows.tolist()]
            generators += [torch.Generator()] * (self._block - len(rows))
            before = {name: value[block] for name, value in self.belief.items()}
            after, imagined = self.dreams.step(before, actions[block], generators)
            for name, value in after.items():
                self.belief[name][rows] = value[: len(rows)]
            self.latents[rows] = imagined.latents[: len(rows), 0, 0]
            reward[rows] = self._reward(imagined, block)[: len(rows)]
            if imagined.continues is not None:
                ended[rows] = imagined.continues[: len(rows), 0, 0] < LEAST_CONTINUES
        self._now = replace(self._now, ended=ended)
        return self._features(), reward, ended

    def _begin(self, seeds: Sequence[int], *, goals: bool) -> tuple[Tensor, Belief, _Episodes]:
        starts, goal_latents, goal = drawn(self._starts, seeds, 1), None, None
        latents, belief = self._observe(starts)
        if goals:
            goal_latents, remembered = self._observe(drawn(self.store.frames_of(*self._split), seeds, 2))
            goal = self.dreams.features(remembered)["latent"]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        ended = torch.zeros(len(seeds), dtype=torch.bool, device=self.device)
        return latents, belief, _Episodes(generators, starts, ended, goal_latents, goal)

    def _reward(self, imagined: Imagined, block: Tensor) -> Tensor:
        if self._now.goal_latents is not None and self._now.goal is not None:
            return -goal_distance(self.model, imagined, self._now.goal_latents[block], self._now.goal[block])
        return imagined_reward(imagined, self._each, self.frameskip)

    def _features(self) -> dict[str, Tensor]:
        found = self.dreams.features(self.belief)
        return found if self._now.goal is None else {**found, "goal": self._now.goal}

    def _observe(self, frames: Frames) -> tuple[Tensor, Belief]:
        """Return the latents of frames [E], and what the model remembers of each."""
        latents = torch.from_numpy(self.store.gather(frames)).to(self.device).float()
        known, parts = self.store.proprio, []
        proprio = torch.from_numpy(np.zeros((len(frames), 0), np.float32) if known is None else known[frames])
        for rows, block in _blocks(torch.arange(len(frames), device=self.device), self._block):
            seen = self.model.observe(
                self.model.start(len(block)), latents[block], proprio.to(self.device)[block], None
            )
            parts.append({name: value[: len(rows)] for name, value in seen.items()})
        latents = latents if self.model.has_latents else latents[..., :0]
        return latents, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _with_rows(values: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Return values [E, …] with others in some rows."""
    return values.index_copy(0, rows, others)


def _blocks(rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows into blocks; yields those of each block, and the same with repeated ones after them, [size]."""
    for part in torch.split(rows, size) if len(rows) else ():
        yield part, torch.cat([part, part[:1].expand(size - len(part))])


def action_space(store: TokenStore) -> Column:
    """Describe the actions of a store as one column with bounds."""
    low, high = (tuple(bound.astype(float).tolist()) for bound in store.bounds)
    return Column(("action",), "float32", (len(low),), low, high, discrete=store.discrete)


def drawn(frames: Frames, seeds: Sequence[int], stream: int) -> Frames:
    """Draw a frame for each seed; streams are independent of each other."""
    chosen = [int(np.random.default_rng((seed, stream)).integers(len(frames))) for seed in seeds]
    return np.asarray(frames[chosen], np.int64)
