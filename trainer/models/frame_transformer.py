"""What transformers over frames of tokens share: all frames of a window at once, and rollouts that keep keys and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmcache.trainer.models import Belief
from wmcache.trainer.models.attention import KeysValues
from wmcache.trainer.models.latent import Frames, LatentModel, pool_grid
from wmcache.trainer.models.trainable import SHIFT, shifted

Kept = list[KeysValues | None]
"""Of each block."""


class FrameTransformer(LatentModel):
    """A world model of `Block`s: a frame's tokens attend to those of the frame itself, and of the frames before it."""

    shifts = True
    blocks: nn.ModuleList

    def read(self, batch: Mapping[str, Tensor], pool: int) -> tuple[Frames, Frames, Tensor]:
        """Standardise and pool a batch; returns frames as the model sees them, frames as they are, and the actions that it sees."""
        shown = {name: shifted(batch, name) for name in ("tokens", "proprio", "action")}
        tokens, embedding, action = self.prepare(shown, pool)
        seen = real = tokens, embedding
        if any(SHIFT + name in batch for name in shown):
            real = self.prepare(batch, pool)[:2]
        return seen, real, action

    def prepare(self, batch: Mapping[str, Tensor], pool: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, standardised and pooled, an embedding of proprio, and standardised actions."""
        tokens, proprio, action = self.standardise(batch["tokens"], batch["proprio"], batch["action"])
        return pool_grid(tokens, self.shape.columns, pool), self.embed(proprio), action

    def keep(self, belief: Belief, patches: Tensor) -> Belief:
        """See `KeepsPatches.keep`."""
        return {**belief, "patches": patches}

    def grid_positions(self, slots: range, pool: int = 1, beside: int = 0, patches: Tensor | None = None) -> Tensor:
        """Return time, row and column of the tokens of frames at these slots, [T * tokens, 3], or of `patches` [B, K], [B, T * tokens, 3].

        Args:
            beside: tokens before the patches of each frame, which are only rotated in time.
        """
        device, columns = self.action_mean.device, self.shape.columns
        number = torch.arange(self.shape.tokens, device=device)
        grid = torch.stack([number // columns, number % columns], -1).float()
        grid = pool_grid(grid[None, None], columns, pool)[0, 0]
        grid = F.pad(grid if patches is None else grid[patches], (0, 0, beside, 0))
        time = torch.arange(slots.start, slots.stop, device=device, dtype=grid.dtype)
        grid = grid.unsqueeze(-3).expand(*grid.shape[:-2], len(time), -1, -1)
        times = time[:, None, None].expand(*grid.shape[:-1], 1)
        return torch.cat([times, grid], -1).flatten(-3, -2)

    @property
    @abstractmethod
    def relative(self) -> bool:
        """Whether only distances between frames matter, so that keys and values stay valid when the window moves."""

    @abstractmethod
    def enter(
        self,
        tokens: Tensor,
        embedding: Tensor,
        action: Tensor,
        slots: range,
        pool: int = 1,
        patches: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the first block's input [B, T, tokens, width] for frames at these slots of the window, and arguments of all blocks.

        Args:
            patches: [b, N], those of a frame that the tokens are, of which B / b sequences in a row have the same; None: all.
        """

    @abstractmethod
    def split(self, x: Tensor, tokens: Tensor, embedding: Tensor) -> Frames:
        """Return tokens and embedding of the next frames from the last block's output [B, T, tokens, width] at these."""

    def predict(
        self, tokens: Tensor, embedding: Tensor, action: Tensor, pool: int = 1, patches: Tensor | None = None
    ) -> Frames:
        """Take one step from each of T <= history frames, everything standardised and pooled already; `patches` as for `enter`."""
        x, arguments = self.enter(tokens, embedding, action, range(tokens.shape[1]), pool, patches)
        for block in self.blocks:
            x, _ = block(x, window=self.shape.history, **arguments)
        return self.split(x, tokens, embedding)

    def roll_out(
        self,
        tokens: Tensor,
        embedding: Tensor,
        futures: Tensor,
        samples: int,
        context: int,
        patches: Tensor | None = None,
    ) -> list[Frames]:
        """See `LatentModel.roll_out`."""
        # Keys and values of a frame are kept while its position in the window stays: until it is full, with relative positions always.
        past = futures[::samples]
        observed = tokens.shape[1]
        frames = [(tokens[:, t : t + 1], embedding[:, t : t + 1]) for t in range(observed)]
        kept: Kept = [None] * len(self.blocks)
        known, copies = 0, 1  # frames whose keys and values are kept; for how many futures of each sequence
        for end in range(observed, futures.shape[1] + 1):
            start = max(0, end - context)
            if start and not self.relative:
                kept, known, copies = [None] * len(self.blocks), 0, 1
            for t in range(max(start, known), end):
                if t >= observed - 1 and copies != samples:  # up to here all futures are equal
                    kept = [None if one is None else one.repeat(samples) for one in kept]
                    copies = samples
                frame = [part.repeat_interleave(copies // (len(part) // len(tokens)), 0) for part in frames[t]]
                action = (past if copies == 1 else futures)[:, t : t + 1]
                slot = t if self.relative else t - start
                following = self._advance(frame, action, slot, kept, context, patches, wanted=t == end - 1)
            known = end if self.relative or not start else 0
            assert following is not None
            frames.append(following)
        return frames[observed:]

    def _advance(
        self,
        frame: list[Tensor],
        action: Tensor,
        slot: int,
        kept: Kept,
        context: int,
        patches: Tensor | None,
        *,
        wanted: bool,
    ) -> Frames | None:
        """Add a frame to the keys and values that are kept; return its successor where it is `wanted`."""
        x, arguments = self.enter(frame[0], frame[1], action, range(slot, slot + 1), patches=patches)
        for number, block in enumerate(self.blocks):
            only_keys = not wanted and number == len(self.blocks) - 1
            x, kept[number] = block(x, past=kept[number], only_keys=only_keys, window=context, first=slot, **arguments)
        return self.split(x, *frame) if wanted else None
