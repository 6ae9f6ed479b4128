"""The folder of a trained controller.

config.json                 the run whose model it acts with, and all settings
controller.safetensors      the parameters: the mean of the search
state.safetensors           the search, to go on with
generations.jsonl           one line a generation
controller.png              the same as a picture
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from wmcache.common.errors import UserError, reason
from wmcache.common.files import write_whole
from wmcache.common.jsonfiles import read_json
from wmcache.common.schema import Size, parse
from wmcache.common.tensors import load_tensors
from wmcache.planner.belief import require_dreams
from wmcache.planner.context import EvalContext
from wmcache.planner.controllers.linear import Linear
from wmcache.planner.controllers.options import Choice
from wmcache.planner.options import policy_weights
from wmcache.trainer.dreaming import require_model_of
from wmcache.trainer.models import Dreams

HINT = "train a controller with: wmcache controller --run RUN"


@dataclass(frozen=True)
class ControllerConfig:
    """What config.json has beside the options of the training.

    Attributes:
        run: path of the world model's run. model_sha256: of its weights.
        size: numbers of the inputs.
        choose: see `Linear`.
    """

    policy: Literal["controller"]
    run: str
    model_sha256: str
    inputs: list[str]
    size: Size
    choose: Choice | None
    options: dict[str, Any]


def read_controller(folder: Path) -> ControllerConfig:
    """Read config.json; raises UserError where the folder is not a controller's."""
    file = folder / "config.json"
    return parse(ControllerConfig, read_json(file, HINT), file, HINT, fault="is not a controller's")


def write_solution(folder: Path, solution: Tensor) -> None:
    """Write the parameters [n], atomically."""
    write_whole(policy_weights(folder), save({"solution": solution.float().contiguous()}))


def read_solution(folder: Path, parameters: int) -> Tensor:
    """Read the parameters [n]; raises UserError where they are missing, damaged or not so many."""
    file = policy_weights(folder)
    try:
        found = load_tensors(file)["solution"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}); {HINT}") from error
    if found.shape != (parameters,) or found.dtype != torch.float32 or not found.isfinite().all():
        raise UserError(f"{file} does not have {parameters} finite float32 parameters; {HINT}")
    return found


def read_start(folder: Path, linear: Linear) -> Tensor:
    """Read the parameters that a search for `linear` starts from; raises UserError where that is another controller."""
    config = read_controller(folder)
    if (tuple(config.inputs), config.size, config.choose) != (linear.inputs, linear.size, linear.choose):
        found = f"{','.join(config.inputs)}, {config.size} numbers"
        raise UserError(
            f"--from {folder} has other inputs ({found}, {config.choose}); choose them with --inputs, --choose and --squash"
        )
    return read_solution(folder, linear.parameters)


def linear_of(context: EvalContext, inputs: Sequence[str], choose: Choice | None) -> Linear:
    """Make the controller that acts with a loaded run."""
    low, high = (torch.from_numpy(bound).to(context.device) for bound in context.action_bounds)
    return Linear.of(require_dreams(context), inputs, (low, high), context.frameskip, choose)


def load_linear(
    folder: Path, run: Path, model: Dreams, bounds: tuple[Tensor, Tensor], frameskip: int
) -> tuple[Linear, Tensor]:
    """Load the controller of a folder, and its parameters [n]; raises UserError where it was trained with another model.

    Args:
        run, model: of the world model. bounds: of env actions, [A] each.
    """
    config = read_controller(folder)
    require_model_of(folder, config.run, config.model_sha256, run)
    linear = Linear.of(model, config.inputs, bounds, frameskip, config.choose)
    return linear, read_solution(folder, linear.parameters)
