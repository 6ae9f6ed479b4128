"""How far imagined latents are from a goal (DINO-WM, planning/objectives.py)."""

from __future__ import annotations

from torch import Tensor

MODES = ("last", "all")


def goal_distance(latents: Tensor, goal: Tensor, mode: str) -> Tensor:
    """Mean squared difference of latents and goal, in the encoder's own units.

    `last` scores the last imagined frame alone, as DINO-WM does; it is content to arrive at the very end, at every replan anew.
    `all` averages over all imagined frames, and so prefers to arrive early and to stay.

    Args:
        latents: [E, S, T, N, D], S imagined futures of T frames for each of E episodes.
        goal: [E, N, D].
        mode: one of MODES.

    Returns:
        [E, S].
    """
    if mode not in MODES:
        raise ValueError(f"objective {mode!r} is none of {MODES}")
    if mode == "last":
        latents = latents[:, :, -1:]
    return (latents - goal[:, None, None]).square().mean((2, 3, 4))
