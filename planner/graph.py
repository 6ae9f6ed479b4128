"""How far a goal is along the ways that the cached frames have taken: for goals that lie beyond the planning horizon.

A latent distance tells near from nearer, but across a maze it may point into a wall. The store knows better: which places its own episodes
led from and to. Some of its frames are the places of a graph; two are neighbours where an episode went from the surroundings of one to
those of the other within one model step; the distance to a goal is the length of the shortest way over such neighbours (compare
semi-parametric topological memory, arXiv 1803.00653, and search on the replay buffer, arXiv 1906.05253). Nothing but cached tokens and
the order of frames in episodes is used: no state, no map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError

PLACES = 1024
CROWD = 8
"""Frames a place, on average and at least: episodes meet only in places that they share."""
FRAMES = 20_000
"""Model steps that the graph is made from; more only make it slower to build."""
SKETCH = 256
"""Numbers that a frame is reduced to where it has more: random projections keep distances (Johnson and Lindenstrauss 1984)."""


@dataclass(frozen=True)
class LatentGraph:
    """Places in the latent space, and the ways between them.

    Attributes:
        places: [K, d], d = min(N * D, SKETCH).
        project: [N * D, d], or None where d = N * D.
        edges: [K, K] sparse, lengths of the ways between neighbours.
        reach: the distance between two frames that are one model step apart (median): as far as a latent distance is trusted.
    """

    places: Tensor
    project: Tensor | None
    edges: coo_array
    reach: float

    @classmethod
    def from_store(cls, store: TokenStore, frameskip: int, device: torch.device, seed: int = 0) -> LatentGraph:
        """Make the graph of a store, from FRAMES of its model steps or as many as there are, drawn by `seed`.

        Raises:
            UserError: the store has no two frames a model step apart.
        """
        last = len(store) - frameskip
        pairs = np.flatnonzero(store.episode[:last] == store.episode[frameskip:]) if last > 0 else np.empty(0, int)
        if not len(pairs):
            raise UserError(
                f"{store.path} has no two frames {frameskip} env steps apart to make a graph of; choose --distance latent"
            )
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(pairs, min(len(pairs), FRAMES), replace=False))
        frames = np.unique(np.concatenate([chosen, chosen + frameskip]))
        size = int(np.prod(store.card.frame_shape))
        generator = torch.Generator().manual_seed(seed)
        project = None
        if size > SKETCH:
            project = torch.randn(size, SKETCH, generator=generator) / SKETCH**0.5
        parts = np.array_split(frames, max(1, len(frames) * size // 2**26))
        flat = (torch.from_numpy(store.gather(part)).flatten(1).float() for part in parts)
        points = torch.cat([part if project is None else part @ project for part in flat]).to(device)
        here, there = (torch.from_numpy(np.searchsorted(frames, of)) for of in (chosen, chosen + frameskip))
        reach = float((points[here] - points[there]).norm(dim=1).median())
        places = points[farthest_points(points, max(1, min(PLACES, len(points) // CROWD)))]
        nearest = torch.cat([torch.cdist(part, places).argmin(1) for part in torch.split(points, 2048)])
        a, b = nearest[here].cpu().numpy(), nearest[there].cpu().numpy()
        return cls(places, None if project is None else project.to(device), connect(places, a, b), reach)

    def sketch(self, latents: Tensor) -> Tensor:
        """[..., N, D] -> [..., d]."""
        flat = latents.flatten(-2)
        return flat if self.project is None else flat @ self.project

    def to_goal(self, goal: Tensor) -> Tensor:
        """Length of the shortest way from each place to goals [E, N, D]: [E, K]; a place with no way is farther than all that have one."""
        apart = torch.cdist(self.sketch(goal), self.places)
        lengths = []
        for row in apart.cpu().numpy():
            near = np.flatnonzero(row <= max(self.reach, float(row.min())))
            lengths.append((row[near][:, None] + dijkstra(self.edges, directed=False, indices=near)).min(0))
        found = np.stack(lengths)
        finite = np.where(np.isfinite(found), found, 0).max(1, keepdims=True)
        return torch.from_numpy(np.where(np.isfinite(found), found, 2 * (finite + self.reach))).float().to(goal.device)

    def distance(self, latents: Tensor, goal: Tensor, to_goal: Tensor) -> Tensor:
        """Length of the shortest way from imagined frames to goals, by way of a place within reach.

        Args:
            latents: [e, S, T, N, D]. goal: [e, N, D]. to_goal: [e, K], as `to_goal` gives it.

        Returns:
            [e, S, T].
        """
        points = self.sketch(latents)
        flat = points.flatten(1, 2)
        apart = torch.cdist(flat, self.places.expand(len(flat), -1, -1))
        # Beyond reach a latent distance may lead through walls; the nearest place is always allowed.
        allowed = (apart <= self.reach) | (apart == apart.amin(-1, keepdim=True))
        way = torch.where(allowed, apart + to_goal[:, None], torch.inf).amin(-1)
        straight: Tensor = (flat - self.sketch(goal)[:, None]).norm(dim=-1)
        way = torch.where(straight <= self.reach, torch.minimum(way, straight), way)
        return way.view(points.shape[:3])


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Numbers of `count` points, each the farthest from those before it: they cover what there is (Gonzalez 1985)."""
    chosen = torch.zeros(count, dtype=torch.long)
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for number in range(1, count):
        distance = torch.minimum(distance, (points - points[chosen[number - 1]]).square().sum(1))
        chosen[number] = distance.argmax()
    return chosen


def connect(places: Tensor, here: NDArray[np.int64], there: NDArray[np.int64]) -> coo_array:
    """The graph of places, in which the places of each pair (here, there) are neighbours, as far apart as they are in the latent space."""
    pairs = np.unique(np.stack([np.minimum(here, there), np.maximum(here, there)]), axis=1)
    pairs = pairs[:, pairs[0] != pairs[1]]
    lengths = (places[pairs[0]] - places[pairs[1]]).norm(dim=1).cpu().numpy().astype(np.float64)
    return coo_array((np.maximum(lengths, 1e-9), (pairs[0], pairs[1])), shape=(len(places), len(places)))
