"""A fit as a user asks for it: on the frames of a dataset, or for an adapter on its base's store, which is made if it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wmcache.cache.store import TokenStore
from wmcache.cluster.tasks import run_alone
from wmcache.common.errors import UserError
from wmcache.common.folders import home
from wmcache.common.paths import AnyPath, absolute, as_path
from wmcache.pipeline import encoders
from wmcache.pipeline.encoders import Encoder, FitOptions
from wmcache.pipeline.extract import extract_together
from wmcache.pipeline.fit import Fitted, fit, fit_adapter
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.stores import create_encoders, default_store, default_weights, frames_of


@dataclass(frozen=True)
class FitJob:
    """What a fit reads and writes.

    Attributes:
        frames: path of those to fit on, or to measure on; None where a store's frames are not available.
        store: path of the store of an adapter's base; None for other encoders.
        out: the weights file.
    """

    name: str
    options: FitOptions
    frames: str | None
    store: str | None
    out: Path

    @property
    def unmeasured(self) -> str:
        """Explain why the landscape of such a fit is not known."""
        if self.frames is not None:
            return f"{self.frames} has no maze, so the true distances are not known"
        where = TokenStore.open(as_path(str(self.store))).card.dataset.get("path")
        return f"the frames of {self.store} are not at {where}; pass their location with --dataset"

    def run(self, cluster: str, **settings: Any) -> Fitted:
        """Fit in a process of the cluster; `settings` are those of `fit.fit`, and of an adapter `base_weights`."""
        return run_alone(partial(self._fit, self.out.absolute(), **settings), cluster=cluster, label=f"fit {self.name}")

    def _fit(self, out: Path, **settings: Any) -> Fitted:
        frames = None if self.frames is None else FrameDataset.open(as_path(self.frames))
        if self.store is None:
            assert frames is not None
            return fit(frames, self.name, out, self.options, **settings)
        store = TokenStore.open(as_path(self.store))
        return fit_adapter(store, self.name, out, self.options, dataset=frames, **settings)


def prepare_fit(
    name: str,
    options: Mapping[str, Any],
    *,
    dataset: AnyPath | None,
    cache: AnyPath | None,
    base: str | None,
    base_weights: Path | None,
    out: Path | None,
    device: str,
    cluster: str,
) -> FitJob:
    """Find what a fit needs.

    Args:
        options: of the fit; the rest have the encoder's defaults.
        dataset: the frames; None takes the default dataset, or with `cache` the store's.
        cache: for an adapter, the store of its base; None takes the default one, and extracts it if it is missing.
        base, base_weights: for an adapter, the encoder of that store, and its weights.
        out: the weights file; None takes the default one.
        device, cluster: for the extraction.

    Raises:
        UserError: unknown encoder or option, settings that do not go together, or no dataset or store.
    """
    chosen, entry = encoders.fit_options(name, options), encoders.get_entry(name)
    if entry.load is not None:
        if cache or base or base_weights:
            raise UserError(f"encoder {name} is fitted on frames, not on a store; leave out --cache and --base")
        frames = open_dataset(dataset)
        return FitJob(name, chosen, absolute(frames.path), None, out or default_weights(frames.card.name, name))
    if cache and base:
        raise UserError("--cache has the store that the adapter is fitted on; leave out --base")
    known = None if cache and dataset is None and not chosen.needs_images else open_dataset(dataset)
    if cache is None:
        assert known is not None
        weights = [str(base_weights)] if base_weights else []
        (encoder,) = create_encoders(known.card.name, names=base or entry.base, weights=weights, device=device)
        cache = default_store(known.card.name, encoder)
        extract_together(known, [(encoder, cache)], cluster=cluster, device=device)
    store = TokenStore.open(cache)
    with suppress(UserError):  # without frames, the fit is not measured
        known = known or frames_of(store)
    out = out or default_weights(str(store.card.dataset["name"]), name)
    return FitJob(name, chosen, absolute(known.path) if known else None, absolute(store.path), out)


def open_dataset(path: AnyPath | None) -> FrameDataset:
    """Open a dataset, or the default one."""
    return FrameDataset.open(path or home() / "pointmaze-umaze")


def open_inputs(dataset: AnyPath | None, encoder: dict[str, Any]) -> tuple[FrameDataset, list[Encoder]]:
    """Open a dataset, and create encoders with its fitted weights; `encoder` has arguments of `create_encoders`."""
    frames = open_dataset(dataset)
    return frames, create_encoders(frames.card.name, **encoder)
