"""DINO-WM's rope and granular on MuJoCo: a robot's tool pushes an object on a table, a whole push per env step."""

from wmcache.envs.deformable.environment import Granular, Rope

__all__ = ["Granular", "Rope"]
