"""Distraction: other colours, another camera, a moving background, as in the Distracting Control Suite (arXiv 2101.02722)."""

from wmcache.envs.distract.looks import KINDS, Distraction, Look, split_name

__all__ = ["KINDS", "Distraction", "Look", "split_name"]
