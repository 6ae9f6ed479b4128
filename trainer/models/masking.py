"""Tokens that training leaves out, so that a model learns to imagine some of a frame without the others.

Sparse Imagination (arXiv 2506.01392) draws how many for each batch, and lets both groups attend to themselves alone. Here the group that is
left out is not computed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Masking = Literal["none", "random", "block", "foreground"]


def draw_patches(masking: Masking, most: float, tokens: Tensor, columns: int) -> Tensor | None:
    """Draw the patches that a batch keeps, int64 [B, K] in order, the same in all frames of a window; None: all.

    Args:
        masking: what is left out: `random` patches, those nearest to a random one (`block`), or those that change most within the window
            (`foreground`).
        most: largest share that is left out. How many are is uniform up to it, the same for all windows.
        tokens: [B, T, N, D]. columns: of their grid.
    """
    batch, _, patches, _ = tokens.shape
    count = 0 if masking == "none" else int(torch.randint(int(most * patches) + 1, ()))
    if not count:
        return None
    order = torch.rand(batch, patches, device=tokens.device)
    if masking == "foreground":
        order = tokens.diff(dim=1).square().mean((1, 3))
    elif masking == "block":
        number = torch.arange(patches, device=tokens.device)
        grid = torch.stack([number // columns, number % columns], 1)
        centre = grid[torch.randint(patches, (batch,)).to(tokens.device)]
        order = order - (grid - centre[:, None]).abs().amax(2)  # equally near ones stay in random order
    return order.topk(patches - count, largest=False).indices.sort(1).values
