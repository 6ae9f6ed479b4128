"""A token store -> plain files for training code of others: safetensors, or Parquet with LeRobot's column names.

    export.json                 identity and card of the store, mean and std, features, and the files; written last
    tokens-000000.safetensors   the frames of shard 0: `tokens` [n, N, D], and each column of the step table under its own name
    tokens-000000.parquet       the same, one row per frame: `observation.tokens` as a list of N * D numbers, `action`, …

All values are the store's to the bit; tokens of an int8 store are the float16 ones that `TokenStore.gather` returns.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save
from tqdm import tqdm

from wmcache.cache.readme import dataset_facts, encoder_facts, title_of
from wmcache.cache.store import TokenStore
from wmcache.common.errors import UserError
from wmcache.common.files import cannot_write, is_temporary, sha256_of, write_whole
from wmcache.common.jsonfiles import read_json, write_json
from wmcache.common.paths import AnyPath, names_in, remove, require_name, size_of
from wmcache.common.progress import seconds_between_updates
from wmcache.common.readme import Readme, size_category, write_readme
from wmcache.pipeline.export_lerobot import feature_names

FORMAT_VERSION = 1
DONE, UNFINISHED = "export.json", "unfinished.json"
TOKENS = "observation.tokens"
LEROBOT: dict[str, tuple[str, tuple[int, ...]]] = {
    **dict.fromkeys(("index", "episode_index", "frame_index"), ("int64", ())),
    "timestamp": ("float32", ()),
}
"""Columns of each LeRobot dataset: type and shape."""
HINT = "choose another --out"

Rows = dict[str, NDArray[Any]]


def export_tokens(store: TokenStore, out: AnyPath, file_format: str) -> bool:
    """Write a file for each shard of a store; called again, it writes what is missing.

    Args:
        file_format: one of `FORMATS`.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: the folder has something else, or is the export of another store or format.
    """
    require_name(out)
    known = {"format": file_format, "format_version": FORMAT_VERSION, "identity": store.identity.to_json()}
    with cannot_write(out):
        _start(out, known)
        names = set(names_in(out))
        files = [f"tokens-{shard:06d}.{file_format}" for shard in range(store.card.num_shards)]
        if DONE in names and names.issuperset(files):
            return False
        with tqdm(total=len(store), desc="export", unit=" frames", mininterval=seconds_between_updates()) as bar:
            for shard, name in enumerate(files):
                if name not in names:
                    write_whole(out / name, FORMATS[file_format](store, _read(store, shard)))
                bar.update(len(store.card.shard_frames(shard)))
        _finish(store, out, known, files)
    return True


def _start(out: AnyPath, known: dict[str, Any]) -> None:
    names = {name for name in names_in(out) if not is_temporary(out / name)}
    started = next((name for name in (DONE, UNFINISHED) if name in names), None)
    if started is None:
        if names:
            raise UserError(f"{out} exists and is not an export; {HINT}")
        write_json(out / UNFINISHED, known)
        return
    found = read_json(out / started, HINT)
    if different := [name for name, value in known.items() if found.get(name) != json.loads(json.dumps(value))]:
        raise UserError(f"{out} is an export of another store or format ({', '.join(different)} differs); {HINT}")


def _read(store: TokenStore, shard: int) -> Rows:
    """Return the tokens and the columns of a shard."""
    frames = np.asarray(store.card.shard_frames(shard))
    return {"tokens": store.gather(frames)} | {name: values[frames] for name, values in store.step_columns().items()}


def _safetensors(store: TokenStore, rows: Rows) -> bytes:  # noqa: ARG001
    data: bytes = save({name: np.ascontiguousarray(values) for name, values in rows.items()})
    return data


def _parquet(store: TokenStore, rows: Rows) -> bytes:
    memory, first = io.BytesIO(), np.searchsorted(store.episode, rows["episode"]) + rows["step"]
    seconds = rows["step"] / int(store.card.dataset.get("fps", 1))
    values = {"index": first, "episode_index": rows["episode"], "frame_index": rows["step"], "timestamp": seconds}
    columns = {name: pa.array(values[name].astype(dtype)) for name, (dtype, _) in LEROBOT.items()}
    columns[TOKENS] = _lists(rows["tokens"])
    columns |= {feature: _lists(rows[name]) for name, feature in feature_names(store.columns, TOKENS).items()}
    pq.write_table(pa.table(columns), memory, compression="zstd", use_dictionary=False)
    return memory.getvalue()


FORMATS: dict[str, Callable[[TokenStore, Rows], bytes]] = {"safetensors": _safetensors, "parquet": _parquet}


def _lists(values: NDArray[Any]) -> pa.Array:
    """Return a number for each frame, or a list of a fixed size."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    width = values[0].size
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def _finish(store: TokenStore, out: AnyPath, known: dict[str, Any], files: list[str]) -> None:
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {"tokens": ("float16", store.card.frame_shape)}
    kinds |= {name: (str(values.dtype), values.shape[1:]) for name, values in store.step_columns().items()}
    if known["format"] == "parquet":
        renamed = {"tokens": TOKENS, **feature_names(store.columns, TOKENS)}
        kinds = {renamed[name]: kinds[name] for name in renamed} | LEROBOT
    features = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in kinds.items()}
    records = [
        {
            "name": name,
            "frames": len(store.card.shard_frames(shard)),
            "bytes": size_of(out / name),
            "sha256": sha256_of(out / name),
        }
        for shard, name in enumerate(files)
    ]
    statistics = {"mean": store.mean.tolist(), "std": store.std.tolist()}
    write_readme(out, _readme(store, known["format"], features))
    card = {"card": store.card.to_json(), **statistics}
    write_json(out / DONE, {**known, **card, "features": features, "files": records})
    remove(out / UNFINISHED)


def _readme(store: TokenStore, file_format: str, features: dict[str, dict[str, Any]]) -> Readme:
    front: dict[str, object] = {"task_categories": ["robotics"], "size_categories": [size_category(len(store))]}
    if file_format == "parquet":
        front["configs"] = [{"config_name": "default", "data_files": "tokens-*.parquet"}]
    summary = "Patch tokens of every frame of a dataset, with the step table."
    found = Readme(
        title_of(f"{store.identity.encoder} tokens", store.card),
        summary,
        ["world-model", file_format, store.identity.encoder],
        front,
    )
    found.facts(dataset_facts(store.card, store.identity) | encoder_facts(store.card, store.identity))
    shown = [(key, value["dtype"], " x ".join(map(str, value["shape"])) or "1") for key, value in features.items()]
    found.table("Features", ("name", "type", "size of a frame"), shown)
    return found
