"""The card of a token store."""

from __future__ import annotations

from wmcache.cache.identity import Identity
from wmcache.cache.layout import StoreCard
from wmcache.common.columns import Columns
from wmcache.common.readme import Readme, size_category


def encoder_facts(card: StoreCard, identity: Identity) -> dict[str, object]:
    """Return what the tokens of a store are."""
    rows, columns = card.token_grid
    return {
        "encoder": identity.encoder,
        "encoder's licence": card.licence,
        "weights": identity.weights_source,
        "weights' SHA-256": identity.weights_sha256,
        "layer, tokens": f"{identity.layer}, {identity.token_selection}",
        "image": f"{identity.image_size} x {identity.image_size}, {identity.resize}",
        "computed in": identity.compute_dtype,
        "tokens of a frame": f"{rows} x {columns} of {card.token_dim} numbers, {card.dtype}",
    }


def dataset_facts(card: StoreCard, identity: Identity) -> dict[str, object]:
    """Return what the frames of a store are."""
    return {
        "dataset": card.dataset.get("name"),
        "environment": card.dataset.get("env"),
        "behaviour policy": card.dataset.get("policy"),
        "frames": card.frames,
        "fingerprint of the dataset": identity.dataset_fingerprint,
    }


def title_of(what: str, card: StoreCard) -> str:
    """Return the title of a card, which does not depend on the name of a folder: a copy is equal to the byte."""
    return f"{what} of {card.dataset.get('name', 'frames')}"


def store_readme(card: StoreCard, identity: Identity, columns: Columns) -> Readme:
    """Describe a finished store by the facts in its attributes."""
    front = {"task_categories": ["robotics"], "size_categories": [size_category(card.frames)]}
    summary = "Patch tokens of every frame of a dataset, with the step table: a Zarr v3 group."
    found = Readme(
        title_of(f"{identity.encoder} tokens", card), summary, ["world-model", "zarr", identity.encoder], front
    )
    found.facts(dataset_facts(card, identity) | encoder_facts(card, identity))
    found.columns(columns)
    found.block("Use", ["wmtrain --cache STORE", "wmcache verify STORE"])
    opened = ['store = wmcache.TokenStore.open("STORE")', "tokens = store.gather([7, 3, 3])  # float16 [3, N, D]"]
    found.block("Read", ["import wmcache", "", *opened], "python")
    return found
