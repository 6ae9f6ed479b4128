"""Distraction: other colours, another camera, a moving background, as in the Distracting Control Suite (arXiv 2101.02722)."""

from wmcache.envs.distract.looks import Distraction, Look, distraction_of, split_name

__all__ = ["Distraction", "Look", "distraction_of", "split_name"]
