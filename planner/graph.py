"""Distance to a goal along the paths of the cached episodes, for goals beyond the planning horizon.

A latent distance may point straight into an obstacle. Some frames of the store are the nodes of a graph; two are neighbours where an
episode went from the surroundings of one to those of the other within one model step. The distance to a goal is the shortest path length
(compare semi-parametric topological memory, arXiv 1803.00653, and search on the replay buffer, arXiv 1906.05253). It uses no state, no map.
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
from wmcache.common.sampling import farthest_points

NODES = 1024
FRAMES_PER_NODE = 8
"""On average and at least: episodes are connected only by nodes that they share."""
FRAMES = 20_000
"""Model steps that the graph is made from; more only make it slower to build."""
SKETCH = 256
"""Dimensions that larger frames are projected to: random projections keep distances (Johnson and Lindenstrauss 1984)."""


@dataclass(frozen=True)
class LatentGraph:
    """Nodes in the latent space, and path lengths between neighbours.

    Attributes:
        nodes: [K, d], d = min(N * D, SKETCH).
        project: [N * D, d], or None where d = N * D.
        edges: [K, K] sparse, distances of neighbours.
        reach: median distance between two frames one model step apart; latent distances are trusted up to it.
        frames: float16 [K, N, D], the tokens of the nodes.
    """

    nodes: Tensor
    project: Tensor | None
    edges: coo_array
    reach: float
    frames: Tensor

    @classmethod
    def from_store(
        cls, store: TokenStore, frameskip: int, device: torch.device, episodes: NDArray[np.int64] | None = None
    ) -> LatentGraph:
        """Build the graph of a store, or of some of its episodes, from at most FRAMES of their model steps; the same for the same ones."""
        last = max(0, len(store) - frameskip)
        within = store.episode[:last] == store.episode[frameskip:]
        if episodes is not None:
            within &= np.isin(store.episode[:last], episodes)
        pairs = np.flatnonzero(within)
        if not len(pairs):
            raise UserError(f"no two frames are {frameskip} env steps apart: {store.path}; choose --distance latent")
        chosen = np.sort(np.random.default_rng(0).choice(pairs, min(len(pairs), FRAMES), replace=False))
        frames = np.unique(np.concatenate([chosen, chosen + frameskip]))
        size = int(np.prod(store.card.frame_shape))
        random = torch.Generator().manual_seed(0)
        project = torch.randn(size, SKETCH, generator=random) / SKETCH**0.5 if size > SKETCH else None
        parts = np.array_split(frames, max(1, len(frames) * size // 2**26))
        flat = (torch.from_numpy(store.gather(part)).flatten(1).float() for part in parts)
        points = torch.cat([part if project is None else part @ project for part in flat]).to(device)
        here, there = (torch.from_numpy(np.searchsorted(frames, end)) for end in (chosen, chosen + frameskip))
        reach = float((points[here] - points[there]).norm(dim=1).median())
        count = max(1, min(NODES, len(points) // FRAMES_PER_NODE))
        chosen_nodes = farthest_points(lambda i: (points - points[i]).square().sum(1), count)
        nodes, tokens = points[chosen_nodes], torch.from_numpy(store.gather(frames[chosen_nodes])).to(device)
        nearest = torch.cat([torch.cdist(part, nodes).argmin(1) for part in torch.split(points, 2048)])
        pairs = np.unique(np.sort([nearest[here].cpu().numpy(), nearest[there].cpu().numpy()], axis=0), axis=1)
        pairs = pairs[:, pairs[0] != pairs[1]]
        lengths = (nodes[pairs[0]] - nodes[pairs[1]]).norm(dim=1).cpu().numpy().astype(np.float64)
        edges = coo_array((np.maximum(lengths, 1e-9), (pairs[0], pairs[1])), shape=(len(nodes), len(nodes)))
        return cls(nodes, None if project is None else project.to(device), edges, reach, tokens)

    def sketch(self, latents: Tensor) -> Tensor:
        """[..., N, D] -> [..., d]."""
        flat = latents.flatten(-2)
        return flat if self.project is None else flat @ self.project

    def to_goal(self, goal: Tensor) -> Tensor:
        """Compute path lengths [E, K] from each node to goals [E, N, D]; nodes without a path are farther than all others."""
        distances = torch.cdist(self.sketch(goal), self.nodes)
        lengths = []
        for row in distances.cpu().numpy():
            near = np.flatnonzero(row <= max(self.reach, float(row.min())))
            lengths.append((row[near][:, None] + dijkstra(self.edges, directed=False, indices=near)).min(0))
        found = np.stack(lengths)
        finite = np.where(np.isfinite(found), found, 0).max(1, keepdims=True)
        return torch.from_numpy(np.where(np.isfinite(found), found, 2 * (finite + self.reach))).float().to(goal.device)

    def next_frames(self, latents: Tensor, goal: Tensor, to_goal: Tensor) -> Tensor:
        """Choose the frames [E, N, D] to go to next from frames [E, N, D]: the goals [E, N, D] within reach, else nodes towards them.

        Of the nodes within reach, or the nearest one, it is the one with the shortest path `to_goal` [E, K].
        """
        points = self.sketch(latents)
        to_node = torch.cdist(points, self.nodes)
        allowed = (to_node <= self.reach) | (to_node == to_node.amin(-1, keepdim=True))
        node = torch.where(allowed, to_goal, torch.inf).argmin(-1)
        near = (points - self.sketch(goal)).norm(dim=-1) <= self.reach
        return torch.where(near[:, None, None], goal, self.frames[node].to(goal.dtype))

    def distance(self, latents: Tensor, goal: Tensor, to_goal: Tensor) -> Tensor:
        """Compute path lengths [e, S, T] from frames [e, S, T, N, D] to goals [e, N, D], with `to_goal` [e, K], via a node within reach."""
        points = self.sketch(latents)
        flat = points.flatten(1, 2)
        to_node = torch.cdist(flat, self.nodes.expand(len(flat), -1, -1))
        # Beyond reach a latent distance may cross walls; the nearest node is always allowed.
        allowed = (to_node <= self.reach) | (to_node == to_node.amin(-1, keepdim=True))
        length = torch.where(allowed, to_node + to_goal[:, None], torch.inf).amin(-1)
        straight: Tensor = (flat - self.sketch(goal)[:, None]).norm(dim=-1)
        length = torch.where(straight <= self.reach, torch.minimum(length, straight), length)
        return length.view(points.shape[:3])
