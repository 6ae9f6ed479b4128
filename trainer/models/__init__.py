"""World models: one file for each, one registry.

To add one, write a file with an options dataclass and an `nn.Module` that is a `WorldModel`, and add both to MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from wmcache.cache.errors import UserError
from wmcache.trainer.models.base import DataShape, WorldModel
from wmcache.trainer.models.dino_wm import DinoWm, DinoWmOptions

MODELS: dict[str, tuple[type[Any], Callable[..., nn.Module]]] = {"dino-wm": (DinoWmOptions, DinoWm)}
"""Name -> (options dataclass, module)."""


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
    if name not in MODELS:
        raise UserError(f"no world model {name!r}; known are {', '.join(MODELS)}")
    make_options, make_model = MODELS[name]
    try:
        chosen = make_options(**options)
    except TypeError as error:
        raise UserError(f"world model {name} has no such option ({error})") from error
    if chosen.width % chosen.heads:
        raise UserError(f"--width {chosen.width} is not a multiple of --heads {chosen.heads}")
    return make_model(shape, chosen, statistics)


__all__ = ["MODELS", "DataShape", "WorldModel", "build"]
