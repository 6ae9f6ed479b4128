"""Codebooks whose entries are moving means of the tokens nearest to them (VQ-VAE, arXiv 1711.00937, appendix A.1)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

DEAD = 0.01  # an entry is dead where its count is below this share of an equal distribution


def nearest(tokens: Tensor, entries: Tensor) -> Tensor:
    """Return the number of the nearest entry [codes, dim] of each token, [..., dim] -> [...]."""
    return torch.cdist(tokens.flatten(0, -2), entries).argmin(1).view(tokens.shape[:-1])


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class MovingMeans(nn.Module):
    """Exponential moving counts and sums of the tokens nearest to each entry, in units of `unit` tokens."""

    count: Tensor
    total: Tensor

    def __init__(self, count: Tensor, total: Tensor, decay: float) -> None:
        """Start from counts [codes] and sums [codes, dim], which decay at each update."""
        super().__init__()
        self.decay = decay
        self.register_buffer("count", count)
        self.register_buffer("total", total)

    def means(self) -> Tensor:
        """Return the entries, [codes, dim]."""
        return self.total / self.count.clamp_min(1e-12)[:, None]

    @torch.no_grad()
    def update(self, tokens: Tensor, numbers: Tensor, unit: float = 1.0) -> None:
        """Move the means towards tokens [n, dim] of all ranks, whose nearest entries have these numbers [n]."""
        count = torch.bincount(numbers, minlength=len(self.count)) / unit
        total = torch.zeros_like(self.total).index_add_(0, numbers, tokens) / unit
        if world_size() > 1:
            for found in (count, total):
                dist.all_reduce(found)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)

    @torch.no_grad()
    def restart(self, dead: Tensor, tokens: Tensor, count: float = 1.0) -> None:
        """Replace the entries marked in `dead` [codes] by so many tokens [dead, dim], each as if it had this count."""
        self.total[dead], self.count[dead] = tokens * count, count


class Codebook(MovingMeans):
    """Rounds tokens to the nearest entry.

    Entries with few near tokens restart as tokens of the batch (Jukebox, arXiv 2005.00341, section 3.1), all of them at the first step:
    of entries at random only a handful would ever be used.
    """

    entries: Tensor

    def __init__(self, codes: int, dim: int, decay: float) -> None:
        """Build it with `codes` entries of `dim` channels."""
        super().__init__(torch.zeros(codes), torch.zeros(codes, dim), decay)
        self.register_buffer("entries", torch.zeros(codes, dim))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> the nearest entry of each, with the gradient of the tokens, and their mean squared distance."""
        with torch.autocast(tokens.device.type, enabled=False):
            chosen = self.choose(tokens)[1]
            return tokens + (chosen - tokens).detach(), F.mse_loss(tokens.float(), chosen)

    @torch.no_grad()
    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> the numbers [B, N] of the nearest entries, and these [B, N, D]; in training the entries then move towards tokens."""
        flat = tokens.float().flatten(0, 1)
        share = len(flat) * world_size() / len(self.count)
        dead = self.count < DEAD * share
        if self.training and dead.any():
            chosen = flat[torch.randint(len(flat), (int(dead.sum()),)).to(flat.device)]
            if world_size() > 1:
                dist.broadcast(chosen, 0)
            self.restart(dead, chosen, share)
            self.entries[dead] = chosen
        numbers = nearest(flat, self.entries)
        chosen = self.entries[numbers].view_as(tokens)
        if self.training:
            self.update(flat, numbers)
            self.entries.copy_(self.means())
        return numbers.view(tokens.shape[:-1]), chosen
