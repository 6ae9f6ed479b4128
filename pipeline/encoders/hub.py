"""Weights from the Hugging Face hub: safetensors only, from the cache where they are there ($HF_HOME, $HF_HUB_OFFLINE are honoured)."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from wmcache.cache.errors import UserError

FILE = "model.safetensors"


def download_weights(repository: str, encoder: str) -> Path:
    """The weights of a repository on the hub, downloaded if need be.

    Raises:
        UserError: they are not in the cache and the hub cannot be reached.
    """
    cached = try_to_load_from_cache(repository, FILE)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Fails at once where there is no network; the download itself would try again for half a minute, aloud.
        get_hf_file_metadata(hf_hub_url(repository, FILE))
        return Path(hf_hub_download(repository, FILE))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the weights of {encoder} ({repository}) cannot be downloaded ({reason}); "
            "pass --weights FILE.safetensors, or use --encoder tcn, which needs no download"
        ) from error
