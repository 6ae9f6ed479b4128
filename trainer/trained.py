"""A run on disk as an object, as `wmcache.train` returns it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmcache.common.device import choose_device
from wmcache.common.errors import UserError, reason
from wmcache.engine.loop import Figures
from wmcache.trainer.models import Trainable
from wmcache.trainer.runs import load_trained, read_config


@dataclass(frozen=True)
class Run:
    """A run of `wmtrain`; `path` is its folder."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """All settings, the content of `config.json`; raises UserError where the folder is not a run."""
        return read_config(self.path)

    @property
    def validation(self) -> Figures:
        """The figures of the last validation, empty where there was none; None is a figure that is not defined."""
        return last_validation(self.path)

    def load(self, device: str = "auto") -> Trainable:
        """Load the newest model or policy, frozen; raises UserError where there is none."""
        return load_trained(self.path, choose_device(device))


def last_validation(run: Path) -> Figures:
    """Read the figures of a run's last validation from metrics.jsonl; empty where there was none."""
    file = run / "metrics.jsonl"
    try:
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
        # A line of the training has its loss.
        found: dict[str, Any] = next((line for line in reversed(list(lines)) if "loss" not in line), {})
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({reason(error)}); restore it, or replace it by an empty file"
        ) from error
    return {name: value for name, value in found.items() if name != "step"}
