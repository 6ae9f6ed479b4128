"""wmcache: encode every frame once, train world models on cached latents, re-encode only live observations."""

__version__ = "0.1.0"
