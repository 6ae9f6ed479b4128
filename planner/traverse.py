"""Latent traversals: frames drawn while one channel of a frame's latent is moved."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.figures import png_bytes
from wmcache.common.files import make_folder, write_whole
from wmcache.common.jsonfiles import nulls, write_json
from wmcache.common.options import check_options
from wmcache.common.paths import AnyPath
from wmcache.pipeline.disentanglement import measure_information
from wmcache.pipeline.frames import FrameDataset
from wmcache.pipeline.probe import find_geometry, state_names
from wmcache.pipeline.repair import open_source
from wmcache.pipeline.stores import frames_of
from wmcache.planner.decode import Decode, open_trained
from wmcache.planner.options import TraverseOptions
from wmcache.trainer.metrics import Images

STEPS = 7
"""Drawn values of a latent; the middle one is the frame's own."""


def traverse(
    path: AnyPath,
    out: Path,
    options: TraverseOptions | None = None,
    *,
    dataset: AnyPath | None = None,
    weights: Path | None = None,
    decoder: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Draw the traversals of a store's latents, a PNG at `out`, and write the figures beside it with the suffix `.json`.

    Latents of the largest variance come first: channels of a VAE that its decoder ignores have a small one, but may know much of the state.

    Args:
        dataset, weights: the store's frames and its encoder's weights, if they have moved.
        decoder: of a store of the same encoder, trained with `wmtrain decoder`; None: the encoder's own.

    Returns:
        The content of the JSON file: `deviations`, by how many standard deviations the columns move a latent; and of each of `latents` its
        channel `latent`, the frame's `value`, the `std` over the store, `information`, the share of the entropy of each state column (None
        without a state), and `change`, the mean absolute difference of the moved images from the one not moved, of values in [0, 1].

    Raises:
        UserError: frames of several tokens, a frame that does not exist, an encoder without a decoder, or other frames or weights.
    """
    options = options or TraverseOptions()
    check_options(options)
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; end its name with .png")
    store = _open_store(path, options.frame)
    frames, decode = _open_source(store, dataset, weights, decoder, device)
    information = measure_information(store)
    chosen = np.argsort(-store.std, kind="stable")[: options.latents]
    deviations = np.linspace(-options.width, options.width, STEPS)
    latent = store.gather(np.array([options.frame]))[0, 0].astype(np.float32)
    moved = np.tile(latent, (len(chosen), STEPS, 1))
    moved[np.arange(len(chosen)), :, chosen] += store.std[chosen, None] * deviations.astype(np.float32)
    images = decode(torch.from_numpy(moved.reshape(-1, 1, len(latent))))
    images = images.reshape(len(chosen), STEPS, *images.shape[1:])
    result = {
        "options": asdict(options),
        "store": str(path),
        "encoder": store.identity.encoder,
        "decoder": decoder and str(decoder),
        "episode": int(store.episode[options.frame]),
        "step": int(store.step[options.frame]),
        "deviations": deviations.tolist(),
        "latents": _describe(store, chosen, latent, information, images),
        "picture": str(out),
    }
    make_folder(out.parent)
    write_whole(out, draw_traversals(frames.read_frames([options.frame])[0], images, result))
    write_json(out.with_suffix(".json"), result)
    return result


def most_informed(latent: dict[str, Any]) -> tuple[str, float] | None:
    """Return the state column that a latent of `traverse` knows most of, and the share that it knows; None where that is not known."""
    known = {name: share for name, share in (latent["information"] or {}).items() if share is not None}
    return max(known.items(), key=lambda item: item[1], default=None)


def draw_traversals(frame: NDArray[np.uint8], images: Images, result: dict[str, Any]) -> bytes:
    """Draw latents as rows, the frame [S, S, 3] and then the images [latents, STEPS, S, S, 3] as columns; returns a PNG."""
    rows, columns = len(images), STEPS + 1
    figure = Figure(figsize=(1.15 * columns + 0.5, 1.15 * rows + 0.6), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    titles = ["frame", *(f"{value:+.2g}" if value else "decoded" for value in result["deviations"])]
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    for line, latent, row in zip(panels, result["latents"], images, strict=True):
        for axes, image in zip(line, [frame, *row], strict=True):
            axes.imshow(image)
        about = most_informed(latent)
        label = "" if about is None else f"\n{about[0]} {about[1]:.2f}"
        line[0].set_ylabel(f"latent {latent['latent']}{label}", fontsize=8, parse_math=False)
    figure.suptitle(
        f"{Path(result['store']).name}: episode {result['episode']}, step {result['step']}; latents moved by standard deviations",
        fontsize=9,
        parse_math=False,  # a name may contain a dollar sign
    )
    return png_bytes(figure)


def _open_store(path: AnyPath, frame: int) -> TokenStore:
    store = TokenStore.open(path)
    tokens, _ = store.card.frame_shape
    if tokens > 1:
        raise UserError(f"{path} has {tokens} tokens a frame; traversals are of stores with one token a frame")
    if frame >= len(store):
        raise UserError(f"--frame {frame} does not exist: {path} has frames 0 to {len(store) - 1}")
    return store


def _open_source(
    store: TokenStore, dataset: AnyPath | None, weights: Path | None, decoder: Path | None, device: str
) -> tuple[FrameDataset, Decode]:
    if decoder is not None:
        return frames_of(store, dataset), open_trained(decoder, store.identity, store.path, device)
    frames, encoder = open_source(store.card, store.identity, dataset=dataset, weights=weights, device=device)
    return frames, encoder.decode


def _describe(
    store: TokenStore,
    chosen: NDArray[np.int64],
    latent: NDArray[np.float32],
    information: NDArray[np.float64] | None,
    images: Images,
) -> list[dict[str, Any]]:
    names = () if information is None else state_names(information.shape[1], find_geometry(store))
    found = []
    for channel, row in zip(chosen.tolist(), images, strict=True):
        shares = None if information is None else dict(zip(names, nulls(information[channel].tolist()), strict=True))
        known = {"value": float(latent[channel]), "std": float(store.std[channel]), "information": shares}
        found.append({"latent": channel, **known, "change": _change(row)})
    return found


def _change(row: Images) -> float:
    # The middle image contributes 0.
    differences = np.abs(row.astype(np.float64) - row[STEPS // 2])
    return float(differences.mean() / 255 * STEPS / (STEPS - 1))
