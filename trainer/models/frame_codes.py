"""A tokenizer of frames of cached latents: a vector-quantised autoencoder in token space (VQ-VAE, arXiv 1711.00937, as in IRIS)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wmcache.engine.codebook import Codebook

DECAY = 0.95  # short, because the transformer has to learn what each restart of entries changes
POSITION_STD = 0.02
FEWEST_CODES = 4
"""Of a frame, where that is not chosen."""


class Coded(NamedTuple):
    """Frames and their codes.

    Attributes:
        numbers: [B, K], of the entries. entries: [B, K, dim].
        decoded: [B, N, D].
        distance: mean squared one of the encoder's outputs from the entries; trains the encoder.
    """

    numbers: Tensor
    entries: Tensor
    decoded: Tensor
    distance: Tensor


class FrameCodes(nn.Module):
    """Encodes a grid of tokens [B, N, D] as K codes, and decodes these.

    A grid of more tokens than `cells` is averaged to at most sqrt(cells) x sqrt(cells) cells. Each cell has `cell_codes` codes, each of a
    codebook of its own that all cells share (product quantisation, Jégou et al. 2011); 0: as many as make a frame of 4. Codes are in
    the order of the cells. Entries are moving means, and unused ones restart; with gradients, as in IRIS, few were ever used.
    """

    pool: Tensor
    spread: Tensor

    def __init__(
        self, grid: tuple[int, int], dim: int, cells: int, cell_codes: int, book: tuple[int, int], hidden: int
    ) -> None:
        """Take sizes.

        Args:
            grid: rows and columns. dim: of a token.
            book: entries of a codebook, and their dimensions.
            hidden: channels of the hidden layers.
        """
        super().__init__()
        (rows, columns), side = grid, math.isqrt(cells)
        self.grid = grid
        self.cells = grid if rows * columns <= cells else (min(rows, side), min(columns, side))
        self.groups = cell_codes or max(1, FEWEST_CODES // math.prod(self.cells))
        self.codes, self.code_dim = math.prod(self.cells) * self.groups, book[1]
        tokens = rows * columns
        # As matrices, because PyTorch's kernels on CUDA have no deterministic gradient.
        pool = F.adaptive_avg_pool2d(torch.eye(tokens).view(tokens, 1, rows, columns), self.cells).flatten(1).T
        spread = F.interpolate(
            torch.eye(len(pool)).view(-1, 1, *self.cells), (rows, columns), mode="bilinear", align_corners=False
        )
        self.register_buffer("pool", pool.contiguous(), persistent=False)
        self.register_buffer("spread", spread.flatten(1).T.contiguous(), persistent=False)
        self.books = nn.ModuleList(Codebook(*book, DECAY) for _ in range(self.groups))
        kernel = 3 if tokens > 1 else 1
        self.read = nn.Linear(dim, hidden)
        self.read_position = nn.Parameter(POSITION_STD * torch.randn(tokens, hidden))
        self.mix_read = nn.Conv2d(hidden, hidden, kernel, padding="same")
        self.to_codes = nn.Linear(hidden, self.groups * self.code_dim)
        self.from_codes = nn.Linear(self.groups * self.code_dim, hidden)
        self.mix_cells = nn.Conv2d(hidden, hidden, kernel, padding="same")
        self.write_position = nn.Parameter(POSITION_STD * torch.randn(tokens, hidden))
        self.mix_written = nn.Conv2d(hidden, hidden, kernel, padding="same")
        self.write = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Coded:
        """Encode and decode frames [B, N, D]; the decoder's gradient passes straight through to the encoder."""
        with torch.autocast(tokens.device.type, enabled=False):
            outputs = self._read(tokens.float())
            numbers, entries = self._choose(outputs)
            passed = outputs + (entries - outputs).detach()
            return Coded(numbers, entries, self.decode(passed), F.mse_loss(outputs, entries))

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """Return the entries [B, K, dim] of frames."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self._choose(self._read(tokens.float()))[1]

    def decode(self, entries: Tensor) -> Tensor:
        """Decode entries [B, K, dim], or means of several, [B, N, D]."""
        with torch.autocast(entries.device.type, enabled=False):
            x = self.from_codes(rearrange(entries.float(), "b (p g) c -> b p (g c)", g=self.groups))
            x = F.gelu(x + convolve(self.mix_cells, F.gelu(x), self.cells))
            if self.cells != self.grid:
                x = self.spread @ x
            x = x + self.write_position
            x = F.gelu(x + convolve(self.mix_written, F.gelu(x), self.grid))
            decoded: Tensor = self.write(x)
        return decoded

    def mean_entry(self, shares: Tensor, k: int) -> Tensor:
        """Return the mean [B, dim] of what code k can be, by the share of each entry [B, vocabulary]."""
        with torch.autocast(shares.device.type, enabled=False):
            return shares.float() @ self._book(k % self.groups).entries

    def _book(self, group: int) -> Codebook:
        book = self.books[group]
        assert isinstance(book, Codebook)
        return book

    def _read(self, tokens: Tensor) -> Tensor:
        x = F.gelu(self.read(tokens) + self.read_position)
        if self.cells != self.grid:
            x = self.pool @ x
        x = F.gelu(x + convolve(self.mix_read, x, self.cells))
        outputs: Tensor = self.to_codes(x)
        return outputs.reshape(len(x), -1, self.code_dim)

    def _choose(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        cells = rearrange(outputs, "b (p g) c -> g b p c", g=self.groups)
        found = [self._book(group).choose(own) for group, own in enumerate(cells)]
        numbers, entries = (torch.stack(part, 2).flatten(1, 2) for part in zip(*found, strict=True))
        return numbers, entries


def convolve(layer: nn.Conv2d, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Apply a convolution to cells [B, rows * columns, channels]."""
    mixed: Tensor = layer(rearrange(x, "b (r c) d -> b d r c", r=grid[0]))
    return rearrange(mixed, "b d r c -> b (r c) d")
