"""World models: a file or a folder for each, registered by `@MODELS.register("name")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wmcache.common.options import parse_options
from wmcache.common.registry import Registry
from wmcache.trainer.models.base import DataShape, Localizes, WorldModel

MODELS: Registry[type[WorldModel]] = Registry("world model", package=__name__, group="wmcache.models")


def read_options(name: str, options: Mapping[str, Any]) -> Any:
    """Make a model's options from some of their values; raises UserError for an unknown model or option, or values that do not fit."""
    return parse_options(MODELS.get(name).Options, dict(options), f"world model {name}")


def build(name: str, shape: DataShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> WorldModel:
    """Make a new model, see `WorldModel`; raises UserError for an unknown name or option, or sizes that do not fit."""
    return MODELS.get(name)(shape, read_options(name, options), statistics)


__all__ = ["MODELS", "DataShape", "Localizes", "WorldModel", "build", "read_options"]
