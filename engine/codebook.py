"""Codebooks whose entries are moving means of the tokens nearest to them (VQ-VAE, arXiv 1711.00937, appendix A.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEAD = 0.01  # an entry is dead where its count is below this share of an equal distribution


def nearest(tokens: Tensor, entries: Tensor) -> Tensor:
    """Return the number of the nearest entry [codes, dim] of each token, [..., dim] -> [...]."""
    return torch.cdist(tokens.flatten(0, -2), entries).argmin(1).view(tokens.shape[:-1])


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
        """Move the means towards tokens [n, dim], whose nearest entries have these numbers [n]."""
        count = torch.bincount(numbers, minlength=len(self.count)) / unit
        total = torch.zeros_like(self.total).index_add_(0, numbers, tokens) / unit
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
            flat = tokens.float().flatten(0, 1)
            share = len(flat) / len(self.count)
            dead = self.count < DEAD * share
            if self.training and dead.any():
                chosen = flat.detach()[torch.randint(len(flat), (int(dead.sum()),)).to(flat.device)]
                self.restart(dead, chosen, share)
                self.entries[dead] = chosen
            numbers = nearest(flat, self.entries)
            chosen = self.entries[numbers].view_as(tokens)
            if self.training:
                self.update(flat.detach(), numbers)
                self.entries.copy_(self.means())
            return tokens + (chosen - tokens).detach(), F.mse_loss(tokens.float(), chosen)
