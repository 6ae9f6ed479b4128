"""Training steps fed by the store: as fast as steps on a batch that is already there, and how much faster than DINO-WM's way."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wmcache.bench.explicit import explicit_predict
from wmcache.cache.store import TokenStore
from wmcache.common.device import autocast, choose_device, choose_dtype, synchronise
from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.trainer.feed import Feed, choose_residence
from wmcache.trainer.models import build
from wmcache.trainer.models.dino_wm import DinoWm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import data_shape, make_optimiser, statistics_of

ROUNDS = 5


def bench_train(
    cache: AnyPath,
    model_options: dict[str, Any],
    encode: Callable[[int], Tensor],
    *,
    batch: int = 64,
    steps: int = 20,
    device: str = "auto",
    residence: str = "auto",
) -> dict[str, float]:
    """The same training steps from three sources of batches, and as DINO-WM's code has them, in turns.

    Args:
        cache: the store.
        model_options: of the world model.
        encode: n -> tokens [n, N, D], encoding n frames anew; what DINO-WM does with every batch.
        batch: windows of 3 + 1 frames, 5 apart.
        steps: in each turn; with encoding in the loop it is a tenth of them.
        device, residence: as in training.

    Returns:
        Steps a second on one batch in memory, fed by the store, with every frame encoded in the loop, and as the reference does them: that,
        in float32, with explicit attention under a mask. `ratio_to_…` of the store to each of the others, medians over the turns; and the
        share of time that the fed steps waited for data.
    """
    where = choose_device(device)
    options = TrainOptions(model_options=model_options, batch=batch, device=device)
    dtype = choose_dtype(options.dtype, where)
    store = TokenStore.open(cache)
    windows = store.windows(options.history, 1, options.frameskip, "train")
    model = build(options.model, data_shape(store, options), model_options, statistics_of(store, options.frameskip))
    model = model.to(where).train()
    optimiser = make_optimiser(model, options)
    chosen, why = choose_residence(store, where, residence)
    tqdm.write(why, file=sys.stderr)

    # The same parameters, another way through them.
    if not isinstance(model, DinoWm):
        raise UserError(f"bench train compares with DINO-WM, and {options.model} is another model")
    reference = copy.copy(model)
    reference.predict = functools.partial(explicit_predict, model)  # type: ignore[method-assign]

    def rate(name: str, count: int) -> float:
        forward, precision = (reference.loss, torch.float32) if name == "reference" else (model.loss, dtype)
        synchronise(where)
        start = time.perf_counter()
        for data in itertools.islice(sources[name], count):
            with autocast(where, precision):
                loss = forward(data)["loss"]
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        synchronise(where)
        return count / (time.perf_counter() - start)

    rates: dict[str, list[float]] = {"memory": [], "store": [], "encoding": [], "reference": []}
    with Feed(store, windows, batch, 0, where, residence=chosen) as feed:
        held = {name: value.clone() for name, value in feed.next().items()}
        sources = {
            "memory": itertools.repeat(held),
            "store": iter(feed.next, None),
            "encoding": _encoding(held, encode),
            "reference": _encoding(held, encode),
        }
        for name in sources:
            rate(name, 1)
        waited = feed.waited
        seconds = 0.0
        for _ in tqdm(range(ROUNDS), desc="bench train", unit=" rounds"):
            for name in sources:
                count = max(1, steps // 10) if name in ("encoding", "reference") else steps
                rates[name].append(rate(name, count))
            seconds += steps / rates["store"][-1]
    result = {f"{name}_steps_per_second": statistics.median(values) for name, values in rates.items()}
    ratios = {
        f"ratio_to_{name}": statistics.median(a / b for a, b in zip(rates["store"], others, strict=True))
        for name, others in rates.items()
        if name != "store"
    }
    return {"windows_per_step": batch, **result, **ratios, "waiting_share": (feed.waited - waited) / seconds}


def _encoding(held: Mapping[str, Tensor], encode: Callable[[int], Tensor]) -> Iterator[Mapping[str, Tensor]]:
    frames = held["tokens"].shape[:2]
    while True:
        yield {**held, "tokens": encode(frames.numel()).view(held["tokens"].shape).to(held["tokens"].device)}
