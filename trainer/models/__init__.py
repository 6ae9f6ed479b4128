"""World models: one file for each, one registry.

To add one, write a file with an options dataclass and an `nn.Module` that is a `WorldModel`, and add both to MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError
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
    known = [field.name for field in fields(make_options)]
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"world model {name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        chosen = TypeAdapter(make_options).validate_python(dict(options))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"world model {name}, option {wrong['loc'][0]}: {wrong['msg']}") from error
    return make_model(shape, chosen, statistics)


__all__ = ["MODELS", "DataShape", "WorldModel", "build"]
