"""Speed of training steps that the store feeds, against steps on a batch in memory and against DINO-WM's way of training."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wmcache.bench.plan import explicit_predict
from wmcache.bench.timing import median_ratio, seconds
from wmcache.cache.store import TokenStore
from wmcache.common.device import autocast, choose_device, choose_dtype
from wmcache.common.paths import AnyPath
from wmcache.trainer.feed import Feed, choose_residence
from wmcache.trainer.models import build
from wmcache.trainer.models.dino_wm import DinoWm
from wmcache.trainer.options import TrainOptions
from wmcache.trainer.train import data_shape, make_optimiser, statistics_of

ROUNDS = 5
Batch = Mapping[str, Tensor]


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
    """Time the same training steps of DINO-WM from three sources of batches, and as its code computes them, in turns.

    Batches come from `memory`, from the `store`, or with every frame encoded (`encoding`). The `reference` encodes too, in float32, with
    explicit attention under a mask. Ratios are of the store to the others, medians over the rounds.

    Args:
        encode: n -> tokens [n, N, D]; encodes n frames, as DINO-WM does for every batch.
        batch: windows of 3 + 1 frames, 5 env steps apart.
        steps: in each round; a tenth of them where frames are encoded.
    """
    store, where = TokenStore.open(cache), choose_device(device)
    options = TrainOptions(model_options=model_options, batch=batch, device=device)
    dtype = choose_dtype(options.dtype, where)
    windows = store.windows(options.history, 1, options.frameskip, "train")
    model = build("dino-wm", data_shape(store, options), model_options, statistics_of(store, options.frameskip))
    assert isinstance(model, DinoWm)
    model.to(where).train()
    reference = copy.copy(model)  # the same parameters
    reference.predict = functools.partial(explicit_predict, model)  # type: ignore[method-assign]
    optimiser = make_optimiser(model, options)
    chosen, why = choose_residence(store, where, residence)
    tqdm.write(why, file=sys.stderr)
    with Feed(store, windows, batch, 0, where, residence=chosen) as feed:
        held, few = {name: value.clone() for name, value in feed.next().items()}, max(1, steps // 10)
        variants = {
            "memory": (itertools.repeat(held), model, dtype, optimiser, steps),
            "store": (iter(feed.next, None), model, dtype, optimiser, steps),
            "encoding": (_encoded(held, encode), model, dtype, optimiser, few),
            "reference": (_encoded(held, encode), reference, torch.float32, optimiser, few),
        }
        for batches, network, precision, *_ in variants.values():
            _train(batches, network, precision, optimiser, 1)
        waited = feed.waited
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in tqdm(range(ROUNDS), desc="bench train", unit=" rounds"):
            for name, variant in variants.items():
                rates[name].append(variant[-1] / seconds(_train, *variant, device=where))
        waiting = (feed.waited - waited) / sum(steps / rate for rate in rates["store"])
    peers = ("memory", "encoding", "reference")
    ratios = {f"ratio_to_{name}": median_ratio(rates["store"], rates[name]) for name in peers}
    medians = {f"{name}_steps_per_second": statistics.median(values) for name, values in rates.items()}
    return {"windows_per_step": batch, **medians, **ratios, "waiting_share": waiting}


def _train(
    batches: Iterator[Batch], model: DinoWm, dtype: torch.dtype, optimiser: torch.optim.Optimizer, steps: int
) -> None:
    for batch in itertools.islice(batches, steps):
        with autocast(model.tokens_mean.device, dtype):
            loss = model.loss(batch)["loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _encoded(held: Batch, encode: Callable[[int], Tensor]) -> Iterator[Batch]:
    """Yield a batch again and again, its tokens replaced by those of as many frames that are encoded for it."""
    tokens = held["tokens"]
    while True:
        yield {**held, "tokens": encode(tokens.shape[0] * tokens.shape[1]).view(tokens.shape).to(tokens.device)}
