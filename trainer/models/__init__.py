"""World models: one file for each, one registry.

To add one, write a file with an options dataclass and an `nn.Module` that is a `WorldModel`, and add both to MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from wmcache.common.errors import UserError
from wmcache.common.options import parse_options
from wmcache.trainer.models.base import DataShape, WorldModel
from wmcache.trainer.models.ddp_wm import DdpWm, DdpWmOptions
from wmcache.trainer.models.dino_wm import DinoWm, DinoWmOptions

MODELS: dict[str, tuple[type[Any], Callable[..., nn.Module]]] = {
    "dino-wm": (DinoWmOptions, DinoWm),
    "ddp-wm": (DdpWmOptions, DdpWm),
}
"""Name -> (options dataclass, module)."""
DEFAULTS = {"stages": (), "pools": False}
"""Attributes of a model that does not define them; see `LatentModel`."""


def get_options(name: str) -> type[Any]:
    """The options dataclass of a model; raises UserError where there is none of that name."""
    if name not in MODELS:
        raise UserError(
            f"no world model {name!r}; known are {', '.join(MODELS)}; a model of your own must be registered first "
            "(CONTRIBUTING.md, Add a world model)"
        )
    return MODELS[name][0]


def read_options(name: str, options: Mapping[str, Any]) -> Any:
    """A model's options dataclass from its fields, those that are missing at their defaults.

    Raises:
        UserError: unknown model or option, or values that do not fit.
    """
    return parse_options(get_options(name), dict(options), f"world model {name}")


def build(name: str, shape: DataShape, options: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Any:
    """A new model: an `nn.Module` that is also a `WorldModel`.

    Args:
        name: in MODELS.
        shape: sizes of the data.
        options: fields of the model's options dataclass.
        statistics: means and standard deviations of the data (see `DinoWm`).

    Raises:
        UserError: unknown name or option, or sizes that do not fit.
    """
    chosen = read_options(name, options)
    model = MODELS[name][1](shape, chosen, statistics)
    for attribute, default in DEFAULTS.items():
        if not hasattr(model, attribute):
            setattr(model, attribute, default)
    return model


__all__ = ["MODELS", "DataShape", "WorldModel", "build", "get_options", "read_options"]
