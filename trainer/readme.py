"""The card of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmcache.cache.readme import dataset_facts, encoder_facts, title_of
from wmcache.common.readme import Readme, write_readme
from wmcache.trainer.runs import read_config, read_identity
from wmcache.trainer.trained import last_validation

LEFT_OUT = {"model", "model_options", "cache", "shape", "start", "device", "residence", "compile", "imported"}
"""Settings with a row of their own, and those of one machine."""


def write_run_readme(run: Path) -> None:
    """Describe a run by the facts in its JSON files."""
    write_readme(run, run_readme(read_config(run), run))


def run_readme(config: Mapping[str, Any], run: Path) -> Readme:
    """Return the card of a run with these settings."""
    card, identity = read_identity(run)
    summary = "A model trained purely on cached latents, for planning."
    tags = ["world-model", "reinforcement-learning", str(config["model"]), identity.encoder]
    found = Readme(
        title_of(f"{config['model']} on {identity.encoder} tokens", card), summary, tags, {"pipeline_tag": "robotics"}
    )
    found.facts({"model": config["model"], **dataset_facts(card, identity), **encoder_facts(card, identity)})
    figures = [(figure, "-" if value is None else f"{value:.4g}") for figure, value in last_validation(run).items()]
    found.table("Validation", ("figure", "last value"), figures)
    found.facts(dict(config["model_options"]), "Options of the model")
    found.facts({key: value for key, value in config.items() if key not in LEFT_OUT}, "Settings of the training")
    found.block("Use", ["wmplan --run RUN"])
    return found
